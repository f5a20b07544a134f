"""Parallel text: what is read, what is left out, and that every pair comes once an epoch in batches of like lengths."""

import gzip
import json
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from athanor.core.errors import ConfigError, DataError
from athanor.data import pairs
from athanor.data.pairs import PairBatches, TextPair, TokenPair, encode, pack, read

TEXT = [("Ein Mann.", "A man."), ("Zwei  Hunde\u2028laufen ", "Two dogs\trun"), ("", "nothing"), ("Caf\u0065\u0301", "Café")]
TIDY = [("Ein Mann.", "A man."), ("Zwei Hunde laufen", "Two dogs run"), ("", "nothing"), ("Café", "Café")]
IDS = st.lists(st.integers(3, 300), min_size=1, max_size=12)
PAIRS = st.lists(st.builds(TokenPair, IDS, IDS), min_size=1, max_size=60)


def lines(path, texts, end="\n"):
    content = "".join(text + end for text in texts).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_two_files_line_by_line(tmp_path, end, suffix):
    source = lines(tmp_path / f"a.de{suffix}", [a for a, _ in TEXT], end)
    target = lines(tmp_path / f"a.en{suffix}", [b for _, b in TEXT], end)
    assert read(source, target) == TIDY
    assert read(source, target, lower=True) == [(a.lower(), b.lower()) for a, b in TIDY]
    assert isinstance(read(source, target)[0], TextPair)


def test_the_last_line_may_lack_its_end(tmp_path):
    (tmp_path / "a").write_text("one\ntwo")
    (tmp_path / "b").write_text("eins\nzwei\n")
    assert read(tmp_path / "a", tmp_path / "b") == [("one", "eins"), ("two", "zwei")]


def test_one_file(tmp_path):
    table = lines(tmp_path / "a.tsv", [f"{a}\t{b.replace(chr(9), ' ')}" for a, b in TEXT])
    records = lines(tmp_path / "a.jsonl", [json.dumps({"source": a, "target": b, "more": 1}) for a, b in TEXT])
    assert read(table) == read(records) == TIDY


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x\n", r"a\.txt is one file and no \.tsv or \.jsonl with both sides: give the file of the other side too"),
        ("a.tsv", "a\tb\na\n", r"a\.tsv, line 2 has 1 columns and must have two, source and target: correct it"),
        ("a.tsv", "a\tb\tc\n", r"a\.tsv, line 1 has 3 columns"),
        ("a.tsv", "", r"a\.tsv has no lines: give parallel text"),
        ("a.jsonl", '{"source": "a", "target": "b"}\n{\n', r"a\.jsonl, line 2 is not JSON \(.+\): correct or remove the line"),
        ("a.jsonl", '{"source": "a", "target": 1}\n', r'line 1 must be an object with string fields "source" and "target"'),
        ("a.jsonl", "[1]\n", r'line 1 must be an object with string fields "source" and "target": correct it'),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_sides_that_do_not_fit(tmp_path):
    (tmp_path / "a").write_text("x\ny\n")
    (tmp_path / "b").write_text("x\n")
    with pytest.raises(DataError, match=r"a has 2 lines and .*b 1, and line by line they must be translations"):
        read(tmp_path / "a", tmp_path / "b")
    with pytest.raises(DataError, match="nowhere cannot be read"):
        read(tmp_path / "a", tmp_path / "nowhere")


def test_what_is_left_out_is_counted(tokenizer):
    texts = [
        TextPair("one heat", "steady"),
        TextPair("", "x"),
        TextPair("x", ""),
        TextPair("x " * 30, "x"),
        TextPair("x", "y" * 30),
    ]
    found = encode(texts, tokenizer, max_tokens=20)
    assert (found.empty, found.long) == (2, 2)
    assert found.summary == "2 with an empty side, 2 with a side that is too long"
    assert found.pairs == [(tokenizer.prompt("one heat"), [*tokenizer.encode("steady"), tokenizer.end_id])]
    size = max(map(len, found.pairs[0]))
    assert encode(texts[:1], tokenizer, max_tokens=size).long == 0
    message = rf"none of 1 pairs is left \(0 have an empty side, 1 one of more than max_tokens \({size - 1}\)\)"
    with pytest.raises(DataError, match=message):
        encode(texts[:1], tokenizer, max_tokens=size - 1)


