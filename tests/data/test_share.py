"""Batches filled up, selected from and dealt out: nothing is lost, and what is added teaches nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from athanor.core.errors import DataError
from athanor.data.pack import fill, join, select, share
from athanor.types import IGNORE, Batch, Source

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def batch_of(sizes, sources=None, learned=None):
    n = sum(sizes)
    ids = torch.arange(1, n + 1)
    labels = ids + 1000
    if learned is not None:
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        labels = torch.where(torch.tensor(learned)[owner], labels, IGNORE)
    source = None if sources is None else Source(torch.arange(5000, 5000 + sum(sources)), torch.tensor(sources))
    extras = {"weight": torch.arange(n) / 7, "kind": torch.arange(len(sizes))} if n != len(sizes) else {}
    return Batch(ids, labels, torch.tensor(sizes), extras, "test", source)


def texts(batch):
    """Every sequence with all that belongs to it, as plain values."""
    ends = torch.cumsum(batch.lengths, 0).tolist()
    out = []
    for i, end in enumerate(ends):
        start = end - int(batch.lengths[i])
        row = [batch.ids[start:end].tolist(), batch.labels[start:end].tolist()]
        row += [v[start:end].tolist() if len(v) == len(batch.ids) else v[i].item() for v in batch.extras.values()]
        if batch.source is not None:
            last = int(torch.cumsum(batch.source.lengths, 0)[i])
            row.append(batch.source.ids[last - int(batch.source.lengths[i]) : last].tolist())
        out.append(row)
    return out


@given(lengths, st.integers(1, 16), st.data())
def test_fill_keeps_every_sequence_and_adds_none_that_is_longer_or_teaches(sizes, multiple, data):
    sources = data.draw(st.none() | st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    batch = batch_of(sizes, sources)
    full = fill(batch, multiple)
    assert len(full.ids) % multiple == 0 and int(full.lengths.sum()) == len(full.ids) == len(full.labels)
    assert int(full.lengths.min()) >= 1
    assert sources is not None or int(full.lengths.max()) == max(sizes)
    assert (full.labels[len(batch.ids) :] == IGNORE).all()
    if sources is not None:
        assert len(full.source.ids) % multiple == 0 and len(full.source.lengths) == len(full.lengths)
        assert int(full.source.lengths.min()) >= 1
    if len(full.ids) != len(full.lengths):  # else extras of tokens and of sequences cannot be told apart
        assert texts(full)[: len(sizes)] == texts(batch)


@given(lengths, st.data())
def test_select_takes_whole_sequences(sizes, data):
    chosen = data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=8))
    batch = batch_of(sizes, [n + 1 for n in sizes])
    part = select(batch, chosen)
    if len(part.ids) != len(part.lengths):
        assert texts(part) == [texts(batch)[i] for i in chosen]


@given(lengths, st.integers(1, 4), st.data())
def test_share_deals_out_every_sequence_once(sizes, ranks, data):
    learned = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    batch = batch_of(sizes, learned=learned)
    batch.extras.clear()
    if ranks > 1 and sum(learned) < ranks:
        with pytest.raises(
            DataError, match=f"has {sum(learned)} sequences with a target and must have one for each of the {ranks}"
        ):
            share(batch, ranks)
        return
    parts = share(batch, ranks)
    assert len(parts) == ranks
    assert sorted(text for part in parts for text in texts(part)) == sorted(texts(batch))
    if ranks > 1:
        assert all((p.labels != IGNORE).any() for p in parts)


def test_fill_with_sources_adds_as_many_of_both():
    full = fill(batch_of([100, 80], [30, 20]), 256)
    assert full.lengths.tolist() == [100, 80, *[11] * 6, 10] and full.source.lengths.tolist() == [30, 20, *[30] * 3, *[29] * 4]


def test_join_keeps_sources_beside_their_sequences():
    a, b = batch_of([2, 3], [1, 4]), batch_of([4], [2])
    assert texts(join([a, b])) == texts(a) + texts(b)
