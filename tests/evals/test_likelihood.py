"""Bits per byte against the sum of -log2 p over one document after another."""

import math

import pytest
import torch

from athanor.core.errors import ConfigError, DataError
from athanor.evals import likelihood
from athanor.evals.likelihood import bits_per_byte
from athanor.types import Document

TEXTS = ["The athanor keeps one steady heat.", "12 + 30 = 42", "", "你好，世界。 naïve café 🔥", "x" * 90]


@pytest.fixture(scope="module")
def model(tiny):
    return tiny()


def documents(texts=TEXTS):
    return [Document(text, str(i)) for i, text in enumerate(texts)]


def naive(model, tokenizer, texts, window=None):
    """By one forward pass per predicted token, over all tokens before it or those that the windows leave."""
    nats = 0.0
    for text in texts:
        tokens = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.end_id]
        for i in range(1, len(tokens)):
            start = 0
            if window:
                stride = window // 2
                # windows end at window, window + stride, ...
                end = window if i <= window else window + math.ceil((i - window) / (window - stride)) * (window - stride)
                start = max(0, end - window)
            with torch.no_grad():
                logits = model(torch.tensor([tokens[start:i]]))[0, -1]
            nats -= float(torch.log_softmax(logits.double(), -1)[tokens[i]])
    return nats / math.log(2) / sum(len(t.encode()) for t in texts)


@pytest.mark.parametrize("batch_tokens", [1, 40, 16_384])
def test_it_is_the_naive_computation_when_the_window_covers_every_document(model, tokenizer, monkeypatch, batch_tokens):
    monkeypatch.setattr(likelihood, "_BATCH_TOKENS", batch_tokens)
    value = bits_per_byte(model, tokenizer, documents(), window=128)
    assert value == pytest.approx(naive(model, tokenizer, TEXTS), rel=1e-5)


@pytest.mark.parametrize("window", [2, 6, 16])
def test_windows_overlap_by_half_and_every_token_counts_once(model, tokenizer, window):
    texts = [TEXTS[0], TEXTS[3]]
    value = bits_per_byte(model, tokenizer, documents(texts), window=window)
    assert value == pytest.approx(naive(model, tokenizer, texts, window), rel=1e-5)


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary(tiny, tokenizer):
    model = tiny()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in TEXTS)
    expected = tokens * math.log2(tokenizer.vocab_size) / sum(len(text.encode()) for text in TEXTS)
    assert bits_per_byte(model, tokenizer, documents(), window=64) == pytest.approx(expected, rel=1e-6)


def test_documents_do_not_see_each_other(model, tokenizer):
    parts = [bits_per_byte(model, tokenizer, documents([text]), window=64) * len(text.encode()) for text in TEXTS if text]
    empty = naive(model, tokenizer, [TEXTS[1], ""]) * 12 - naive(model, tokenizer, [TEXTS[1]]) * 12
    whole = bits_per_byte(model, tokenizer, documents(), window=64) * sum(len(text.encode()) for text in TEXTS)
    assert whole == pytest.approx(sum(parts) + empty, rel=1e-5)


def test_bfloat16_is_close(model, tokenizer):
    exact = bits_per_byte(model, tokenizer, documents(), window=64)
    assert bits_per_byte(model, tokenizer, documents(), window=64, precision="bf16") == pytest.approx(exact, rel=0.02)


def test_nothing_to_measure_is_an_error(model, tokenizer):
    for nothing in ([], documents([""])):
        with pytest.raises(DataError, match="no text to measure bits per byte on: the held-out part is empty"):
            bits_per_byte(model, tokenizer, nothing, window=64)


@pytest.mark.parametrize("window", [0, 1, 129])
def test_a_window_that_the_model_cannot_have_is_refused(model, tokenizer, window):
    with pytest.raises(ConfigError, match=rf"window \({window}\) must lie between 2 and 128, the model's context"):
        bits_per_byte(model, tokenizer, documents(), window=window)