def test_the_batch():
    batch = pack([([5, 6], [8]), ([7], [9, 10, 2])], 1, "two")
    assert batch.ids.tolist() == [1, 1, 9, 10] and batch.labels.tolist() == [8, 9, 10, 2] and batch.lengths.tolist() == [1, 3]
    assert batch.source.ids.tolist() == [5, 6, 7] and batch.source.lengths.tolist() == [2, 1] and batch.origin == "two"


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ([], "batch 'x' has no pairs: give at least one"),
        ([([1], [1]), ([2], [])], "pair 1 of batch 'x' has a side without tokens: leave it out, or give its end of text"),
        ([([], [1])], "pair 0 of batch 'x' has a side without tokens"),
    ],
)
def test_pairs_that_are_none(given_, message):
    with pytest.raises(DataError, match=re.escape(message)):
        pack(given_, 1, "x")


def content(batch):
    """Its pairs."""
    sources = batch.source.ids.split(batch.source.lengths.tolist())
    targets = batch.labels.split(batch.lengths.tolist())
    return [(tuple(s.tolist()), tuple(t.tolist())) for s, t in zip(sources, targets, strict=True)]


@given(found=PAIRS, batch_tokens=st.integers(24, 300), seed=st.integers(0, 3))
def test_every_pair_comes_once_an_epoch(found, batch_tokens, seed):
    order = PairBatches(found, batch_tokens, 1, seed)
    total, longest = sum(p.size for p in found), max(p.size for p in found)
    expected = Counter((tuple(p.source), tuple(p.target)) for p in found)
    for epoch in range(3):
        batches = [content(order.batch(epoch * order.per_epoch + i)) for i in range(order.per_epoch)]
        assert Counter(pair for batch in batches for pair in batch) == expected
        for batch in batches:
            size = sum(len(s) + len(t) for s, t in batch)
            assert abs(size - total / order.per_epoch) <= longest
    assert total / order.per_epoch >= min(batch_tokens, total)


def many(count=3000):
    chance = np.random.default_rng(0)
    sizes = chance.integers(1, 30, count)
    return [TokenPair([5] * n, [6] * int(max(1, n + chance.integers(-2, 3)))) for n in sizes.tolist()]


def test_batches_are_a_pure_function_of_the_step():
    found = many()
    order, other = PairBatches(found, 400, 1, 0), PairBatches(found, 400, 1, 0)
    steps = [0, 5, order.per_epoch + 5, 3, 3 * order.per_epoch - 1, 5]
    forwards = {step: content(order.batch(step)) for step in sorted(steps)}
    assert all(content(other.batch(step)) == forwards[step] for step in steps)
    assert forwards[5] != forwards[order.per_epoch + 5] != forwards[3]
    assert content(PairBatches(found, 400, 1, 1).batch(5)) != forwards[5]
    assert order.batch(order.per_epoch + 5).origin == "epoch 2, batch 6"


def test_pairs_of_like_length_meet(monkeypatch):
    """Rows filled up to the longest of their batch hold little else than tokens; unsorted ones waste half."""

    def waste(order):
        batches = [order.batch(i) for i in range(order.per_epoch)]
        rows = sum(len(b.lengths) * int(b.lengths.max()) + len(b.lengths) * int(b.source.lengths.max()) for b in batches)
        return rows / sum(p.size for p in found)

    found = many()
    assert waste(PairBatches(found, 400, 1, 0)) < 1.15
    monkeypatch.setattr(pairs, "_POOL", 0.01)
    assert waste(PairBatches(found, 400, 1, 0)) > 1.6


def test_a_batch_must_hold_a_pair():
    with pytest.raises(ConfigError, match=r"batch_tokens \(9\) must hold the longest pair, of 10 tokens: raise it"):
        PairBatches([TokenPair([3] * 4, [4] * 6), TokenPair([3], [4])], 9, 1, 0)


@pytest.mark.shared
def test_multi30k(shared):
    folder = shared / "data" / "mt" / "multi30k"
    found = read(folder / "train.de.gz", folder / "train.en.gz")
    assert len(found) == 29_000 and all(pair.source and pair.target for pair in found)
    assert found[0].target == "Two young, White males are outside near many bushes."
