"""From tokens to batches: labels are shifted, never cross a document, and every row comes once an epoch."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from athanor.core.errors import ConfigError, DataError
from athanor.data.pack import Rows, fill, join, pack
from athanor.data.shards import TokenShard, write_tokens
from athanor.tokenizer.chat import Rendered, render
from athanor.types import IGNORE, Batch, Document, Source

SEQUENCES = st.lists(
    st.lists(st.tuples(st.integers(0, 300), st.booleans()), min_size=2, max_size=12).map(
        lambda pairs: Rendered([i for i, _ in pairs], [m for _, m in pairs])
    ),
    min_size=1,
    max_size=6,
)


@given(sequences=SEQUENCES)
def test_each_position_predicts_the_next_token_where_that_is_learned(sequences):
    batch = pack(sequences, "x")
    assert batch.origin == "x"
    assert batch.ids.dtype == batch.labels.dtype == batch.lengths.dtype == torch.int64
    assert len(batch.ids) == len(batch.labels) == int(batch.lengths.sum())
    assert batch.lengths.tolist() == [len(s.ids) - 1 for s in sequences]
    sizes = batch.lengths.tolist()
    for s, ids, labels in zip(sequences, batch.ids.split(sizes), batch.labels.split(sizes), strict=True):
        assert ids.tolist() == s.ids[:-1]
        expected = [s.ids[i + 1] if s.loss_mask[i + 1] else IGNORE for i in range(len(ids))]
        assert labels.tolist() == expected


def test_what_is_supervised_of_a_conversation_is_the_assistants_text_and_its_end(tokenizer):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "heat?"},
        {"role": "assistant", "content": "steady", "reasoning": "one"},
        {"role": "user", "content": "work?"},
        {"role": "assistant", "content": "stage"},
    ]
    batch = pack([render(tokenizer, messages)])
    learned = batch.labels[batch.labels != IGNORE].tolist()
    think, end_think, end = tokenizer.think_id, tokenizer.end_think_id, tokenizer.end_id
    one, steady, stage = (tokenizer.encode(text) for text in ("one", "steady", "stage"))
    assert learned == [think, *one, end_think, *steady, end, *stage, end]
    assert batch.ids.tolist().count(tokenizer.bos_id) == 1


@given(parts=st.lists(SEQUENCES, min_size=1, max_size=3))
def test_joined_batches_are_the_batch_of_all(parts):
    joined = join([pack(part, str(i)) for i, part in enumerate(parts)])
    whole = pack([s for part in parts for s in part])
    for name in ("ids", "labels", "lengths"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))
    assert joined.origin == " + ".join(str(i) for i in range(len(parts)))


def test_joined_extras_stay_with_their_tokens():
    one, two = (
        Batch(torch.arange(n), torch.arange(n), torch.tensor([n]), {"weight": torch.full((n,), float(n))}) for n in (2, 3)
    )
    assert join([one, two]).extras["weight"].tolist() == [2, 2, 3, 3, 3]
    with pytest.raises(AssertionError):
        join([one, Batch(two.ids, two.labels, two.lengths)])


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "batch 'x' has no sequences: give at least one"),
        ([Rendered([1, 2], [True, True]), Rendered([1], [True])], "sequence 1 of batch 'x' has 1 tokens: it takes 2 to predict"),
    ],
)
def test_what_cannot_be_packed_is_refused(sequences, message):
    with pytest.raises(DataError, match=message):
        pack(sequences, "x")


def shard_of(sizes):
    """Documents of these sizes; every token is another number, so it can be told where it comes from."""
    starts = np.cumsum([0, *sizes[:-1]])
    return SimpleNamespace(tokens=np.arange(sum(sizes), dtype=np.uint16), starts=starts.astype(np.int64))


SHARDS = st.lists(st.integers(2, 30), min_size=1, max_size=20).filter(lambda sizes: sum(sizes) >= 4)


@given(sizes=SHARDS, data=st.data(), seed=st.integers(0, 10))
def test_rows_are_documents_cut_at_their_borders(sizes, data, seed):
    shard = shard_of(sizes)
    length = data.draw(st.integers(1, sum(sizes) - 1))
    rows = Rows(shard, length, seed)
    count = data.draw(st.integers(1, 2 * rows.count))
    first = data.draw(st.integers(0, 100))
    batch = rows.batch(first, count)
    assert batch.ids.dtype == batch.labels.dtype == torch.int64
    assert len(batch.ids) == count * length == int(batch.lengths.sum())
    assert batch.lengths.min() >= 1
    document = np.repeat(np.arange(len(sizes)), sizes)
    start = 0
    for size in batch.lengths.tolist():
        ids, labels = batch.ids[start : start + size].tolist(), batch.labels[start : start + size].tolist()
        assert ids == list(range(ids[0], ids[0] + size))
        assert len({document[i] for i in ids}) == 1, "a sequence crosses a border"
        for token, label in zip(ids, labels, strict=True):
            ends = token + 1 == len(document) or document[token + 1] != document[token]
            assert label == (IGNORE if ends else token + 1)
        start += size
    # sequences are as long as they can be: a cut is a border of a document or of a row
    edges = set(np.cumsum(batch.lengths.tolist()).tolist())
    borders = {i for i in range(1, count * length) if i % length and int(batch.ids[i]) in set(shard.starts.tolist())}
    assert edges == borders | {length * (i + 1) for i in range(count)}


@given(sizes=SHARDS, data=st.data())
def test_every_row_comes_once_an_epoch_in_an_order_of_its_own(sizes, data):
    shard = shard_of(sizes)
    length = data.draw(st.integers(1, max(1, (sum(sizes) - 1) // 2)))
    rows = Rows(shard, length, 3)
    for epoch in range(2):
        seen = Counter(rows.batch(epoch * rows.count, rows.count).ids.tolist())
        assert seen == Counter(range(rows.count * length))
    assert sum(sizes) - 1 - rows.count * length < length  # what is left over does not fill a row


def test_the_order_depends_on_seed_and_epoch():
    shard = shard_of([200, 300])
    orders = [Rows(shard, 10, seed).batch(first, 49).ids.tolist() for seed in (0, 1) for first in (0, 49)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(order != sorted(order) for order in orders)


@given(steps=st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_a_batch_is_a_function_of_its_place_alone(steps):
    """Whatever was asked before: this is why a resumed run sees the data that it would have seen."""
    shard = shard_of([40, 60, 30])
    used = Rows(shard, 7, 5)
    for step in steps:
        a, b = used.batch(3 * step, 3), Rows(shard, 7, 5).batch(3 * step, 3)
        assert torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels) and torch.equal(a.lengths, b.lengths)
        assert a.origin == f"rows {3 * step}..{3 * step + 2}"


def test_rows_of_a_real_shard(tokenizer, tmp_path):
    write_tokens(tokenizer, [Document(f"document {i} of the work " * (i + 1), str(i)) for i in range(9)], tmp_path / "a")
    shard = TokenShard(tmp_path / "a")
    batch = Rows(shard, 32, 0).batch(0, 4)
    begins = (batch.ids == tokenizer.bos_id).nonzero().squeeze(1)
    assert len(begins) >= 1
    for i in begins.tolist():
        if i % 32:
            assert batch.ids[i - 1] == tokenizer.end_id and batch.labels[i - 1] == IGNORE
    assert not (batch.labels == tokenizer.bos_id).any()
    assert (batch.labels == tokenizer.end_id).any()


def test_a_shard_shorter_than_a_row_is_refused():
    Rows(shard_of([10]), 9, 0)
    with pytest.raises(ConfigError, match=r"row length \(10\) must be below the 10 tokens of the shard: lower it"):
        Rows(shard_of([10]), 10, 0)


def test_fill_adds_unsupervised_sequences_no_longer_than_the_longest_and_changes_nothing_else():
    batch = Batch(
        torch.tensor([5, 6, 7]),
        torch.tensor([6, IGNORE, 8]),
        torch.tensor([2, 1]),
        {"temperature": torch.tensor([0.5, 0.5, 0.5]), "weight": torch.tensor([1.0, 2.0])},
        origin="here",
    )
    filled = fill(batch, 8)
    assert filled.ids.tolist() == [5, 6, 7, 0, 0, 0, 0, 0]
    assert filled.labels.tolist() == [6, IGNORE, 8, *[IGNORE] * 5]
    assert filled.lengths.tolist() == [2, 1, 2, 2, 1]
    assert filled.extras["temperature"].tolist() == [0.5, 0.5, 0.5, *[1.0] * 5]
    assert filled.extras["weight"].tolist() == [1.0, 2.0, 0.0, 0.0, 0.0]
    assert filled.origin == "here"
    assert fill(filled, 8) is filled


@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8),
    multiple=st.sampled_from([2, 8, 256]),
)
def test_fill_makes_pairs_no_longer_than_the_longest_of_either_side(lengths, multiple):
    """Their sum may want another multiple: then there are more of them, not longer ones (positions may end there)."""
    targets, sources = (torch.tensor(side) for side in zip(*lengths, strict=True))
    ids, read = torch.arange(int(targets.sum())), torch.arange(int(sources.sum()))
    batch = Batch(ids, ids, targets, source=Source(read, sources))
    filled = fill(batch, multiple)
    for tokens, own, before in ((filled.ids, filled.lengths, targets), (filled.source.ids, filled.source.lengths, sources)):
        assert len(tokens) % multiple == 0 and int(own.sum()) == len(tokens) and len(own) == len(filled.lengths)
        assert own.max() == before.max() and own.min() >= 1 and torch.equal(own[: len(before)], before)
    assert torch.equal(filled.ids[: len(ids)], ids) and torch.equal(filled.source.ids[: len(read)], read)
    assert (filled.labels[len(ids) :] == IGNORE).all()
