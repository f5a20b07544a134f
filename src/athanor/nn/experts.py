"""The experts of a mixture (`moe.py`): feed-forward blocks that each compute the tokens of one slice.

Legend: N tokens, D width, E experts, F inner width of an expert, k experts of a token, S rows in the order of their experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athanor.nn import native
from athanor.nn.derivatives import first_only
from athanor.nn.feedforward import between, between_slope
from athanor.nn.linear import multiply, narrowed, pays
from athanor.nn.norms import compute_dtype

# On CPUs oneDNN prepares code for every number of rows that it meets in half precision, which costs more than the product:
# groups of tokens are filled up to a multiple of this.
_GRAIN = 16
# In float32, where experts.cpp does not compute, experts do it one after the other by oneDNN (`linear.py`) where a matrix has
# _LARGE entries or more and an expert _MEAN rows on average: smaller products take no longer in MKL. Slices are filled up to a
# multiple of _ROWS then.
_LARGE, _MEAN, _ROWS = 1 << 17, 16, 8


class _Places(NamedTuple):
    """Where tokens stand when each expert has a slice of S rows of its own.

    slot   (N, k), the row of each choice
    token  (S,), the token of each row; rows that fill a slice up repeat token 0
    ends   (E,) int32, where the slices end; rows after the last are of no expert
    used   the last of them, where there are such rows
    """

    slot: Tensor
    token: Tensor
    ends: Tensor
    used: int | None


def _places(experts: Tensor, n_experts: int, grain: int, whole: bool) -> _Places:
    device, k = experts.device, experts.shape[1]
    ordered, order = torch.sort(experts.flatten(), stable=True)
    ends = torch.searchsorted(ordered, torch.arange(n_experts, device=device), right=True, out_int32=True)
    size, used = len(order), None
    slot = torch.arange(size, device=device)
    if grain > 1:
        filled = (ends.diff(prepend=ends.new_zeros(1)) + (grain - 1)).div_(grain, rounding_mode="floor").mul_(grain).cumsum(0)
        shift = F.pad(filled - ends, (1, 0))  # by how much the slice of each expert, and what is of none, moves
        slot = slot + shift[ordered]
        size += int(shift[-1])
        ends = filled.int()
    if not whole:
        used = int(ends[-1])
    token = torch.zeros(size, dtype=torch.int64, device=device).scatter_(0, slot, order // k)
    return _Places(torch.empty_like(slot).scatter_(0, order, slot).view_as(experts), token, ends, used)


def _spans(ends: Tensor) -> Iterator[tuple[int, int]]:
    last = ends.tolist()
    return zip([0, *last[:-1]], last, strict=True)


def _grouped(dtype: torch.dtype, *widths: int) -> bool:
    """Whether `grouped_mm` takes matrices of such widths: it knows no float64, and wants strides of 16 bytes."""
    return dtype != torch.float64 and all(n * dtype.itemsize % 16 == 0 for n in widths)


def _outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """For each expert the product of its slices: (S, A), (S, B) -> (E, A, B)."""
    return F.grouped_mm(left.t(), right, offs=ends)


def _one(rows: Tensor, matrix: Tensor) -> Tensor:
    """(S, A), (A, B) -> (S, B)."""
    return multiply(rows, matrix.t(), _ROWS)


class _Inside(NamedTuple):
    """What experts make of their rows: y = product down^T, and product = active * second half of inner."""

    inner: Tensor  # (S, 2F), or (S, F) without a gate
    active: Tensor  # (S, F)
    product: Tensor  # (S, F), `active` itself without a gate
    y: Tensor  # (S, D)


# Rows (S, A) times the matrix (A, B) of their expert, or those (E, A, B) of all.
_Times = Callable[[Tensor, Tensor], Tensor]


def _inside(rows: Tensor, up: Tensor, down: Tensor, activation: str, times: _Times) -> _Inside:
    inner = times(rows, up.mT)
    active, product = between(inner, down.shape[-1], activation)
    return _Inside(inner, active, product, times(product, down.mT))


def _slope(d_y: Tensor, down: Tensor, kept: _Inside, activation: str, times: _Times) -> Tensor:
    """The gradient of `inner`."""
    return between_slope(times(d_y, down), kept.inner, kept.active, activation)


class _Made(NamedTuple):
    """What a mixture computes, and what its gradients need besides.

    spans  the slice of each expert where they compute one after the other, else None
    parts  what each of them made, or what they made together; of the whole `inner` alone where experts.cpp computed
    """

    out: Tensor
    rows: Tensor
    y: Tensor
    places: _Places
    spans: list[tuple[int, int]] | None
    parts: list[Tensor]


def _mixture(
    x: Tensor, up: Tensor, down: Tensor, experts: Tensor, weights: Tensor, activation: str, whole: bool, keep: bool
) -> _Made:
    """`_Mixture` without gradients; all tensors have the dtype of the products. `keep`: whether gradients will be asked for."""
    dtype, on_cpu = x.dtype, x.device.type == "cpu"
    ours = native.computes(x, up, down, experts.numel(), activation)
    faster = experts.numel() >= _MEAN * up.shape[0] and min(up[0].numel(), down[0].numel()) >= _LARGE and pays(x, dtype)
    grain = _ROWS if faster else _GRAIN if on_cpu and dtype in (torch.bfloat16, torch.float16) else 1
    places = _places(experts, up.shape[0], grain if keep or not ours else 1, whole)
    rows = x.index_select(0, places.token)
    apart = (faster or not _grouped(dtype, *up.shape[1:], down.shape[2])) and (keep or not ours)
    spans = list(_spans(places.ends)) if apart else None
    made: list[Tensor]
    if ours:
        inner, y = native.experts(rows, places.ends, up, down, activation, keep)
        made = [] if inner is None else [inner]
    elif spans is not None:
        parts = [_inside(rows[a:b], up[e], down[e], activation, _one) for e, (a, b) in enumerate(spans)]
        rest = len(rows) - spans[-1][1]
        y = torch.cat([part.y for part in parts] + [rows.new_zeros(rest, rows.shape[1])])
        made = [t for part in parts for t in part[:3]]
    else:
        part = _inside(rows, up, down, activation, partial(F.grouped_mm, offs=places.ends))
        y, made = part.y, list(part[:3])
    if places.used is not None:
        y[places.used :].zero_()
    out = F.embedding_bag(places.slot, y, mode="sum", per_sample_weights=weights)
    return _Made(out, rows, y, places, spans, made)


class _Mixture(torch.autograd.Function):
    """out[t] = sum over j of weights[t, j] down_e(act(gate_e x[t]) * up_e x[t]), e = experts[t, j], for a whole mixture at once.

    Tokens stand in the order of their experts, so that every expert reads and writes one slice; both ways between the two orders
    are gathers (`embedding_bag` gathers k rows and sums them in one pass), never scatters of sums. Experts compute their slices
    together, by C++ of our own where there is some (`native.py`) and `grouped_mm` elsewhere, or, where oneDNN is the faster one,
    one after the other: then what is between two products is small enough to stay in the cache, and nothing but the last product
    is ever put together.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (N, D)
        up: Tensor,  # (E, 2F, D), gates first, or (E, F, D)
        down: Tensor,  # (E, D, F)
        experts: Tensor,  # (N, k), E for what no expert computes
        weights: Tensor,  # (N, k)
        activation: str,
        whole: bool,  # whether no entry of `experts` is E
        dtype: torch.dtype,
    ) -> Tensor:
        x, up, down, weights = (t.to(dtype) for t in (x, up, down, weights))
        made = _mixture(x, up, down, experts, weights, activation, whole, keep=True)
        slot, token, ends, used = made.places
        ctx.save_for_backward(made.rows, made.y, up, down, weights, slot, token, ends, *made.parts)
        ctx.activation, ctx.used, ctx.spans = activation, used, made.spans
        return made.out

    @staticmethod
    @first_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, y, up, down, weights, slot, token, ends, *kept = ctx.saved_tensors
        if len(kept) == 1:
            each = _Inside(kept[0], *between(kept[0], down.shape[2], ctx.activation), y)
            parts = [each] if ctx.spans is None else [_Inside(*(t[a:b] for t in each)) for a, b in ctx.spans]
        else:
            parts = [_Inside(*three, y) for three in zip(kept[::3], kept[1::3], kept[2::3], strict=True)]
        need_x, need_up, need_down, _, need_weights = ctx.needs_input_grad[:5]
        d_y = grads[0].to(y.dtype).index_select(0, token)
        d_weights = (d_y * y).sum(-1)[slot] if need_weights else None
        # Rows that fill slices up have weight 0: they stay out of every gradient, as long as token 0 is finite.
        factors = weights.new_zeros(len(token)).scatter_(0, slot.flatten(), weights.flatten())
        d_y.mul_(factors.unsqueeze(1))
        d_x = d_up = d_down = None
        if ctx.spans is None:
            times = partial(F.grouped_mm, offs=ends)
            d_down = _outer(d_y, parts[0].product, ends) if need_down else None
            d_inner = _slope(d_y, down, parts[0], ctx.activation, times)
            d_up = _outer(d_inner, rows, ends) if need_up else None
            d_rows = times(d_inner, up) if need_x else None
            if d_rows is not None and ctx.used is not None:
                d_rows[ctx.used :].zero_()
        else:
            d_up, d_down = torch.empty_like(up) if need_up else None, torch.empty_like(down) if need_down else None
            d_rows = torch.zeros_like(rows) if need_x else None
            for e, ((a, b), part) in enumerate(zip(ctx.spans, parts, strict=True)):
                d_inner = _slope(d_y[a:b], down[e], part, ctx.activation, _one)
                if d_down is not None:
                    torch.mm(d_y[a:b].t(), part.product, out=d_down[e])
                if d_up is not None:
                    torch.mm(d_inner.t(), rows[a:b], out=d_up[e])
                if d_rows is not None:
                    d_rows[a:b] = _one(d_inner, up[e])
        d_x = F.embedding_bag(slot, d_rows, mode="sum") if d_rows is not None else None
        return d_x, d_up, d_down, None, d_weights, None, None, None


