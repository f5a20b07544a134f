"""Tokens that see and are seen by all of their sequence: packed, padded and alone are the same, and equal to a loop."""

import re

import pytest
import torch

from athanor.core.errors import DataError
from athanor.nn.context import Bidirectional, Packed, Padded
from athanor.nn.landmarks import WithLandmarks, first_tokens
from athanor.nn.sdpa import Scoring

H, K = 2, 4


def random_(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(ctx, qkv, far, window):
    """What tokens see in a window, with what landmarks see written over it."""
    out = ctx.attend(0, *qkv, Scoring(window=window)).flatten(0, 1)
    query = far[0].flatten(0, 1)[ctx.places]
    return out.index_copy(0, ctx.places, ctx.survey(query, *far[1:]))


def loop(qkv, far, marks, window):
    """The same of one sequence (T, H, K), query by query."""
    rows = []
    for i, mark in enumerate(marks.tolist()):
        query, key, value = far if mark else qkv
        seen = [j for j in range(len(marks)) if mark or marks[j] or abs(i - j) <= window]
        probs = torch.softmax(torch.einsum("hk,shk->hs", query[i], key[seen]) / K**0.5, -1)
        rows.append(torch.einsum("hs,shk->hk", probs, value[seen]))
    return torch.stack(rows)


@pytest.mark.parametrize("lengths", [(7, 1, 12, 90, 12), (9, 9, 9), (80, 80), (100,)])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.4])
def test_every_context_sees_what_a_loop_sees(lengths, share):
    n, window = sum(lengths), 3
    qkv, far = [random_(n, H, K, seed=s) for s in range(3)], [random_(n, H, K, seed=s) for s in range(3, 6)]
    marks = torch.rand(n, generator=torch.Generator().manual_seed(9)) < share
    parts = [(x.split(list(lengths))) for x in (*qkv, *far, marks)]
    expected = torch.cat([loop(part[:3], part[3:6], part[6], window) for part in zip(*parts, strict=True)])
    packed = WithLandmarks(Packed(torch.tensor(lengths), causal=False), marks.unsqueeze(0))
    found = both(packed, [x.unsqueeze(0) for x in qkv], [x.unsqueeze(0) for x in far], window)
    torch.testing.assert_close(found, expected)
    longest = max(lengths)
    for left in (False, True):
        mask = torch.zeros(len(lengths), longest, dtype=torch.bool)
        for row, length in enumerate(lengths):
            mask[row, slice(longest - length, None) if left else slice(None, length)] = True
        spread = [random_(len(lengths), longest, H, K, seed=7) for _ in range(6)]
        laid = torch.ones_like(mask)  # padding is no landmark even where it is said to be one
        laid[mask] = marks
        for x, flat in zip(spread, (*qkv, *far), strict=True):
            x[mask] = flat
        padded = WithLandmarks(Padded(mask, causal=False), laid)
        torch.testing.assert_close(both(padded, spread[:3], spread[3:], window)[mask.flatten()], expected)
    if len(set(lengths)) == 1:
        shape = (len(lengths), longest)
        rows = WithLandmarks(Bidirectional(*shape), marks.view(shape))
        laid = [x.view(*shape, H, K) for x in (*qkv, *far)]
        torch.testing.assert_close(both(rows, laid[:3], laid[3:], window), expected)


def test_a_context_serves_other_landmarks_after_the_first():
    for inner in (Bidirectional(2, 9), Packed(torch.tensor([9, 9]), causal=False), Packed(torch.tensor([4, 14]), causal=False)):
        qkv = [random_(*inner.positions.shape, H, K, seed=s) for s in range(3)]
        for seed in range(20):
            marks = torch.rand(inner.positions.shape, generator=torch.Generator().manual_seed(seed)) < 0.2
            fresh = type(inner)(inner.lengths, False) if isinstance(inner, Packed) else type(inner)(2, 9)
            found, expected = (WithLandmarks(c, marks).attend(0, *qkv, Scoring(window=2)) for c in (inner, fresh))
            assert torch.equal(found, expected)
            del marks  # so that the next may have its id


def test_first_tokens_and_places():
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    assert first_tokens(Padded(mask, causal=False)).int().tolist() == [[0, 1, 0], [1, 0, 0]]
    packed = Packed(torch.tensor([2, 1, 3]), causal=False)
    assert first_tokens(packed).int().tolist() == [[1, 0, 1, 1, 0, 0]]
    assert WithLandmarks(packed, first_tokens(packed)).places.tolist() == [0, 2, 3]
    assert WithLandmarks(Padded(mask, causal=False), torch.ones(2, 3)).places.tolist() == [1, 2, 3, 4]


def test_the_rest_is_the_context_within():
    inner = Padded(torch.tensor([[0, 1, 1], [1, 1, 0]]), causal=False)
    ctx = WithLandmarks(inner, torch.zeros(2, 3))
    assert torch.equal(ctx.positions, inner.positions) and ctx.extent == inner.extent and not ctx.cached
    assert [x.tolist() for x in ctx.spans()] == [[1, 3], [2, 2]]
    x = random_(2, 3, 4)

    def cell(x, lengths, state):
        return x.cumsum(1), x[:, -1]

    assert torch.equal(ctx.scan(0, cell, x), inner.scan(0, cell, x))
    with pytest.raises(AssertionError, match="this context has no memory"):
        ctx.cross(0, x, lambda x: (x, x))


def test_landmarks_of_another_shape_are_refused():
    message = "landmarks have the shape (2, 4) and the tokens (2, 3): say of each token whether it is one"
    with pytest.raises(DataError, match="^" + re.escape(message) + "$"):
        WithLandmarks(Bidirectional(2, 3), torch.zeros(2, 4))
