"""The Transformer of 2017 against torch.nn.Transformer and against the paper's formulas."""

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from athanor.core.errors import CheckpointError, ConfigError
from athanor.core.io import read_json, write_json
from athanor.infer.rows import Rows
from athanor.models import io
from athanor.models.transformer import PRESETS, Config, Model
from tests.models.reference import files, greatest, logits, packed, random_ids, separate

CASES = ["tiny", "tiny-untied"]


def random_model(preset):
    model = io.build("transformer", PRESETS[preset], seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.15, generator=generator)
    return model.eval()


def in_torchs_names(model, of):
    """`of` each of our parameters but the embeddings, fused and named as torch.nn.Transformer's."""
    state = {}
    for stack in ("encoder", "decoder"):
        for i, block in enumerate(getattr(model, stack).blocks):
            at, decodes = f"{stack}.layers.{i}.", stack == "decoder"
            modules = {
                "self_attn.out_proj.": block.attention.out,
                "linear1.": block.feed_forward.up,
                "linear2.": block.feed_forward.down,
                "norm1.": block.attention_norm,
                "norm3." if decodes else "norm2.": block.feed_forward_norm,
            }
            if decodes:
                modules |= {"multihead_attn.out_proj.": block.cross.out, "norm2.": block.cross_norm}
            for leaf in ("weight", "bias"):
                state[f"{at}self_attn.in_proj_{leaf}"] = of(getattr(block.attention.qkv, leaf))
                state |= {at + name + leaf: of(getattr(module, leaf)) for name, module in modules.items()}
                if decodes:
                    both = [of(getattr(module, leaf)) for module in (block.cross.query, block.cross.kv)]
                    state[f"{at}multihead_attn.in_proj_{leaf}"] = torch.cat(both)
    return state


def theirs_of(model):
    """The same weights in torch's modules; the paper has no norm after the last block, which torch would add."""
    c = model.config
    common = {"dropout": 0.0, "activation": c.activation, "batch_first": True}
    layer = nn.TransformerEncoderLayer(c.d_model, c.n_heads, c.d_ff, **common)
    encoder = nn.TransformerEncoder(layer, c.n_layers, enable_nested_tensor=False)
    layer = nn.TransformerDecoderLayer(c.d_model, c.n_decoder_heads, c.d_decoder_ff, **common)
    decoder = nn.TransformerDecoder(layer, c.n_decoder_layers)
    theirs = nn.Transformer(c.d_model, c.n_heads, custom_encoder=encoder, custom_decoder=decoder, batch_first=True)
    theirs.load_state_dict(in_torchs_names(model, lambda p: p.detach().clone()))
    return theirs.eval()


def embedded(model, ids):
    """Section 3.4 and 3.5, entry by entry."""
    d = model.config.d_model
    table = torch.tensor(
        [[(math.sin, math.cos)[i % 2](t / 10_000 ** ((i - i % 2) / d)) for i in range(d)] for t in range(ids.shape[1])]
    )
    return model.embedding.weight[ids] * d**0.5 + table


def their_logits(model, theirs, source, answer, mask=None, after=None):
    causal = torch.ones(answer.shape[1], answer.shape[1], dtype=torch.bool).triu(1)
    padding = None if mask is None else ~mask
    after = None if after is None else ~after
    hidden = theirs(
        embedded(model, source), embedded(model, answer), tgt_mask=causal, tgt_is_causal=False,
        src_key_padding_mask=padding, memory_key_padding_mask=padding, tgt_key_padding_mask=after,
    )  # fmt: skip
    return hidden @ model.output_weight.t()


@pytest.mark.parametrize("preset", CASES)
def test_logits_are_torchs(preset):
    model = random_model(preset)
    theirs = theirs_of(model)
    source, answer = random_ids(model.config, 3, 11), random_ids(model.config, 3, 7, seed=2)
    with torch.no_grad():
        expected = their_logits(model, theirs, source, answer)
        assert expected.std() > 0.05
        assert greatest(model(source, answer), expected) <= 1e-5


@pytest.mark.parametrize("preset", CASES)
def test_padding_of_sources(preset):
    model = random_model(preset)
    theirs = theirs_of(model)
    source, answer = random_ids(model.config, 3, 11), random_ids(model.config, 3, 7, seed=2)
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[1, 8:] = False
    mask[2, 1:] = False
    given = {"input_ids": source, "decoder_input_ids": answer}
    with torch.no_grad():
        expected = their_logits(model, theirs, source, answer, mask)
        assert greatest(logits(model, given, {"attention_mask": mask}), expected) <= 1e-5
        # Padding to the left shifts no position.
        left = {"input_ids": source[1:2, :8], "decoder_input_ids": answer[1:2]}
        shifted = torch.cat((torch.zeros(1, 3, dtype=torch.int64), source[1:2, :8]), 1)
        side = {"attention_mask": torch.tensor([[False] * 3 + [True] * 8])}
        assert greatest(logits(model, left | {"input_ids": shifted}, side), logits(model, left)) <= 1e-5


