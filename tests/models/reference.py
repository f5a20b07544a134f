"""Tiny random models of every architecture beside transformers' own, for the tests of parity."""

import torch
import transformers
from safetensors.torch import load_file

from athanor.core import plugins
from athanor.models import io
from athanor.nn.context import Bidirectional, Causal, Memory, Packed, Padded, WithMemory
from athanor.nn.moe import MixtureOfExperts

OWN = {"transformer", "rnn_lm", "bilstm_crf"}  # no such model in transformers: held to torch's modules in tests of their own


def cases(*kinds):
    """(architecture, name of preset) of every tiny preset of the kinds, with those of folders added to plugins."""
    found = []
    for name in plugins.names("models"):
        module = plugins.require("models", name, "Model", "Config", "PRESETS")
        if name not in OWN and module.Model.kind in kinds:
            found += [(name, preset) for preset in module.PRESETS if preset.startswith("tiny")]
    return found


def config_of(case):
    name, preset = case
    return plugins.load("models", name).PRESETS[preset]


def attention_of(cls, config):
    """How transformers' classes attend here: up to 5.20 they forget Gemma 2's limit of scores in sdpa."""
    return "sdpa" if cls._supports_sdpa and not getattr(config, "attn_logit_softcapping", None) else "eager"


def theirs_of(config, implementation="sdpa"):
    """A random model of transformers; norms and biases are random too, norms about what they begin with."""
    torch.manual_seed(0)
    fields = config.to_hf()
    settings = transformers.AutoConfig.for_model(**fields)
    cls = getattr(transformers, fields["architectures"][0])
    implementation = implementation if implementation == "eager" else attention_of(cls, settings)
    model = cls._from_config(settings, dtype=torch.float32, attn_implementation=implementation).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(float(p.mean()) if "norm" in name.lower() and name.endswith("weight") else 0.0, 0.15)
    return model


def ours_of(theirs, folder):
    """The same model, through a file."""
    theirs.save_pretrained(folder)
    return io.load(folder)


def mixture(model):
    """Whether tokens choose experts."""
    return any(isinstance(m, MixtureOfExperts) for m in model.modules())


def random_ids(config, *shape, seed=1):
    return torch.randint(3, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def inputs(config, kind, rows=3, time=19):
    """What a forward pass gets, by the names of transformers."""
    ids = random_ids(config, rows, time)
    return {"input_ids": ids} | ({"decoder_input_ids": random_ids(config, rows, 13, seed=2)} if kind == "encoder_decoder" else {})


def answered(given):
    """The ids whose logits come out."""
    return given.get("decoder_input_ids", given["input_ids"])


def logits(model, given, masks=None):
    """Ours; `masks` has attention_mask and decoder_attention_mask, as transformers takes them."""
    masks = masks or {}
    ids, mask = given["input_ids"], masks.get("attention_mask")
    if model.kind == "encoder_decoder":
        source = Bidirectional(*ids.shape) if mask is None else Padded(mask, causal=False)
        memory = Memory(model.encode(ids, source), mask=mask)
        answer, after = given["decoder_input_ids"], masks.get("decoder_attention_mask")
        inner = Causal(*answer.shape) if after is None else Padded(after, causal=True)
        return model.logits(model.hidden(answer, WithMemory(inner, memory)))
    if mask is None:
        return model(ids)
    return model.logits(model.hidden(ids, Padded(mask, causal=model.kind == "decoder")))


def packed(model, sources, answers=None):
    """Hidden states of sequences laid end to end, (N, D)."""
    lengths = torch.tensor([len(s) for s in sources])
    ids = torch.cat(sources).unsqueeze(0)
    if model.kind != "encoder_decoder":
        return model.hidden(ids, Packed(lengths, causal=model.kind == "decoder"))[0]
    memory = Memory(model.encode(ids, Packed(lengths, causal=False)), lengths)
    inner = Packed(torch.tensor([len(a) for a in answers]))
    return model.hidden(torch.cat(answers).unsqueeze(0), WithMemory(inner, memory))[0]


def separate(model, sources, answers=None):
    """The same, sequence by sequence."""
    found = []
    for i, ids in enumerate(sources):
        ids = ids.unsqueeze(0)
        if model.kind == "decoder":
            found.append(model.hidden(ids, Causal(*ids.shape))[0])
        elif model.kind == "encoder":
            found.append(model.hidden(ids, Bidirectional(*ids.shape))[0])
        else:
            memory = Memory(model.encode(ids, Bidirectional(*ids.shape)))
            found.append(model.hidden(answers[i].unsqueeze(0), WithMemory(Causal(1, len(answers[i])), memory))[0])
    return torch.cat(found)


def files(folder):
    """All tensors of a folder."""
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def gradients_of_theirs(theirs, folder):
    """Their gradients by the names of their files: saved as if they were the weights."""
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    theirs.save_pretrained(folder)
    return files(folder)


def gradients_of_ours(ours):
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in ours.named_parameters()}
    buffers = {n: b for n, b in ours.state_dict().items() if n not in grads}
    return ours.to_hf(grads | buffers)


def greatest(a, b):
    return float((a - b).abs().max())
