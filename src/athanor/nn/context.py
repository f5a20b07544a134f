"""Attention contexts: what one call of a model may see, and where its keys and values live.

A model asks its context for positions and for attention; training on packed sequences, plain forward passes and cached
generation differ in the context and in nothing else.
Legend: B batch, T time, H query heads, G key/value heads, K head width, N tokens laid end to end, S sequences.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from athanor.nn.sdpa import causal_attention


class Context(Protocol):
    """What a model needs of a context."""

    positions: Tensor  # (B, T) int64: position of each token within its own sequence

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of one layer: query (B, T, H, K), key and value (B, T, G, K) -> (B, T, H, K)."""
        ...


class Causal:
    """B whole sequences of one length T: each position sees itself and what came before it."""

    def __init__(self, batch: int, time: int, device: torch.device | None = None) -> None:
        self.positions = torch.arange(time, device=device).expand(batch, time)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return causal_attention(query, key, value)


class _Gather(torch.autograd.Function):
    """Rows of x by `index`, where `inverse` says where each row of x went: both directions are gathers, never scatters of sums.

    Rows of the result that no row of x owns (padding) receive no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class _Ungather(torch.autograd.Function):
    """The inverse of `_Gather`: takes the rows at `inverse` back out; padding rows get a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.rows = x.shape[0]
        return x.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        grad = grads[0].new_zeros((ctx.rows, *grads[0].shape[1:]))
        return grad.index_copy_(0, inverse, grads[0]), None


class Packed:
    """S sequences of any lengths laid end to end as (1, N): no token sees another sequence (law L3).

    Attention gathers sequences of similar length into small rectangles and runs plain causal attention on each, which
    on CPUs is several times as fast as a document mask over the whole row. Everything else in the model runs on the N
    tokens, without padding.

    Args:
        lengths: (S,) tokens of each sequence, in order; they sum to N.
    """

    _WASTE = 1.5  # within a rectangle the longest sequence is at most this many times the shortest
    # Rectangles come in few sizes, since oneDNN prepares (and keeps) code for each: these are what sides are rounded up to.
    _LONG, _MANY = 16, 8

    def __init__(self, lengths: Tensor) -> None:
        device = lengths.device
        sizes = lengths.tolist()
        starts = torch.cumsum(lengths, 0) - lengths
        n = int(lengths.sum())
        self.positions = (torch.arange(n, device=device) - torch.repeat_interleave(starts, lengths)).unsqueeze(0)
        self._shape: tuple[int, int] | None = None
        self._groups: list[tuple[int, int, int]] = []  # (first row of the gathered tensor, sequences, padded length)
        if len(set(sizes)) == 1:
            self._shape = (len(sizes), sizes[0])
            return
        order = sorted(range(len(sizes)), key=sizes.__getitem__)
        index: list[Tensor] = []
        inverse = torch.empty(n, dtype=torch.int64, device=device)
        first = row = 0
        while first < len(order):
            last = first
            while last < len(order) and sizes[order[last]] <= self._WASTE * sizes[order[first]]:
                last += 1
            members = torch.tensor(order[first:last], device=device)
            longest = -(-sizes[order[last - 1]] // self._LONG) * self._LONG
            step = torch.arange(longest, device=device)
            inside = step < lengths[members, None]  # (members, longest)
            where = torch.where(inside, starts[members, None] + step, 0)
            slots = row + torch.arange(where.numel(), device=device).view_as(where)
            inverse[where[inside]] = slots[inside]
            count = last - first if last - first < self._MANY else -(-(last - first) // self._MANY) * self._MANY
            index.append(F.pad(where, (0, 0, 0, count - (last - first))).flatten())
            self._groups.append((row, count, longest))
            row += count * longest
            first = last
        self._index, self._inverse = torch.cat(index), inverse

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self._shape is not None:
            q, k, v = (x.reshape(*self._shape, *x.shape[2:]) for x in (query, key, value))
            return causal_attention(q, k, v).reshape(query.shape)
        q, k, v = (_Gather.apply(x[0], self._index, self._inverse) for x in (query, key, value))
        pieces = []
        for row, count, longest in self._groups:
            end = row + count * longest
            views = (x[row:end].view(count, longest, *x.shape[1:]) for x in (q, k, v))
            pieces.append(causal_attention(*views).reshape(count * longest, *q.shape[1:]))
        out: Tensor = _Ungather.apply(torch.cat(pieces), self._inverse)
        return out.unsqueeze(0)
