"""The experts of a mixture (`moe.py`): feed-forward blocks that each compute the tokens of one slice.

Legend: N tokens, D width, E experts, F inner width of an expert, k experts of a token, S rows in the order of their experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athanor.nn.feedforward import ACTIVATIONS
from athanor.nn.norms import compute_dtype

_aten = torch.ops.aten
_tanh = {"approximate": "tanh"}
# Of an activation: into `out` the gradient before it, from the gradient after it and what it was applied to.
_SLOPES: dict[str, Callable[..., Tensor]] = {
    "silu": lambda grad, x, out: _aten.silu_backward(grad, x, grad_input=out),
    "swish": lambda grad, x, out: _aten.silu_backward(grad, x, grad_input=out),
    "relu": lambda grad, x, out: _aten.threshold_backward(grad, x, 0, grad_input=out),
    "gelu": lambda grad, x, out: _aten.gelu_backward(grad, x, grad_input=out),
    "gelu_new": lambda grad, x, out: _aten.gelu_backward(grad, x, grad_input=out, **_tanh),
    "gelu_pytorch_tanh": lambda grad, x, out: _aten.gelu_backward(grad, x, grad_input=out, **_tanh),
}
# On CPUs oneDNN prepares code for every number of rows that it meets in half precision, which costs more than the product:
# groups of tokens are filled up to a multiple of this.
_GRAIN = 16


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


def _grouped(rows: Tensor, width: int) -> bool:
    """Whether `grouped_mm` takes such rows and matrices of such a width: it knows no float64, and wants strides of 16 bytes."""
    return rows.dtype != torch.float64 and all(n * rows.element_size() % 16 == 0 for n in (rows.shape[1], width))


def _times(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each slice of rows times the matrix of its expert: (S, A), (E, A, B) -> (S, B); rows after the last end are not set."""
    if not _grouped(rows, weight.shape[2]):
        out = rows.new_empty(rows.shape[0], weight.shape[2])
        for i, (a, b) in enumerate(_spans(ends)):
            torch.mm(rows[a:b], weight[i], out=out[a:b])
        return out
    return F.grouped_mm(rows, weight, offs=ends)


def _outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """For each expert the product of its slices: (S, A), (S, B) -> (E, A, B)."""
    if not _grouped(left, right.shape[1]):
        return torch.stack([left[a:b].t() @ right[a:b] for a, b in _spans(ends)])
    return F.grouped_mm(left.t(), right, offs=ends)


def _spans(ends: Tensor) -> Iterator[tuple[int, int]]:
    last = ends.tolist()
    return zip([0, *last[:-1]], last, strict=True)


class _Mixture(torch.autograd.Function):
    """out[t] = sum over j of weights[t, j] down_e(act(gate_e x[t]) * up_e x[t]), e = experts[t, j], for a whole mixture at once.

    Tokens stand in the order of their experts, so that every expert reads and writes one slice; both ways between the two orders
    are gathers (`embedding_bag` gathers k rows and sums them in one pass), never scatters of sums.
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
        filled = x.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)
        places = _places(experts, up.shape[0], _GRAIN if filled else 1, whole)
        slot, token, ends, used = places
        up, down, weights = up.to(dtype), down.to(dtype), weights.to(dtype)
        rows = x.to(dtype).index_select(0, token)
        inner = _times(rows, up.transpose(1, 2), ends)
        width = down.shape[2]
        gated = inner.shape[1] > width
        active = ACTIVATIONS[activation](inner[:, :width])
        product = active * inner[:, width:] if gated else active
        y = _times(product, down.transpose(1, 2), ends)
        if used is not None:
            y[used:].zero_()
        ctx.save_for_backward(rows, inner, active, product if gated else None, y, up, down, weights, slot, token, ends)
        ctx.activation, ctx.used = activation, used
        return F.embedding_bag(slot, y, mode="sum", per_sample_weights=weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, active, product, y, up, down, weights, slot, token, ends = ctx.saved_tensors
        width = down.shape[2]
        d_y = grads[0].to(y.dtype).index_select(0, token)
        d_weights = (d_y * y).sum(-1)[slot] if ctx.needs_input_grad[4] else None
        # Rows that fill slices up have weight 0: they stay out of every gradient.
        factors = weights.new_zeros(len(token)).scatter_(0, slot.flatten(), weights.flatten())
        d_y.mul_(factors.unsqueeze(1))
        d_down = _outer(d_y, active if product is None else product, ends) if ctx.needs_input_grad[2] else None
        d_product = _times(d_y, down, ends)
        d_inner = torch.empty_like(inner)
        if product is not None:
            torch.mul(d_product, active, out=d_inner[:, width:])
            d_product.mul_(inner[:, width:])
        _SLOPES[ctx.activation](d_product, inner[:, :width], d_inner[:, :width])
        d_up = _outer(d_inner, rows, ends) if ctx.needs_input_grad[1] else None
        d_x = None
        if ctx.needs_input_grad[0]:
            d_rows = _times(d_inner, up, ends)
            if ctx.used is not None:
                d_rows[ctx.used :].zero_()
            d_x = F.embedding_bag(slot, d_rows, mode="sum")
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

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor, whole: bool = True) -> Tensor:
        """x (N, D), experts (N, k), weights (N, k) -> (N, D): of each token the weighted sum of what its experts make of it.

        Where not `whole`, an entry E of `experts` stands for no expert.
        """
        up = self.gate_up or self.up
        assert up is not None
        dtype = compute_dtype(x)
        out: Tensor = _Mixture.apply(x, up.weight, self.down.weight, experts, weights, self.activation, whole, dtype)
        return out
