"""A context that keeps what every head looks at.

Legend: B batch, T time, S keys, H query heads, G key/value heads, K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from athanor.nn.context import Cell, Project, Sequences
from athanor.nn.sdpa import PLAIN, Scoring


class Watched:
    """A context of whole sequences that does what the one inside does, and keeps the probabilities of attention.

    What comes out of attention is P V, P the probabilities. So P is what the context inside gives for V = 1, whatever windows,
    caps, biases, masks and memories have a part in it; nothing of these is computed a second way.

    Args:
        inner: any context of whole sequences.

    Attributes:
        maps: by layer, the probabilities with which tokens look at tokens, (B, H, T, T).
        cross_maps: by layer, at the memory, (B, H, T, S).
    """

    cached = False

    def __init__(self, inner: Sequences) -> None:
        self._inner = inner
        self.positions, self.extent = inner.positions, inner.extent
        self.maps: dict[int, Tensor] = {}
        self.cross_maps: dict[int, Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring = PLAIN) -> Tensor:
        found = self._inner.attend(layer, query, key, _ones(key), scoring)
        self.maps[layer] = found.detach().transpose(1, 2)
        return self._inner.attend(layer, query, key, value, scoring)

    def cross(self, layer: int, query: Tensor, project: Project, scoring: Scoring = PLAIN) -> Tensor:
        def ones(memory: Tensor) -> tuple[Tensor, Tensor]:
            key, _ = project(memory)
            return key, _ones(key)

        self.cross_maps[layer] = self._inner.cross(layer, query, ones, scoring).detach().transpose(1, 2)
        return self._inner.cross(layer, query, project, scoring)

    def scan(self, layer: int, cell: Cell, x: Tensor) -> Tensor:
        return self._inner.scan(layer, cell, x)

    def spans(self) -> tuple[Tensor, Tensor]:
        return self._inner.spans()


def _ones(key: Tensor) -> Tensor:
    """The matrix 1 as values: (B, S, G, K) -> (B, S, G, S)."""
    b, s, g, _ = key.shape
    return torch.eye(s, dtype=key.dtype, device=key.device)[:, None].expand(b, s, g, s)
