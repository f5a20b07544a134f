"""Blocks along the diagonal compute what a mask does, forwards and backwards, in memory that grows with T."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from athanor.nn import banded, rectangle
from athanor.nn.context import Bidirectional, Packed, Padded
from athanor.nn.rectangle import Rectangle
from athanor.nn.sdpa import Scoring


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.found = max(self.found, x.untyped_storage().nbytes() // x.element_size())
        return out


def random_qkv(rows, time, heads, groups, width=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = ((heads, width), (groups, width), (groups, width + 1))
    return [torch.randn(rows, time, *s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


def result(cut, monkeypatch, qkv, window, hidden, landmarks, softcap=None):
    """Outputs and gradients; what comes out at hidden places means nothing."""
    rows, time = qkv[0].shape[:2]
    monkeypatch.setattr(rectangle, "pays", lambda window, time: cut)
    at = torch.arange(time)
    found = Rectangle(at, at, causal=False, hidden=hidden).attend(
        *qkv, Scoring(window=window, softcap=softcap, landmarks=landmarks)
    )
    if hidden is not None:
        found = found * ~hidden.expand(rows, -1)[..., None, None]
    direction = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(found.dtype)
    return found.detach(), *torch.autograd.grad(found, qkv, direction)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 3),
    time=st.integers(3, 150),
    window=st.integers(1, 40),
    grouped=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
    hides=st.booleans(),
    marks=st.sampled_from([None, 0.0, 0.1, 1.0]),
    seed=st.integers(0, 99),
)
def test_blocks_are_a_mask_with_their_gradients(rows, time, window, grouped, softcap, hides, marks, seed):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.rand(rows, time, generator=g) < 0.3 if hides else None
    landmarks = None if marks is None else torch.rand(rows, time, generator=g) < marks
    qkv = random_qkv(rows, time, 4, 2 if grouped else 4)
    with pytest.MonkeyPatch.context() as monkeypatch:
        both = [result(cut, monkeypatch, qkv, min(window, time - 1), hidden, landmarks, softcap) for cut in (True, False)]
    for found, expected in zip(*both, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_rows_share_what_is_hidden_from_all(monkeypatch):
    hidden = torch.arange(90).unsqueeze(0) >= 77
    qkv = random_qkv(3, 90, 2, 2)
    for found, expected in zip(*(result(c, monkeypatch, qkv, 5, hidden, None) for c in (True, False)), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("marked", [False, True])
def test_memory_grows_with_the_length_where_that_of_a_mask_grows_with_its_square(marked, monkeypatch):
    def largest(cut, time):
        landmarks = torch.arange(time).remainder(time // 2).expand(2, -1) == 0 if marked else None
        qkv = random_qkv(2, time, 2, 2, dtype=torch.float32)
        with Largest() as seen:
            result(cut, monkeypatch, qkv, 8, None, landmarks)
        return seen.found

    assert largest(True, 1024) == 2 * largest(True, 512)
    assert largest(False, 512) == 4 * largest(False, 256)  # and this is how it would be seen
    assert largest(True, 512) < largest(False, 512) / 8


@pytest.mark.parametrize("window", [1, 4, 32, 100, 256])
def test_rows_are_cut_from_a_length_on_and_then_always(window):
    first = next(t for t in range(1, 5000) if banded.pays(window, t))
    assert first == 2 * (banded.block_of(window) + 2 * window)
    assert not any(banded.pays(window, t) for t in range(1, first))
    assert all(banded.pays(window, t) for t in range(first, 3 * first))


def test_contexts_cut_long_rows_alone_and_only_within_a_window(monkeypatch):
    made = []

    class Seen(banded.Band):
        def __init__(self, *args):
            made.append(args[0])
            super().__init__(*args)

    monkeypatch.setattr(rectangle, "Band", Seen)

    def attend(ctx, time, **scoring):
        made.clear()
        qkv = [x.detach() for x in random_qkv(*ctx.positions.shape, 2, 2)]
        for layer in range(2):
            ctx.attend(layer, *qkv, Scoring(**scoring))
        return list(made)

    assert attend(Bidirectional(2, 200), 200, window=8) == [(2, 200)]  # one for both layers
    assert attend(Bidirectional(2, 200), 200) == []
    assert attend(Bidirectional(2, 40), 40, window=8) == []
    bias = torch.zeros(2, 200, 200, dtype=torch.float64)
    assert attend(Bidirectional(2, 200), 200, window=8, bias=lambda positions, keys: bias) == []
    assert attend(Padded(torch.ones(2, 200), causal=False), 200, window=8) == [(2, 200)]
    assert attend(Padded(torch.ones(2, 200), causal=True), 200, window=8) == []
    assert attend(Packed(torch.tensor([200, 7, 199]), causal=False), 406, window=8) == [(2, 208)]
