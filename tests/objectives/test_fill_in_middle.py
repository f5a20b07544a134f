"""Both forms of the paper, and that every text can be put together again."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from athanor.core.errors import ConfigError
from athanor.objectives import fill_in_middle, next_token
from athanor.objectives._pretraining import generator
from athanor.objectives._vocabulary import Vocabulary
from athanor.objectives.fill_in_middle import Config, prepare
from athanor.types import IGNORE, Batch

BOS, EOS, PREFIX, SUFFIX, MIDDLE = 1, 2, 3, 4, 5
V = Vocabulary(
    60,
    frozenset(range(8)),
    torch.ones(60).bool(),
    torch.zeros(60).bool(),
    bos=BOS,
    eos=EOS,
    sentinels=(PREFIX, SUFFIX, MIDDLE, 6),
)
PIECES = st.lists(
    st.tuples(st.booleans(), st.lists(st.integers(8, 59), min_size=1, max_size=20), st.booleans()), min_size=1, max_size=6
)


def batch_of(texts):
    ids = torch.tensor([id for text in texts for id in text])
    labels = torch.tensor([id for text in texts for id in (*text[1:], 50)])
    return Batch(ids, labels, torch.tensor([len(text) for text in texts]), origin="texts")


def pieces(batch):
    sizes = batch.lengths.tolist()
    return [(a.tolist(), b.tolist()) for a, b in zip(batch.ids.split(sizes), batch.labels.split(sizes), strict=True)]


def rebuilt(ids, spm):
    """Prefix, middle and suffix of ids that begin with the first mark."""
    assert [id for id in ids if id in (PREFIX, SUFFIX, MIDDLE)] == [PREFIX, SUFFIX, MIDDLE]
    a, b, c = (ids.index(mark) for mark in (PREFIX, SUFFIX, MIDDLE))
    assert a == 0
    before, suffix, after = ids[1:b], ids[b + 1 : c], ids[c + 1 :]
    assert not (spm and before)  # the suffix comes first, prefix and middle stand together
    return before + after + suffix


@given(PIECES, st.booleans(), st.integers(0, 2**32))
def test_every_text_can_be_put_together_again(texts, spm, seed):
    whole = [[BOS] * begins + text + [EOS] * ends for begins, text, ends in texts]
    batch = prepare(batch_of(whole), Config(rate=1.0, spm=float(spm)), V, torch.Generator().manual_seed(seed))
    for (begins, text, _), before, (ids, labels) in zip(texts, whole, pieces(batch), strict=True):
        assert labels[:-1] == ids[1:]
        if len(text) < 2:
            assert ids == before and labels[-1] == 50
            continue
        assert labels[-1] == EOS
        if begins:
            assert ids[0] == BOS
            ids = ids[1:]
        assert rebuilt(ids, spm) == text


@given(PIECES, st.integers(0, 2**32))
def test_at_rate_0_nothing_moves(texts, seed):
    batch = batch_of([text for _, text, _ in texts])
    made = prepare(batch, Config(rate=0.0), V, torch.Generator().manual_seed(seed))
    assert torch.equal(made.ids, batch.ids) and torch.equal(made.labels, batch.labels)


def test_the_rates_and_the_cuts():
    text = list(range(10, 20))
    made = pieces(prepare(batch_of([text] * 4000), Config(rate=0.4, spm=0.25), V, generator(0, 0, 0)))
    moved = [ids for ids, _ in made if PREFIX in ids]
    assert len(moved) / 4000 == pytest.approx(0.4, abs=0.03)
    # With an empty prefix and suffix the two forms are one.
    spm = [ids for ids in moved if ids[1] == SUFFIX and ids[2] != MIDDLE]
    psm = [ids for ids in moved if ids[1] != SUFFIX]
    assert len(spm) / (len(spm) + len(psm)) == pytest.approx(0.25 + 0.75 * 0.06, abs=0.09)
    firsts = torch.bincount(torch.tensor([ids.index(SUFFIX) - 1 for ids in psm]), minlength=11)
    seconds = torch.bincount(torch.tensor([10 - (ids.index(MIDDLE) - ids.index(SUFFIX) - 1) for ids in psm]), minlength=11)
    assert (firsts[1:] > 0).all() and (seconds[1:] > 0).all()


def test_masked_labels_are_not_learned_by_moving_them():
    batch = batch_of([list(range(10, 20))])
    batch.labels[3] = IGNORE
    made = prepare(batch, Config(rate=1.0), V, generator(0, 0, 0))
    assert torch.equal(made.labels, batch.labels)
    batch = batch_of([list(range(10, 20))])
    batch.labels[-1] = IGNORE  # the end of a document
    assert MIDDLE in prepare(batch, Config(rate=1.0), V, generator(0, 0, 0)).ids


def test_the_loss_is_that_of_next_tokens():
    assert fill_in_middle.loss is next_token.loss


def test_options_change_the_batch(noisy, rows):
    v = Vocabulary.of(noisy)
    made = [prepare(rows(), Config(**x), v, generator(0, 0, 0)) for x in ({}, {"rate": 1.0}, {"spm": 1.0})]
    assert len({tuple(batch.ids.tolist()) for batch in made}) == 3


@pytest.mark.parametrize(
    ("fields", "message"), [({"rate": 1.1}, "rate (1.1) must lie in [0, 1]"), ({"spm": -1.0}, "spm (-1.0) must lie in [0, 1]")]
)
def test_options_out_of_range(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config(**fields)