@pytest.mark.parametrize("preset", CASES)
def test_padding_of_answers(preset):
    model = random_model(preset)
    theirs = theirs_of(model)
    source, answer = random_ids(model.config, 3, 11), random_ids(model.config, 3, 7, seed=2)
    after = torch.ones(3, 7, dtype=torch.bool)
    after[1, 5:] = False
    after[2, 1:] = False
    given = {"input_ids": source, "decoder_input_ids": answer}
    with torch.no_grad():
        expected = their_logits(model, theirs, source, answer, after=after)
        assert greatest(logits(model, given, {"decoder_attention_mask": after})[after], expected[after]) <= 1e-5
        alone = logits(model, {"input_ids": source[:1], "decoder_input_ids": answer[:1, :5]})
        shifted = {
            "input_ids": source[:1],
            "decoder_input_ids": torch.cat((torch.zeros(1, 2, dtype=torch.int64), answer[:1, :5]), 1),
        }
        side = {"decoder_attention_mask": torch.tensor([[False] * 2 + [True] * 5])}
        assert greatest(logits(model, shifted, side)[:, 2:], alone) <= 1e-5


@pytest.mark.parametrize("preset", CASES)
def test_smoothed_loss_and_every_gradient_are_torchs(preset):
    model = random_model(preset).train()
    theirs = theirs_of(model)
    source, answer = random_ids(model.config, 3, 11), random_ids(model.config, 3, 7, seed=2)
    targets = random_ids(model.config, 3, 7, seed=3)
    words = model.embedding.weight.detach().clone().requires_grad_()
    head = words if model.head is None else model.head.weight.detach().clone().requires_grad_()
    stub = type("Stub", (), {"config": model.config, "embedding": type("E", (), {"weight": words}), "output_weight": head})
    wanted = F.cross_entropy(
        their_logits(stub, theirs, source, answer).flatten(0, 1), targets.flatten(), label_smoothing=0.1, reduction="sum"
    )  # fmt: skip
    wanted.backward()
    hidden = packed(model, list(source), list(answer))
    total, _ = model.cross_entropy(hidden, targets.flatten())
    total.backward()
    assert abs(total.item() - wanted.item()) <= 1e-4 * wanted.item()
    pairs = {"embedding": (model.embedding.weight.grad, words.grad)}
    if model.head is not None:
        pairs["head"] = (model.head.weight.grad, head.grad)
    grads = in_torchs_names(model, lambda p: p.grad)
    assert grads.keys() == dict(theirs.named_parameters()).keys()
    pairs |= {name: (grads[name], p.grad) for name, p in theirs.named_parameters()}
    for name, (mine, yours) in pairs.items():
        assert greatest(mine, yours) <= 1e-4 * float(yours.abs().max()), name
    model.eval()
    plain, _ = model.cross_entropy(hidden.detach(), targets.flatten())
    expected = F.cross_entropy(model.logits(hidden), targets.flatten(), reduction="sum")
    assert abs(plain.item() - expected.item()) <= 1e-4 * expected.item()  # smoothing is for training


@pytest.mark.parametrize("preset", CASES)
def test_packed_is_separate(preset):
    model = random_model(preset)
    sources = [random_ids(model.config, n, seed=n) for n in (7, 1, 12, 3)]
    answers = [random_ids(model.config, n, seed=90 + n) for n in (2, 9, 1, 5)]
    with torch.no_grad():
        assert greatest(packed(model, sources, answers), separate(model, sources, answers)) <= 1e-5


@pytest.mark.parametrize("preset", CASES)
def test_cached_is_uncached(preset):
    model = random_model(preset)
    sources, answers = [random_ids(model.config, n, seed=n) for n in (5, 11)], [random_ids(model.config, n) for n in (17, 20)]
    runner = Rows(model)
    with torch.no_grad():
        expected = [model.logits(separate(model, [s], [a])) for s, a in zip(sources, answers, strict=True)]
    got = [runner.prefill([a[:n].tolist() for a, n in zip(answers, (1, 4), strict=True)], 0, [s.tolist() for s in sources])]
    for step in range(16):
        got.append(runner.decode([int(answers[0][1 + step]), int(answers[1][4 + step])], [1 + step, 4 + step]))
    for step, found in enumerate(got):
        for row, n in enumerate((1, 4)):
            assert greatest(found[row], expected[row][n + step - 1]) <= 1e-5


