"""The laws of the house on somebody's own model: one renderer (L1), one model (L2), packed = separate (L3), rollout = trainer
(L6), exported = original (L7). Those of the training loop are in `train.laws`.

Each check is pure: it changes nothing and returns what it found. Computed in float32; distances of log-probabilities in nats.
Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from athanor.core import io
from athanor.infer.engine import Engine
from athanor.models.base import CausalLM, EncoderDecoder, LanguageModel
from athanor.models.heads import Headed
from athanor.nn.context import Bidirectional, Causal, Memory, Packed, WithMemory
from athanor.tokenizer.bpe import TOKENIZER_FILE, Tokenizer
from athanor.tokenizer.chat import TEMPLATE, Rendered, render
from athanor.tokenizer.vocabulary import Vocabulary
from athanor.types import IGNORE, Batch, Completion, Finding, Request, SamplingParams

NATS = 1e-4  # float32 log-probabilities of one token computed in two ways
_LONGEST = 512  # tokens of a probe
LOGITS = 1e-4  # logits of two programs, as a share of the largest
Messages = list[dict[str, str]]
Renderer = Callable[[Messages, bool], list[int]]

CONVERSATIONS: tuple[Messages, ...] = (
    [{"role": "user", "content": "What is 12 + 30?"}],
    [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": "  你好，世界 🔥\r\n\tcafé "},
        {"role": "assistant", "content": "世界", "reasoning_content": "one\n\ntwo "},
        {"role": "user", "content": "def f(x):\n    return {{ x }}"},
        {"role": "assistant", "content": ""},
    ],
)


def sequences(tokenizer: Vocabulary | None, context: int, vocab_size: int) -> list[Rendered]:
    """Ragged probes of 2 tokens to `context` at most, supervised where an assistant speaks, or everywhere when none does.

    Without a tokenizer they are random ids below `vocab_size`; one of another program knows no conversations.
    """
    rendered = []
    if isinstance(tokenizer, Tokenizer):
        rendered = [render(tokenizer, c, generation_prompt=len(c) == 1) for c in CONVERSATIONS]
    texts = ["The athanor keeps one steady heat. " * 9, "12 + 30 =", "a" if rendered else "a b c"]
    texts += [] if rendered else ["What is 12 + 30?", "  naïve café, 世界"]
    generator = torch.Generator().manual_seed(0)
    for text in texts:
        drawn = torch.randint(vocab_size, (2 + len(text) // 3,), generator=generator)
        ids = drawn.tolist() if tokenizer is None else tokenizer.prompt(text)
        rendered.append(Rendered(ids, [True] * len(ids)))
    cut = [Rendered(r.ids[:context], r.loss_mask[:context]) for r in rendered]
    return [r if any(r.loss_mask) else Rendered(r.ids, [True] * len(r.ids)) for r in cut]


def one_renderer(tokenizer: Tokenizer) -> list[Finding]:
    """L1: the saved template, rendered by other people's software, gives our ids; text never becomes a control token."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        theirs, by = _transformers(folder) if find_spec("transformers") else _jinja(folder)
        cases = [(c, prompt) for c in CONVERSATIONS for prompt in (False, True)]
        different = sum(render(tokenizer, c, generation_prompt=p).ids != theirs(c, p) for c, p in cases)
    text = "".join(tokenizer.control) + " <|end|><|assistant|>"
    attack = render(tokenizer, [{"role": "user", "content": text}]).ids
    outer = [tokenizer.bos_id, tokenizer.user_id, tokenizer.end_id]
    strange = [id for id in attack if id < len(tokenizer.control)]
    kept = strange == outer and tokenizer.decode(attack) == text
    return [
        Finding("L1", f"our ids and those of the saved template rendered by {by}: conversations that differ", different),
        Finding("L1", "control tokens that a user's text could write", 0 if kept else abs(len(strange) - len(outer)) or 1),
    ]


def _transformers(folder: str) -> tuple[Renderer, str]:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)

    def ids(messages: Messages, prompt: bool) -> list[int]:
        out: Any = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)
        return list(out["input_ids"])

    return ids, "transformers"


def _jinja(folder: str) -> tuple[Renderer, str]:
    import tokenizers
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # Jinja alone does not know the tags that mark what is learned; they print nothing.
    bare = TEMPLATE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(bare)
    inner = tokenizers.Tokenizer.from_file(str(Path(folder) / TOKENIZER_FILE))

    def ids(messages: Messages, prompt: bool) -> list[int]:
        text = template.render(messages=messages, add_generation_prompt=prompt)
        return list(inner.encode(text, add_special_tokens=False).ids)

    return ids, "jinja"


