"""Relative positions as biases of the scores. Legend: H heads, T queries, S keys, B batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from athanor.nn.sdpa import Bias


def buckets(distance: Tensor, n_buckets: int, max_distance: int, both_sides: bool) -> Tensor:
    """T5's bucket of each distance (key position - query position), in [0, n_buckets).

    Half of the buckets (of each side's) hold one distance each, the others grow logarithmically up to `max_distance`; all
    beyond share the last (Raffel et al. 2020, section 2.1). Without `both_sides` keys in the future count as distance 0.
    """
    first = torch.zeros_like(distance)
    if both_sides:
        n_buckets //= 2
        first = (distance > 0) * n_buckets
        far = distance.abs()
    else:
        far = (-distance).clamp(min=0)
    exact = n_buckets // 2
    grown = torch.log(far.float().clamp(min=1) / exact) / math.log(max_distance / exact) * (n_buckets - exact)
    large = (exact + grown.long()).clamp(max=n_buckets - 1)
    return first + torch.where(far < exact, far, large)


class RelativeBias(nn.Module):
    """A bias of the scores for each head and bucket of distances, shared by all layers of a stack.

    Args:
        n_buckets: rows of the table.
        n_heads: H.
        max_distance: from which on distances share the last bucket.
        both_sides: whether keys may lie in the future.
    """

    def __init__(self, n_buckets: int, n_heads: int, max_distance: int, both_sides: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_buckets, n_heads))
        self.max_distance, self.both_sides = max_distance, both_sides

    def for_call(self) -> Bias:
        """The bias for all layers of one forward pass: each shape is computed once."""
        made: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

        def bias(positions: Tensor, keys: Tensor) -> Tensor:
            key = id(positions), id(keys)
            if key not in made:  # the positions are kept: an id is only good while its object lives
                made[key] = positions, keys, self(positions, keys)
            return made[key][2]

        return bias

    def forward(self, positions: Tensor, keys: Tensor) -> Tensor:
        """Positions of queries (T,) or (B, T) and of keys (S,) or (B, S) -> (H, T, S) or (B, H, T, S)."""
        if positions.ndim == 1 and keys.ndim == 1 and len(positions) > 1:
            return self._of_steps(positions, keys)
        distance = keys.unsqueeze(-2) - positions.unsqueeze(-1)
        return self._values(distance).movedim(-1, -3)

    def _values(self, distance: Tensor) -> Tensor:
        return self.weight[buckets(distance, len(self.weight), self.max_distance, self.both_sides)]

    def _of_steps(self, positions: Tensor, keys: Tensor) -> Tensor:
        """For steps of one: along each diagonal the bias is the same, so T + S - 1 rows of the table are looked up, not T S."""
        t, s = len(positions), len(keys)
        distance = torch.arange(1 - t, s, device=keys.device) + (keys[0] - positions[0])
        by_distance = self._values(distance).t().contiguous()  # (H, T + S - 1)
        return by_distance.unfold(1, s, 1).flip(1)
