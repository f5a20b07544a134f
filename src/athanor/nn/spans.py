"""What was computed of tokens, sequence by sequence. Legend: B batch, T time, S sequences, D width."""

from __future__ import annotations

import torch
from torch import Tensor

from athanor.nn.context import Sequences


def first(ctx: Sequences) -> Tensor:
    """The place of each sequence's first token among all B T: (S,)."""
    return ctx.spans()[0]


def last(ctx: Sequences) -> Tensor:
    """The place of each sequence's last token among all B T: (S,)."""
    starts, lengths = ctx.spans()
    return starts + lengths - 1


def at(x: Tensor, places: Tensor) -> Tensor:
    """What stands at these places: (B, T, ..), (S,) -> (S, ..)."""
    return x.flatten(0, 1).index_select(0, places)


def rows_of(x: Tensor, ctx: Sequences) -> tuple[Tensor, Tensor]:
    """Each sequence as a row that begins at the left: (B, T, ..) -> (S, longest, ..), lengths (S,).

    What stands after a sequence's end is arbitrary.
    """
    starts, lengths = ctx.spans()
    step = torch.arange(int(lengths.max()), device=x.device)
    places = torch.where(step < lengths[:, None], starts[:, None] + step, 0)
    return at(x, places.flatten()).view(*places.shape, *x.shape[2:]), lengths


def mean(x: Tensor, ctx: Sequences) -> Tensor:
    """The mean over each sequence's tokens: (B, T, D) -> (S, D)."""
    rows, lengths = rows_of(x, ctx)
    inside = torch.arange(rows.shape[1], device=x.device) < lengths[:, None]
    return torch.where(inside.unsqueeze(2), rows, 0.0).sum(1) / lengths[:, None]