@pytest.mark.parametrize("preset", CASES)
def test_greedy_answers_are_a_plain_loops(preset):
    model = random_model(preset)
    if model.head is not None:  # or its answers would repeat one token
        model.embedding.weight.data.mul_(4)
    sources = random_ids(model.config, 3, 6)
    plain = torch.full((3, 1), 2)
    with torch.no_grad():
        for _ in range(40):
            plain = torch.cat((plain, model(sources, plain)[:, -1:].argmax(2)), 1)
    runner = Rows(model)
    tokens = [runner.prefill([[2]] * 3, 0, sources.tolist()).argmax(1).tolist()]
    for step in range(39):
        tokens.append(runner.decode(tokens[-1], [1 + step] * 3).argmax(1).tolist())
    assert torch.tensor(tokens).T.tolist() == plain[:, 1:].tolist()
    assert len(plain.unique()) > 5 and len({tuple(row) for row in plain.tolist()}) == 3


@pytest.mark.parametrize("preset", CASES)
def test_files(preset, tmp_path):
    model = random_model(preset)
    io.save(model, tmp_path)
    again = io.load(tmp_path)
    assert again.config == model.config
    mine, yours = model.state_dict(), again.state_dict()
    assert mine.keys() == yours.keys() and all(torch.equal(mine[k], yours[k]) for k in mine)
    assert "model.encoder.layers.0.self_attn.q_proj.weight" in files(tmp_path)
    source, answer = random_ids(model.config, 2, 5), random_ids(model.config, 2, 4)
    assert torch.equal(again(source, answer), model(source, answer))


def test_answers_begin_with_the_beginning_of_a_text(tmp_path):
    io.save(random_model("tiny"), tmp_path)
    write_json(tmp_path / "config.json", read_json(tmp_path / "config.json") | {"bos_token_id": 5})
    assert io.load(tmp_path).token_ids.decoder_start == 5


def test_a_config_is_what_its_file_says():
    config = Config(9, 8, 1, 2, 3, 4, 1, 5, 6, "silu", False, False, 0.25)
    assert Config.from_hf(config.to_hf()) == config
    fields = {k: v for k, v in PRESETS["tiny"].to_hf().items() if k not in ("scale_embedding", "label_smoothing")}
    assert Config.from_hf(fields | {"activation_function": None}) == PRESETS["tiny"]  # as in the paper where it says nothing


def test_fresh_weights():
    a, b, other = (io.build("transformer", PRESETS["tiny"], seed=seed) for seed in (1, 1, 2))
    poisoned = Model(PRESETS["tiny"])
    with torch.no_grad():
        for p in poisoned.parameters():
            p.fill_(torch.nan)
    poisoned.initialise(torch.Generator().manual_seed(1))
    for p, q, r in zip(a.parameters(), b.parameters(), poisoned.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)
    assert not torch.equal(a.embedding.weight, other.embedding.weight)
    qkv = a.encoder.blocks[0].attention.qkv.weight
    assert 0.9 * (6 / 64) ** 0.5 < qkv.abs().max().item() <= (6 / 64) ** 0.5


def test_the_papers_sizes():
    """Table 3: 65 and 213 million parameters, with the vocabulary of section 5.1."""
    for preset, millions in (("base", 65), ("big", 213)):
        found = io.build("transformer", PRESETS[preset]).n_parameters() / 1e6
        assert abs(found - millions) / millions < 0.04


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 33, "n_heads": 3, "n_decoder_heads": 3}, "d_model (33) must be even, for a sine and a cosine each: use 34"),
        ({"label_smoothing": 1.0}, "label_smoothing (1.0) must lie in [0, 1): 0.1 is usual, 0 is none"),
        ({"label_smoothing": -0.1}, "label_smoothing (-0.1) must lie in [0, 1)"),
        ({"n_layers": 0, "n_decoder_layers": 1}, "n_layers (0) must be at least 1"),
        ({"n_heads": 5}, "n_heads (5) must divide d_model (32): use 2 or 4"),
        ({"n_decoder_heads": 5}, "n_decoder_heads (5) must divide d_model (32): use 2 or 4"),
        ({"activation": "swish2"}, "activation ('swish2') must be one of"),
    ],
)
def test_shapes_that_are_none(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace(PRESETS["tiny"], **fields)


def test_a_config_that_lacks_something():
    with pytest.raises(CheckpointError, match=r"config\.json lacks 'encoder_layers', which a transformer needs: copy it again"):
        Config.from_hf({"vocab_size": 8, "d_model": 4})
