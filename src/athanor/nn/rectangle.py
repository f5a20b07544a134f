"""Who sees whom among rows of queries and keys of one length: what contexts are made of.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from athanor.nn.banded import Band, pays
from athanor.nn.sdpa import Scoring, attention, mask_of


class Rectangle:
    """Who sees whom among B rows of T queries and S keys; masks are made once and serve all layers.

    Args:
        positions: (T,) or (B, T) of the queries.
        keys: (S,) or (B, S) positions of the keys; the same object as `positions` where both are 0, 1, 2 and so on.
        causal: whether a key must not come after the query.
        hidden: (B, S) bool, keys that nobody sees; None for none.
        prefix: (B,), keys at positions below it are seen by all, causal or not.
    """

    def __init__(
        self, positions: Tensor, keys: Tensor, causal: bool, hidden: Tensor | None = None, prefix: Tensor | None = None
    ) -> None:
        self._positions, self._keys, self._causal, self._hidden, self._prefix = positions, keys, causal, hidden, prefix
        # With the landmarks whose id is in the key: an id is only good while its object lives.
        self._masks: dict[tuple[int | None, torch.dtype, int, bool], tuple[Tensor | None, Tensor | Band | None]] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """query (B, T, H, K), key (B, S, G, K), value (B, S, G, V) -> (B, T, H, V)."""
        bias = None if scoring.bias is None else scoring.bias(self._positions, self._keys)
        if bias is not None and bias.ndim == 3:
            bias = bias.unsqueeze(0)
        window = scoring.window
        if window is not None and window >= max(self._positions.shape[-1], self._keys.shape[-1]):
            window = None
        # The causal rule alone, where queries and keys are the same positions, needs no mask.
        same = self._positions is self._keys
        plain = same and self._causal and window is None and self._hidden is None and self._prefix is None
        cut = window is not None and same and not self._causal and bias is None and pays(window, query.shape[1])
        mask = None if plain else self._mask(window, query, None if window is None else scoring.landmarks, cut)
        if isinstance(mask, Band):
            return mask(query, key, value, scoring.scale, scoring.softcap)
        return attention(query, key, value, causal=plain, mask=mask, bias=bias, scale=scoring.scale, softcap=scoring.softcap)

    def _mask(self, window: int | None, query: Tensor, landmarks: Tensor | None, cut: bool) -> Tensor | Band | None:
        key = window, query.dtype, id(landmarks), cut
        if key not in self._masks:
            made: Tensor | Band | None
            if cut:
                assert window is not None
                made = Band((query.shape[0], query.shape[1]), window, self._hidden, landmarks, query.dtype, query.device)
            else:
                made = self._make_mask(window, query.dtype, landmarks)
            self._masks[key] = landmarks, made
        return self._masks[key][1]

    def _make_mask(self, window: int | None, dtype: torch.dtype, landmarks: Tensor | None) -> Tensor | None:
        if not self._causal and window is None and self._hidden is None:
            return None
        past = self._positions.unsqueeze(-1) - self._keys.unsqueeze(-2)  # (T, S) or (B, T, S): how far back a key lies
        visible = torch.ones_like(past, dtype=torch.bool)
        if self._causal:
            visible = past >= 0
            if self._prefix is not None:
                visible = visible | (self._keys < self._prefix[:, None])[:, None, :]
            if window is not None:
                visible = visible & (past < window)
        elif window is not None:
            visible = past.abs() <= window
            if landmarks is not None:
                visible = visible | landmarks[:, None, :]
        if self._hidden is not None:
            visible = visible & ~self._hidden[:, None, :]
        return mask_of(visible if visible.ndim == 3 else visible.unsqueeze(0), dtype)
