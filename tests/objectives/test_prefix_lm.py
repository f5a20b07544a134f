"""Prefixes that are read both ways: transformers' decoders under a mask of their own, its encoder-decoders, and what is kept."""

import re
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from athanor.core.errors import ConfigError, DataError, NoTargetsError
from athanor.models import io
from athanor.objectives import prefix_lm
from athanor.objectives._pretraining import choose, generator
from athanor.objectives._vocabulary import Vocabulary
from athanor.objectives.prefix_lm import Config, prepare
from athanor.types import IGNORE, Batch

V = Vocabulary(60, frozenset(range(3)), torch.ones(60).bool(), torch.zeros(60).bool(), bos=1, eos=2, pad=0)
PIECES = st.lists(st.tuples(st.lists(st.integers(1, 59), min_size=1, max_size=20), st.booleans()), min_size=1, max_size=6)
CONFIGS = st.sampled_from([Config(), Config(0.25, 0.5), Config(0.5, 0.5), Config(1.0, 1.0), Config(0.0, 0.0)])


def batch_of(texts):
    """Next tokens as labels; of a text with True the last is known too."""
    ids = [id for text, _ in texts for id in text]
    labels = [id for text, more in texts for id in (*text[1:], 59 if more else IGNORE)]
    return Batch(torch.tensor(ids), torch.tensor(labels), torch.tensor([len(text) for text, _ in texts]), origin="texts")


@given(PIECES, CONFIGS, st.integers(0, 2**32))
def test_of_a_decoder(texts, config, seed):
    batch = batch_of(texts)
    made = prepare(batch, config, V, torch.Generator().manual_seed(seed))
    assert torch.equal(made.ids, batch.ids) and torch.equal(made.lengths, batch.lengths)
    sizes = batch.lengths.tolist()
    for labels, before, prefix in zip(
        made.labels.split(sizes), batch.labels.split(sizes), made.extras["prefix"].tolist(), strict=True
    ):
        assert 1 <= prefix <= len(labels)
        assert (labels[: prefix - 1] == IGNORE).all() and torch.equal(labels[prefix - 1 :], before[prefix - 1 :])
        known = int((before != IGNORE).sum())
        assert (labels != IGNORE).any() == (known > 0)
        total = known + 1
        if total > 3:
            assert max(1, round(config.low * total)) >= prefix or prefix >= min(round(config.low * total), total - 1)
            assert prefix <= max(1, min(round(config.high * total), total - 1), min(round(config.low * total), total - 1))


@given(PIECES, CONFIGS, st.integers(0, 2**32))
def test_of_an_encoder_decoder(texts, config, seed):
    whole = [[*text, 59] if more else text for text, more in texts]
    kept = [text for text in whole if len(text) > 1]
    rng = torch.Generator().manual_seed(seed)
    if not kept:
        with pytest.raises(NoTargetsError, match="sequences are too short: use longer rows"):
            prepare(batch_of(texts), config, replace(V, start=0), rng)
        return
    made = prepare(batch_of(texts), config, replace(V, start=0), rng)
    sources = [x.tolist() for x in made.source.ids.split(made.source.lengths.tolist())]
    targets = [x.tolist() for x in made.labels.split(made.lengths.tolist())]
    given_ = [x.tolist() for x in made.ids.split(made.lengths.tolist())]
    assert [a + b for a, b in zip(sources, targets, strict=True)] == kept
    assert given_ == [[0, *target[:-1]] for target in targets]
    assert int(made.extras["lost"].sum()) == sum(map(len, whole)) - sum(map(len, kept))


def test_any_length_is_as_likely():
    batch = batch_of([(list(range(10, 19)), True)] * 3000)
    prefixes = prepare(batch, Config(), V, generator(0, 0, 0)).extras["prefix"]
    counts = torch.bincount(prefixes)[1:]
    assert len(counts) == 9 and counts.min() > 250 and counts.max() < 420


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_the_loss_is_that_of_transformers_under_the_mask(architecture, model_of, noisy, rows, tmp_path):
    """A key is seen that is not after the query, or that is within the prefix."""
    model = model_of(architecture)
    found = choose("prefix_lm", model, {}, noisy, 48)
    io.save(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    batch = found.prepare(rows(), generator(0, 0, 0))
    total, count, metrics = found.loss(model, batch)
    expected, correct, plain = 0.0, 0, 0.0
    sizes = batch.lengths.tolist()
    for ids, labels, prefix in zip(batch.ids.split(sizes), batch.labels.split(sizes), batch.extras["prefix"], strict=True):
        at = torch.arange(len(ids))
        seen = (at[None] <= at[:, None]) | (at[None] < prefix)
        mask = torch.zeros(1, 1, len(ids), len(ids)).masked_fill(~seen, torch.finfo(torch.float32).min)
        with torch.no_grad():
            logits = theirs(ids[None], attention_mask=mask).logits[0]
            causal = theirs(ids[None]).logits[0]
        expected += float(cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"))
        plain += float(cross_entropy(causal, labels, ignore_index=IGNORE, reduction="sum"))
        correct += int((logits.argmax(-1) == labels).sum())
    assert count == int((batch.labels != IGNORE).sum())
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert int(metrics["correct"]) == correct
    assert abs(plain - expected) > 1e-4 * expected  # the test would see a mask without prefixes


def test_the_loss_is_that_of_t5(model_of, noisy, rows, tmp_path):
    model = model_of("t5")
    found = choose("prefix_lm", model, {}, noisy, 48)
    io.save(model, tmp_path)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = found.prepare(rows(), generator(0, 0, 0))
    total, count, _ = found.loss(model, batch)
    expected, sizes = 0.0, batch.lengths.tolist()
    sources = batch.source.ids.split(batch.source.lengths.tolist())
    for source, given_, labels in zip(sources, batch.ids.split(sizes), batch.labels.split(sizes), strict=True):
        with torch.no_grad():
            expected += float(theirs(source[None], decoder_input_ids=given_[None], labels=labels[None]).loss) * len(labels)
    assert count == len(batch.labels) and total.item() == pytest.approx(expected, rel=1e-5)


def test_options_change_the_prefixes(rows):
    made = [prepare(rows(), Config(*x), V, generator(0, 0, 0)).extras["prefix"] for x in ((), (0.5, 1.0), (0.0, 0.5))]
    assert len({tuple(x.tolist()) for x in made}) == 3


def test_batches_that_were_not_prepared(model_of, rows):
    with pytest.raises(DataError, match=r"batch 'rows 0..7' lacks extras prefix, which `prepare` of the objective adds"):
        prefix_lm.loss(model_of("llama"), rows())
    with pytest.raises(DataError, match=r"batch 'rows 0..7' has no sources, which an encoder-decoder reads: prepare it"):
        prefix_lm.loss(model_of("t5"), rows())
    empty = replace(rows(), labels=torch.full_like(rows().labels, IGNORE))
    with pytest.raises(NoTargetsError, match="there is nothing to learn from it; give texts of two tokens or more"):
        prefix_lm.loss(model_of("llama"), empty)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"low": -0.1}, "low (-0.1) must lie in [0, 1]"),
        ({"high": 1.1}, "high (1.1) must lie in [0, 1]"),
        ({"low": 0.5, "high": 0.25}, "low (0.5) must not be above high (0.25)"),
    ],
)
def test_options_out_of_range(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config(**fields)
