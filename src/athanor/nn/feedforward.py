"""Feed-forward blocks. Legend: D width, F inner width."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athanor.nn.derivatives import first_only
from athanor.nn.linear import Linear, multiply, outer, owns, unviewed
from athanor.nn.norms import compute_dtype

_aten = torch.ops.aten
# By the names of Hugging Face's `hidden_act` and its like.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


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


def between(inner: Tensor, width: int, activation: str) -> tuple[Tensor, Tensor]:
    """What stands between the two products of a block: `inner` (..., 2F), gates first, or (..., F) -> twice (..., F).

    The first is the activation, of the gates where there are any; the second is what the last product takes: the first times the
    other half, or the first itself.
    """
    active = ACTIVATIONS[activation](inner[..., :width])
    return active, active * inner[..., width:] if inner.shape[-1] > width else active


def between_slope(d_taken: Tensor, inner: Tensor, active: Tensor, activation: str) -> Tensor:
    """The gradient of `inner`, from that of what the last product takes (which is overwritten) and what `between` gave."""
    width, d_inner = active.shape[-1], torch.empty_like(inner)
    if inner.shape[-1] > width:
        torch.mul(d_taken, active, out=d_inner[..., width:])
        d_taken.mul_(inner[..., width:])
    _SLOPES[activation](d_taken, inner[..., :width], d_inner[..., :width])
    return d_inner


class _Second(torch.autograd.Function):
    """down(between(inner)): of the three tensors of inner width that the backward pass needs, `inner` alone is kept."""

    @staticmethod
    def forward(ctx: Any, inner: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        ctx.save_for_backward(inner, weight)
        ctx.activation, ctx.bias = activation, None if bias is None else bias.dtype
        taken = between(inner, weight.shape[1], activation)[1]
        return unviewed(taken, weight.to(inner.dtype), None if bias is None else bias.to(inner.dtype))

    @staticmethod
    @first_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inner, weight = ctx.saved_tensors
        need_inner, need_weight, need_bias = ctx.needs_input_grad[:3]
        rows, d_out = inner.view(-1, inner.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        active, taken = between(rows, weight.shape[1], ctx.activation)
        d_inner = d_weight = None
        if need_weight:
            d_weight = outer(d_out, taken).to(weight.dtype)
        del taken
        if need_inner:
            d_taken = multiply(d_out, weight.to(d_out.dtype).t())
            d_inner = between_slope(d_taken, rows, active, ctx.activation).view(inner.shape)
        return d_inner, d_weight, d_out.sum(0, dtype=ctx.bias) if need_bias else None, None


def _owned(layer: nn.Module) -> bool:
    """Whether the layer is no more than its weights, and these may be used without calling it."""
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    watched = any(getattr(layer, name) for name in hooks)
    return type(layer) is Linear and not watched and torch.is_grad_enabled() and owns(layer.weight)


class _Block(nn.Module):
    """What both have in common.

    recompute  whether what stands between the products is computed again in the backward pass instead of kept; no use where the
               whole block is (activation checkpointing)
    """

    down: Linear

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation, self.recompute = activation, True

    def second(self, inner: Tensor, width: int) -> Tensor:
        """What is made of the first product. `down` may have become another module, or be watched: then it is called."""
        down = self.down
        if self.recompute and _owned(down) and inner.dtype == compute_dtype(inner) and inner.is_contiguous():
            out: Tensor = _Second.apply(inner, down.weight, down.bias, self.activation)
            return out
        out = down(between(inner, width, self.activation)[1])
        return out


class GatedFeedForward(_Block):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020); gate and up are one matrix, gate's rows first."""

    def __init__(self, dim: int, hidden: int, activation: str = "silu", bias: bool = False) -> None:
        super().__init__(activation)
        self.gate_up = Linear(dim, 2 * hidden, bias=bias)
        self.down = Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        inner = self.gate_up(x)
        return self.second(inner, inner.shape[-1] // 2)


class FeedForward(_Block):
    """down(activation(up(x))) (Vaswani et al. 2017)."""

    def __init__(self, dim: int, hidden: int, activation: str = "gelu", bias: bool = True) -> None:
        super().__init__(activation)
        self.up = Linear(dim, hidden, bias=bias)
        self.down = Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        inner = self.up(x)
        return self.second(inner, inner.shape[-1])