class Matrices(nn.Module):
    """`weight`: a matrix (rows, columns) for each of E experts."""

    def __init__(self, n_experts: int, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, rows, columns))
        nn.init.normal_(self.weight, std=columns**-0.5)


class Experts(nn.Module):
    """E feed-forward blocks without biases: down(activation(gate(x)) * up(x)), or down(activation(up(x))).

    `gate_up.weight` is (E, 2F, D), gate's rows first (`up.weight` (E, F, D) where there is no gate); `down.weight` is (E, D, F).

    Args:
        n_experts: E.
        dim: D.
        hidden: F.
        activation: by its Hugging Face name.
        gated: whether there is a gate.
    """

    def __init__(self, n_experts: int, dim: int, hidden: int, activation: str = "silu", gated: bool = True) -> None:
        super().__init__()
        self.n_experts, self.activation = n_experts, activation
        self.gate_up = Matrices(n_experts, 2 * hidden, dim) if gated else None
        self.up = None if gated else Matrices(n_experts, hidden, dim)
        self.down = Matrices(n_experts, dim, hidden)

    def steady(self, dtype: torch.dtype) -> bool:
        """Whether a token of few comes out the same to the last bit whatever tokens are computed with it, in a dtype."""
        weight = self.down.weight
        return weight.device.type == "cpu" and native.fits(weight.shape[1], weight.shape[2], self.activation, dtype)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor, whole: bool = True) -> Tensor:
        """x (N, D), experts (N, k), weights (N, k) -> (N, D): of each token the weighted sum of what its experts make of it.

        Where not `whole`, an entry E of `experts` stands for no expert.
        """
        up = self.gate_up or self.up
        assert up is not None
        dtype, given = compute_dtype(x), (x, up.weight, self.down.weight)
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in (*given, weights)):
            gate_up, down = (narrowed(p, dtype) for p in given[1:])
            return _mixture(x.to(dtype), gate_up, down, experts, weights.to(dtype), self.activation, whole, keep=False).out
        out: Tensor = _Mixture.apply(*given, experts, weights, self.activation, whole, dtype)
        return out
