"""Answers to sources against transformers' encoder-decoders, and label smoothing against torch's."""

import re

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from athanor.core.errors import ConfigError, DataError, NoTargetsError
from athanor.data.pairs import pack
from athanor.models import io
from athanor.objectives import next_token, seq2seq
from athanor.objectives._pretraining import choose, generator
from athanor.types import IGNORE

SOURCES = [[20, 21, 22, 2], [30, 31, 2], [40] * 9, [50]]
TARGETS = [[60, 61, 2], [70, 71, 72, 73, 2], [80, 2], [90, 91]]
PAIRS = list(zip(SOURCES, TARGETS, strict=True))
CLASSES = {"t5": "T5", "bart": "Bart", "pegasus": "Pegasus"}


def in_transformers(model, architecture, folder):
    io.save(model, folder)
    return getattr(transformers, f"{CLASSES[architecture]}ForConditionalGeneration").from_pretrained(folder).eval()


def logits_of(theirs, start):
    for source, target in zip(SOURCES, TARGETS, strict=True):
        given = torch.tensor([[start, *target[:-1]]])
        with torch.no_grad():
            yield theirs(torch.tensor([source]), decoder_input_ids=given).logits[0], torch.tensor(target)


@pytest.mark.parametrize("architecture", CLASSES)
def test_the_loss_is_that_of_transformers(architecture, model_of, noisy, tmp_path):
    model = model_of(architecture)
    found = choose("seq2seq", model, {}, noisy, 48)
    batch = pack(PAIRS, found.vocabulary.start)
    assert found.prepare(batch, generator(0, 0, 0)) is batch
    total, count, metrics = found.loss(model, batch)
    expected, correct = 0.0, 0
    for logits, target in logits_of(in_transformers(model, architecture, tmp_path), found.vocabulary.start):
        expected += float(cross_entropy(logits, target, reduction="sum"))
        correct += int((logits.argmax(-1) == target).sum())
    assert count == sum(map(len, TARGETS)) and total.item() == pytest.approx(expected, rel=1e-5)
    assert int(metrics["correct"]) == correct


def test_smoothing_is_that_of_torch(model_of, noisy, tmp_path):
    model = model_of("bart")
    found = choose("seq2seq", model, {"smoothing": 0.2}, noisy, 48)
    batch = pack(PAIRS, 1)
    theirs = list(logits_of(in_transformers(model, "bart", tmp_path), 1))
    plain, smooth = (sum(float(cross_entropy(x, y, reduction="sum", label_smoothing=e)) for x, y in theirs) for e in (0.0, 0.2))
    assert found.loss(model, batch)[0].item() == pytest.approx(plain, rel=1e-5)  # nothing is smoothed but in training
    model.train()
    assert found.loss(model, batch)[0].item() == pytest.approx(smooth, rel=1e-5)
    assert smooth != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize(("smoothing", "same_as"), [(None, 0.1), (0.0, 0.0), (0.3, 0.3)])
def test_what_the_model_says_unless_told(smoothing, same_as, model_of, noisy):
    """The Transformer of 2017 has label smoothing of 0.1 of its own."""
    model = model_of("transformer", label_smoothing=0.1).train()
    batch = pack(PAIRS, 1)
    total = choose("seq2seq", model, {"smoothing": smoothing}, noisy, 48).loss(model, batch)[0]
    other = model_of("transformer", label_smoothing=same_as).train()
    assert total.item() == choose("seq2seq", other, {}, noisy, 48).loss(other, batch)[0].item()


def test_smoothing_of_next_tokens(model_of, noisy, rows):
    model, batch = model_of("llama"), rows()
    at = batch.labels != IGNORE
    plain = choose("next_token", model, {}, noisy, 48)
    smooth = choose("next_token", model, {"smoothing": 0.2}, noisy, 48)
    model.train()
    logits = torch.cat([model(ids[None])[0] for ids in batch.ids.split(batch.lengths.tolist())])[at]
    for found, smoothing in ((plain, 0.0), (smooth, 0.2)):
        expected = cross_entropy(logits, batch.labels[at], reduction="sum", label_smoothing=smoothing)
        assert found.loss(model, batch)[0].item() == pytest.approx(expected.item(), rel=1e-5)
    assert plain.loss(model, batch)[0].item() == next_token.loss(model, batch)[0].item()
    model.eval()
    assert smooth.loss(model, batch)[0].item() == plain.loss(model, batch)[0].item()


def test_batches_that_cannot_be_learned_from(model_of, noisy, rows):
    model = model_of("t5")
    found = choose("seq2seq", model, {}, noisy, 48)
    with pytest.raises(DataError, match=r"batch 'rows 0..7' has no sources.* seq2seq learns from pairs of texts"):
        found.prepare(rows(), generator(0, 0, 0))
    batch = pack(PAIRS, 1)
    batch.labels.fill_(IGNORE)
    with pytest.raises(NoTargetsError, match="there is nothing to learn from it; give answers that have at least one token"):
        found.loss(model, batch)


@pytest.mark.parametrize("config", [seq2seq.Config, next_token.Config])
@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_smoothing_out_of_range(config, value):
    message = f"smoothing ({value}) must lie in [0, 1), or be None for what the model says: 0.1 is usual"
    with pytest.raises(ConfigError, match=re.escape(message)):
        config(value)
