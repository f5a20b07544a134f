"""Collectives with gradients. Legend: N tokens, D width, R processes of a group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as td
from torch import Tensor

from athanor.nn.derivatives import first_only

# By their names from torch 2.13 on, or those of before.
_all_gather = getattr(td, "all_gather_single", None) or td.all_gather_into_tensor
_reduce_scatter = getattr(td, "reduce_scatter_single", None) or td.reduce_scatter_tensor


def _gathered(x: Tensor, group: td.ProcessGroup) -> Tensor:
    """(1, n, D) of each process -> (1, R n, D)."""
    x = x.contiguous()
    out = x.new_empty((x.shape[0], x.shape[1] * td.get_world_size(group), *x.shape[2:]))
    _all_gather(out[0], x[0], group=group)
    return out


def _scattered(x: Tensor, group: td.ProcessGroup) -> Tensor:
    """Sum over processes of (1, N, D), of which each gets its N / R tokens: (1, N / R, D)."""
    x = x.contiguous()
    out = x.new_empty((x.shape[0], x.shape[1] // td.get_world_size(group), *x.shape[2:]))
    _reduce_scatter(out[0], x[0], group=group)
    return out


def _own(x: Tensor, group: td.ProcessGroup) -> Tensor:
    """The tokens of (1, N, D) that are this process's: (1, N / R, D)."""
    return x.chunk(td.get_world_size(group), dim=1)[td.get_rank(group)].contiguous()


class _Function(torch.autograd.Function):
    """Two of the above, each the other's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: td.ProcessGroup, there: Any, back: Any) -> Tensor:
        ctx.group, ctx.back = group, back
        out: Tensor = there(x, group)
        return out

    @staticmethod
    @first_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(grads[0], ctx.group), None, None, None


def gather(x: Tensor, group: td.ProcessGroup) -> Tensor:
    """Tokens of all processes, for products that each of them computes a part of: (1, n, D) -> (1, R n, D)."""
    out: Tensor = _Function.apply(x, group, _gathered, _scattered)
    return out


def scatter(x: Tensor, group: td.ProcessGroup) -> Tensor:
    """The sum of what all processes computed, each getting its tokens: (1, N, D) -> (1, N / R, D)."""
    out: Tensor = _Function.apply(x, group, _scattered, _gathered)
    return out


def split(x: Tensor, group: td.ProcessGroup) -> Tensor:
    """A process's tokens of what all have in common: (1, N, D) -> (1, N / R, D)."""
    out: Tensor = _Function.apply(x, group, _own, _gathered)
    return out


def merge(x: Tensor, group: td.ProcessGroup) -> Tensor:
    """Tokens of all processes, for what each of them computes alike: (1, n, D) -> (1, R n, D)."""
    out: Tensor = _Function.apply(x, group, _gathered, _own)
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int], group: td.ProcessGroup) -> Tensor:
        ctx.args = sent, received, group
        out = x.new_empty((sum(received), *x.shape[1:]))
        td.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    @first_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sent, received, group = ctx.args
        out = grads[0].new_empty((sum(sent), *grads[0].shape[1:]))
        td.all_to_all_single(out, grads[0].contiguous(), sent, received, group=group)
        return out, None, None, None


def exchange(x: Tensor, sent: list[int], received: list[int], group: td.ProcessGroup) -> Tensor:
    """Rows to other processes and rows from them, in the order of the processes: `sent[r]` rows go to process r."""
    out: Tensor = _Exchange.apply(x, received, sent, group)
    return out
