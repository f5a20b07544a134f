"""Perplexity against transformers' own losses, and against what words and bytes are by definition."""

import lzma
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from athanor.core.errors import ConfigError, DataError
from athanor.evals.perplexity import UNITS, count_words, perplexity
from athanor.models import io
from athanor.tokenizer.foreign import ForeignTokenizer
from tests.models.reference import config_of, theirs_of
from tests.tokenizer.test_foreign import byte_level, sentence_piece

TEXT = " = The athanor = \n \n It keeps one steady heat , 12 + 30 = 42 . \n naïve café 你好 <unk> \n" * 2


def strided(theirs, ids, window, stride):
    """transformers' losses in overlapping windows, each token's once; its own way of shifting labels. -> nats, tokens"""
    nats, counted, end = 0.0, 0, 0
    while end < len(ids) - 1:
        begin = max(0, end - (window - stride))
        stop = min(begin + window, len(ids) - 1)
        labels = torch.tensor([ids[begin : stop + 1]])
        labels[:, : end - begin + 1] = -100  # what was counted, and the first, which is context alone
        with torch.no_grad():
            loss = theirs(torch.tensor([ids[begin : stop + 1]]), labels=labels).loss
        new = stop - end
        nats, counted, end = nats + float(loss) * new, counted + new, stop
    assert counted == len(ids) - 1
    return nats, counted


@pytest.mark.parametrize("case", [("gpt2", "tiny"), ("llama", "tiny")], ids="-".join)
@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 16), (33, 5), (100, 1), (127, 64)])
def test_the_nats_of_transformers(case, window, stride, tmp_path):
    theirs = theirs_of(config_of(case))
    theirs.save_pretrained(tmp_path)
    (byte_level if case[0] == "gpt2" else sentence_piece)(tmp_path)
    vocabulary = ForeignTokenizer.load(tmp_path)
    found = perplexity(io.load(tmp_path), vocabulary, TEXT, window=window, stride=stride)
    ids = [vocabulary.bos_id, *vocabulary.encode(TEXT)]
    nats, counted = strided(theirs, ids, window, stride)
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert (found.tokens, found.given, found.context) == (counted, 0, window - stride + 1)
    assert found.windows == 1 + math.ceil(max(0, counted - window) / stride)
    units = {"word": count_words(TEXT), "byte": len(TEXT.encode()), "token": counted}
    for unit in UNITS:
        assert found.per(unit) == pytest.approx(math.exp(nats / units[unit]), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(math.log2(found.per("byte")))


def test_without_a_beginning_the_first_token_is_given(tmp_path):
    theirs = theirs_of(config_of(("gpt2", "tiny")))
    theirs.save_pretrained(tmp_path)
    byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    model, vocabulary = io.load(tmp_path), ForeignTokenizer.load(tmp_path)
    model.token_ids = type(model.token_ids)()
    found = perplexity(model, vocabulary, TEXT, window=100, stride=50)
    ids = vocabulary.encode(TEXT)
    nats, counted = strided(theirs, ids, 100, 50)
    assert found.nats == pytest.approx(nats, rel=1e-5) and (found.given, found.tokens) == (1, counted)
    with pytest.raises(DataError, match="the text's 1 tokens hold none that can be predicted: give a longer one"):
        perplexity(model, vocabulary, "a", window=100, stride=50)


def test_a_model_that_knows_nothing(tiny, tokenizer):
    """Perplexity per token is then the size of the vocabulary."""
    model = tiny()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    found = perplexity(model, tokenizer, TEXT, window=64, stride=32)
    assert found.tokens == len(tokenizer.encode(TEXT))
    assert found.per("token") == pytest.approx(tokenizer.vocab_size, rel=1e-5)
    assert found.per("word") == pytest.approx(tokenizer.vocab_size ** (found.tokens / count_words(TEXT)), rel=1e-3)


def test_more_context_changes_what_is_measured(tiny, tokenizer):
    model = tiny()
    values = {stride: perplexity(model, tokenizer, TEXT, window=32, stride=stride).nats for stride in (1, 16, 32)}
    assert len(set(values.values())) == 3
    exact = perplexity(model, tokenizer, TEXT, window=64, stride=32).nats
    assert perplexity(model, tokenizer, TEXT, window=64, stride=32, precision="bf16").nats == pytest.approx(exact, rel=0.02)


@given(lines=st.lists(st.lists(st.text("ab<>=,", min_size=1, max_size=4), max_size=5), max_size=5), end=st.booleans())
def test_words_and_ends_of_lines(lines, end):
    text = "\n".join(" " + " ".join(words) + " " for words in lines) + "\n" * end
    count = sum(map(len, lines)) + len(lines) if lines else int(end)
    if lines and not end and not text.split("\n")[-1]:
        count -= 1
    assert count_words(text) == count


def test_nothing_and_words_are_counted():
    assert [count_words(text) for text in ("", "\n", "a", "a\n", "a b\n\n c")] == [0, 1, 2, 2, 6]


@pytest.mark.parametrize("stride", [0, 33, -1])
def test_a_stride_that_leaves_tokens_out_is_refused(tiny, tokenizer, stride):
    with pytest.raises(ConfigError, match=rf"stride \({stride}\) must lie between 1 and window \(32\): half of it is usual"):
        perplexity(tiny(), tokenizer, TEXT, window=32, stride=stride)


def test_windows_and_texts_that_cannot_be(tiny, tokenizer):
    with pytest.raises(ConfigError, match=r"window \(129\) must lie between 2 and 128, the model's context"):
        perplexity(tiny(), tokenizer, TEXT, window=129, stride=64)
    with pytest.raises(DataError, match="the text's 0 tokens hold none that can be predicted"):
        perplexity(tiny(), tokenizer, "", window=32, stride=16)


@pytest.mark.shared
def test_the_words_of_wikitext_are_those_of_the_published_figures(shared):
    folder = shared / "data" / "lm" / "wikitext2"
    for name, words in (("valid", 217_646), ("test", 245_569)):
        with lzma.open(folder / f"{name}.txt.xz", "rt", encoding="utf-8", newline="") as file:
            assert count_words(file.read()) == words
