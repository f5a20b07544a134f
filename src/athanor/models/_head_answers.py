"""What heads are asked with and answer: segments of pairs, where texts end, what a decoder answers in, the best span, the
likeness of vectors.

Legend: B batch, T time, S sequences, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from athanor.core.errors import ConfigError, DataError
from athanor.nn import spans
from athanor.nn.context import Bidirectional, Causal, Memory, Packed, Padded, Sequences, WithMemory


def best_spans(
    logits: Tensor, ctx: Sequences, context: Tensor | None = None, max_length: int = 30
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of each sequence the answer (start, end) with the greatest start logit + end logit (Devlin et al. 2019, section 4.2).

    Args:
        logits: (B, T, 2) of a "question" head.
        ctx: they were computed in.
        context: (B, T) bool, tokens that an answer may begin and end with; all by default.
        max_length: most tokens of an answer, so start <= end < start + max_length.

    Returns:
        starts and ends (S,) as positions in their sequences, both inclusive, and the sums (S,).

    Raises:
        ConfigError: `max_length` below 1. DataError: `context` of another shape, or a sequence that has none.
    """
    if max_length < 1:
        raise ConfigError(f"max_length ({max_length}) must be at least 1: 30 is usual")
    allowed = torch.ones_like(ctx.positions, dtype=torch.bool) if context is None else context.bool()
    if allowed.shape != logits.shape[:2]:
        raise DataError(f"context has the shape {tuple(allowed.shape)} and the tokens {tuple(logits.shape[:2])}: say it of each")
    rows, lengths = spans.rows_of(logits.float(), ctx)
    step = torch.arange(rows.shape[1], device=rows.device)
    inside = spans.rows_of(allowed, ctx)[0] & (step < lengths[:, None])
    if not bool(inside.any(1).all()):
        raise DataError(f"sequence {int((~inside.any(1)).int().argmax())} has no context to answer from: leave it out")
    start, end = rows.masked_fill(~inside.unsqueeze(2), -torch.inf).unbind(2)  # (S, longest)
    ends = F.pad(end, (0, max_length - 1), value=-torch.inf).unfold(1, max_length, 1)  # (S, longest, max_length)
    scores, best = (start.unsqueeze(2) + ends).flatten(1).max(1)
    first = best // max_length
    return first, first + best % max_length, scores


def pair_segments(ids: Tensor, ctx: Sequences, separator: int) -> Tensor:
    """Segments of sequences "[CLS] a [SEP] b [SEP]": 0 up to the first separator, 1 after it: ids (B, T) -> (B, T) int64."""
    found = (ids.flatten() == separator).long()
    before = found.cumsum(0) - found
    owner, inside = owners(ctx)
    return ((before > before[spans.first(ctx)][owner]) & inside).long().view_as(ids)


def last_of_text(ids: Tensor, ctx: Sequences, pad: int | None) -> Tensor:
    """The place of each sequence's last token that is not `pad`, or of its first where all are: ids (B, T) -> (S,)."""
    if pad is None:
        return spans.last(ctx)
    rows, lengths = spans.rows_of(ids, ctx)
    step = torch.arange(rows.shape[1], device=ids.device)
    return spans.first(ctx) + torch.where((rows != pad) & (step < lengths[:, None]), step, 0).amax(1)


def owners(ctx: Sequences) -> tuple[Tensor, Tensor]:
    """Of each of B T places the sequence that it is in, or one near it, and whether it is in one: (B T,) int64, (B T,) bool."""
    starts, lengths = ctx.spans()
    place = torch.arange(ctx.positions.numel(), device=starts.device)
    owner = (torch.searchsorted(starts, place, right=True) - 1).clamp_(min=0)
    return owner, (place >= starts[owner]) & (place < (starts + lengths)[owner])


def answering(ctx: Sequences, encoded: Tensor) -> WithMemory:
    """The context of a decoder that answers each sequence of `ctx` with as many tokens."""
    if isinstance(ctx, Packed):
        return WithMemory(Packed(ctx.lengths), Memory(encoded, ctx.lengths))
    if isinstance(ctx, Bidirectional):
        return WithMemory(Causal(encoded.shape[0], encoded.shape[1], encoded.device), Memory(encoded))
    mask = owners(ctx)[1].view(ctx.positions.shape)
    return WithMemory(Padded(mask, causal=True), Memory(encoded, mask=mask))


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the angle between each of N vectors and each of M: (N, D), (M, D) -> (N, M)."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
