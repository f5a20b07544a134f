"""Tokens that see their whole sequence and are seen by it, however short the windows of the others are.

Longformer's global attention (Beltagy et al. 2020, section 3.1): the first token of what is to be classified, the question before
a document. Who they are is said around a context: `WithLandmarks(Packed(..), mask)`.

Legend: B batch, T time, S sequences, P landmarks of all, M most of a sequence, H query heads, G key/value heads, K key width,
V value width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from athanor.core.errors import DataError
from athanor.nn import spans
from athanor.nn.context import Cell, Project, Sequences
from athanor.nn.sdpa import PLAIN, Scoring, attention, mask_of


class WithLandmarks:
    """A context of an encoder some of whose tokens see, and are seen from, anywhere in their sequence.

    Args:
        inner: Bidirectional, Padded or Packed; not causal.
        landmarks: (B, T) bool or 0 and 1, laid out as the tokens are; padding is none whatever stands there.

    Attributes:
        places: (P,), where the landmarks stand among all B T tokens, in order.

    Raises:
        DataError: `landmarks` of another shape than the tokens.
    """

    cached = False

    def __init__(self, inner: Sequences, landmarks: Tensor) -> None:
        if landmarks.shape != inner.positions.shape:
            raise DataError(
                f"landmarks have the shape {tuple(landmarks.shape)} and the tokens {tuple(inner.positions.shape)}: say of each"
                " token whether it is one"
            )
        self._inner = inner
        self.positions, self.extent = inner.positions, inner.extent
        starts, lengths = inner.spans()
        places = landmarks.flatten().nonzero().squeeze(1)
        owner = torch.searchsorted(starts, places, right=True) - 1
        inside = (owner >= 0) & (places < (starts + lengths)[owner])
        self.places, owner = places[inside], owner[inside]
        self._landmarks = torch.zeros(landmarks.numel(), dtype=torch.bool, device=landmarks.device)
        self._landmarks[self.places] = True
        self._landmarks = self._landmarks.view(landmarks.shape)
        counts = torch.bincount(owner, minlength=len(starts))
        rank = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
        self._size = len(starts), int(counts.max()) if len(owner) else 0
        self._slots = owner * self._size[1] + rank  # (P,), where each stands among S rows of M
        self._index = torch.zeros(self._size[0] * self._size[1], dtype=torch.int64, device=places.device)
        self._index[self._slots] = torch.arange(len(owner), device=places.device)
        self._whole = len(starts) == landmarks.shape[0] and bool((lengths == landmarks.shape[1]).all())

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring = PLAIN) -> Tensor:
        return self._inner.attend(layer, query, key, value, replace(scoring, landmarks=self._landmarks))

    def survey(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        """What the landmarks see, each its whole sequence: query (P, H, K), key (B, T, G, K), value (B, T, G, V) -> (P, H, V)."""
        queries = query.index_select(0, self._index).view(*self._size, *query.shape[1:])
        mask = None
        if not self._whole:
            (key, lengths), (value, _) = spans.rows_of(key, self), spans.rows_of(value, self)
            seen = torch.arange(key.shape[1], device=key.device) < lengths[:, None]
            mask = mask_of(seen[:, None].expand(-1, self._size[1], -1), query.dtype)
        out = attention(queries, key, value, mask=mask, scale=scale)
        return out.flatten(0, 1).index_select(0, self._slots)

    def cross(self, layer: int, query: Tensor, project: Project, scoring: Scoring = PLAIN) -> Tensor:
        return self._inner.cross(layer, query, project, scoring)

    def scan(self, layer: int, cell: Cell, x: Tensor) -> Tensor:
        return self._inner.scan(layer, cell, x)

    def spans(self) -> tuple[Tensor, Tensor]:
        return self._inner.spans()


def first_tokens(ctx: Sequences) -> Tensor:
    """(B, T) bool: the first token of each sequence."""
    first = torch.zeros(ctx.positions.numel(), dtype=torch.bool, device=ctx.positions.device)
    first[spans.first(ctx)] = True
    return first.view(ctx.positions.shape)