def one_model(model: CausalLM, tokenizer: Vocabulary) -> list[Finding]:
    """L2: answers from the cache are those of whole forward passes, and the same alone as among others, and where prompts are
    computed in parts or their beginnings are in the cache."""
    context = min(model.config.max_positions, _LONGEST)
    requests = []
    for i, s in enumerate(sequences(tokenizer, context // 2, model.config.vocab_size) * 2):
        params = SamplingParams(temperature=float(i % 2), max_tokens=8 + 5 * (i % 4), seed=i)
        requests.append(Request(str(i), s.ids, params))
    together = Engine(model, tokenizer, max_batch=3).generate(requests)
    alone = [Engine(model, tokenizer, max_batch=1).generate([r])[0] for r in requests]
    known = Engine(model, tokenizer, max_batch=3, step_tokens=5)
    again = [known.generate(requests) for _ in range(2)][1]
    distance = max(_distance(model, c) for c in (*together, *alone, *again))
    different = sum(a.ids != b.ids for a, b in zip(together, alone, strict=True))
    other = sum(a.ids != b.ids for a, b in zip(again, alone, strict=True))
    tokens = sum(len(c.ids) for c in (*together, *alone, *again))
    return [
        Finding("L2", f"cached and uncached: log-probabilities of {tokens} generated tokens", distance, NATS),
        Finding("L2", f"batched and alone: answers of {len(requests)} that differ", different),
        Finding("L2", f"in parts, from beginnings that are cached, and alone: answers of {len(requests)} that differ", other),
    ]


@torch.inference_mode()
def _distance(model: CausalLM, c: Completion) -> float:
    ids = torch.tensor([[*c.prompt_ids, *c.ids]], device=model.device)
    logprobs = torch.log_softmax(model(ids[:, :-1])[0, len(c.prompt_ids) - 1 :].float(), -1)
    own = logprobs.gather(1, ids[0, len(c.prompt_ids) :, None])[:, 0]
    return _largest(own - torch.tensor(c.logprobs, device=own.device))


def packed_is_separate(model: CausalLM, batch: Batch) -> Finding:
    """L3: the sequences of a batch laid end to end give the log-probabilities that each gives alone."""
    with torch.inference_mode():
        packed = model.hidden(batch.ids.unsqueeze(0), Packed(batch.lengths))[0]
        parts = batch.ids.split(batch.lengths.tolist())
        alone = torch.cat([model.hidden(p.unsqueeze(0), Causal(1, len(p), p.device))[0] for p in parts])
        targets = batch.ids.roll(-1)
        a, b = (model.token_logprobs(h, targets, torch.ones(len(h), device=h.device))[0] for h in (packed, alone))
    return Finding("L3", f"packed and separate: log-probabilities of {len(targets)} tokens", _largest(a - b), NATS)


@torch.inference_mode()
def hidden_packed_is_separate(model: LanguageModel, sequences: Sequence[Sequence[int]]) -> Finding:
    """L3 for encoders and encoder-decoders, whose answers to each sequence are here the others': the same hidden states."""
    ids = [torch.tensor(s, device=model.device) for s in sequences]
    lengths = torch.tensor([len(s) for s in ids], device=model.device)
    packed = _hidden(model, torch.cat(ids), lengths, torch.cat(ids[::-1]), lengths.flip(0))
    alone = [_hidden(model, s, lengths[i : i + 1], ids[~i], lengths[~i, None]) for i, s in enumerate(ids)]
    distance = _largest(packed - torch.cat(alone)) / (float(packed.abs().max()) or 1.0)
    return Finding("L3", f"packed and separate: hidden states of {len(packed)} tokens", distance, LOGITS)


def _hidden(model: LanguageModel, ids: Tensor, lengths: Tensor, answers: Tensor, answer_lengths: Tensor) -> Tensor:
    """Of sequences laid end to end, (N,) -> (N, D)."""
    ctx = Packed(lengths, causal=False)
    if isinstance(model, Headed):
        return model.read(ids.unsqueeze(0), ctx)[0]
    if not isinstance(model, EncoderDecoder):
        return model.hidden(ids.unsqueeze(0), ctx)[0]
    memory = Memory(model.encode(ids.unsqueeze(0), ctx), lengths)
    return model.hidden(answers.unsqueeze(0), WithMemory(Packed(answer_lengths), memory))[0]


@torch.inference_mode()
def rollout_is_trainer(model: CausalLM, batch: Batch) -> Finding:
    """L6: `old_logprobs` of a batch of rollouts (see `objectives.policy_gradient`) are those that the trainer computes."""
    at = batch.labels != IGNORE
    hidden = model.hidden(batch.ids.unsqueeze(0), Packed(batch.lengths))[0, at]
    logprobs, _ = model.token_logprobs(hidden, batch.labels[at], batch.extras["temperature"][at])
    distance = _largest(logprobs - batch.extras["old_logprobs"][at])
    return Finding("L6", f"rollout and trainer: log-probabilities of {len(logprobs)} sampled tokens", distance, NATS)


@torch.inference_mode()
def same_logits(
    compared: str, one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], ids: Sequence[int], *, exactly: bool
) -> Finding:
    """L7: two models, each (1, T) -> (1, T, V), give the same logits: bit by bit, or up to float32 rounding."""
    tensor = torch.tensor([ids])
    a, b = one(tensor).float(), other(tensor).float()
    if a.shape != b.shape:
        return Finding("L7", f"{compared}: logits have shapes {tuple(a.shape)} and {tuple(b.shape)}", torch.inf)
    scale = 1.0 if exactly else float(a.abs().max()) or 1.0
    return Finding("L7", f"{compared}: logits of {len(ids)} tokens", _largest(a - b) / scale, 0.0 if exactly else LOGITS)


def readable(model: LanguageModel, ids: Sequence[int]) -> list[int]:
    """`ids` without what other programs take for padding, and with the end of text or the separators that a head may read."""
    special = model.token_ids
    out = [(0 if special.pad else 1) if id == special.pad else id for id in ids]
    trunk: Any = model.trunk if isinstance(model, Headed) else model
    if getattr(trunk, "global_tokens", "none") == "question":  # as in "<s> question </s></s> context </s>"
        mark, places = trunk.config.sep_id, {1, 2, len(out) - 1} if len(out) > 3 else {len(out) - 1}
        other = next(id for id in range(3) if id not in (mark, special.pad))
        out = [mark if i in places else other if id == mark else id for i, id in enumerate(out)]
    if isinstance(model, Headed) and model.head.pools and model.kind == "encoder_decoder" and special.eos:
        out[-1] = special.eos[0]
    return out


def outputs(model: LanguageModel) -> Callable[[Tensor], Tensor]:
    """What a model computes of ids (1, T): its head's logits, or hidden states where it has no head."""

    def run(ids: Tensor) -> Tensor:
        whole, causal = Bidirectional(1, ids.shape[1]), Causal(1, ids.shape[1])
        if isinstance(model, EncoderDecoder):
            if model.task == "none":
                return model.hidden(ids, WithMemory(causal, Memory(model.encode(ids, whole))))
            out: Tensor = model(ids, ids)
            return out
        if model.task == "none":
            return model.hidden(ids, whole if model.kind == "encoder" else causal)
        if model.task == "following":
            bert: Any = model
            out = bert.next_sentence(model.hidden(ids, whole)[:, 0])
            return out
        out = model(ids)
        return out

    return run


def same_in_transformers(model: LanguageModel, folder: Path, quantised: bool, ids: Sequence[int]) -> Finding:
    """L7: the folder that `model` was saved to gives its numbers in transformers."""

    def skipped(reason: str) -> Finding:
        return Finding("L7", "ours and transformers", skipped=reason)

    if quantised or not find_spec("transformers"):
        return skipped("the model is quantised: other programs round otherwise" if quantised else "transformers is not installed")
    import transformers
    from transformers.utils import logging

    named = (io.read_json(folder / "config.json").get("architectures") or ["none"])[0]
    if not hasattr(transformers, named):
        return skipped(f"transformers has no model {named!r}")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    theirs = getattr(transformers, named).from_pretrained(folder, dtype=torch.float32).eval()

    def other(tensor: Tensor) -> Tensor:
        answers = {"decoder_input_ids": tensor} if isinstance(model, EncoderDecoder) else {}
        with torch.inference_mode():
            found = theirs(tensor, **answers)
        if model.task == "question":
            return torch.stack((found.start_logits, found.end_logits), -1)
        name = "last_hidden_state" if model.task == "none" else "logits"
        logits: Tensor = found["prediction_logits" if "prediction_logits" in found else name]  # BERT's, before next sentences
        return logits

    return same_logits("ours and transformers", outputs(model), other, ids, exactly=False)


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())
