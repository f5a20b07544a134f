"""Keys and values of generation in progress: a contiguous cache, one row per sequence, and the contexts that fill and read it.

Legend: L layers, R rows (sequences), G key/value heads, S positions, K head width, N tokens laid end to end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from athanor.nn.context import Packed
from athanor.nn.sdpa import decode_attention

_GRAIN = 64  # positions are added in multiples of this
# In bf16 positions are read in multiples of this, which divides _GRAIN: few shapes, for each of which oneDNN prepares code.
_SPAN = 16


class KVCache:
    """Keys and values, (L, R, G, S, K) each; grows in rows and positions as needed.

    Args:
        n_layers: L.
        n_kv_heads: G.
        head_dim: K.
        dtype: of the entries.
        device: where they live.
    """

    def __init__(self, n_layers: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (n_layers, 0, n_kv_heads, 0, head_dim)
        self.keys, self.values = torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)

    def reserve(self, rows: int, positions: int) -> None:
        """Make room for `rows` rows of `positions` positions; what is there stays."""
        n_layers, r, g, s, k = self.keys.shape
        if rows <= r and positions <= s:
            return
        new_r = r if rows <= r else max(rows, min(2 * r, rows + 64))
        new_s = s if positions <= s else max(-(-positions // _GRAIN) * _GRAIN, s)
        for name in ("keys", "values"):
            old = getattr(self, name)
            # Zeros: positions beyond a sequence's end are multiplied by probability 0, which must not meet a stray nan.
            new = old.new_zeros((n_layers, new_r, g, new_s, k))
            new[:, :r, :, :s] = old
            setattr(self, name, new)

    def copy_rows(self, source: Tensor, target: Tensor, positions: int) -> None:
        """Copy the first `positions` positions of rows `source` to rows `target`."""
        for x in (self.keys, self.values):
            x[:, target, :, :positions] = x[:, source, :, :positions]


class Prefill(Packed):
    """Prompts laid end to end: packed attention, with keys and values kept in the cache.

    Args:
        cache: where to keep them; must have room.
        rows: (prompts,) row of each prompt.
        lengths: (prompts,) tokens of each prompt.
    """

    def __init__(self, cache: KVCache, rows: Tensor, lengths: Tensor) -> None:
        super().__init__(lengths)
        self._cache = cache
        self._rows = torch.repeat_interleave(rows, lengths)  # (N,)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        at = self.positions[0]
        self._cache.keys[layer][self._rows, :, at] = key[0].to(self._cache.keys.dtype)
        self._cache.values[layer][self._rows, :, at] = value[0].to(self._cache.values.dtype)
        return super().attend(layer, query, key, value)


class Decode:
    """One new token for each of the first R rows of the cache.

    Args:
        cache: with room for the new positions.
        lengths: (R,) tokens of each row already in the cache; the new token's position.
    """

    def __init__(self, cache: KVCache, lengths: Tensor) -> None:
        self._cache = cache
        self._n = lengths.shape[0]
        self._at = torch.arange(self._n, device=lengths.device)
        self._lengths = lengths
        grain = _SPAN if cache.keys.dtype == torch.bfloat16 else 1
        self._span = -(-(int(lengths.max()) + 1) // grain) * grain
        self.positions = lengths.unsqueeze(1)
        hidden = torch.arange(self._span, device=lengths.device) > lengths.unsqueeze(1)  # (R, S)
        mask = torch.zeros(hidden.shape, device=lengths.device).masked_fill_(hidden, -torch.inf)
        self._mask = mask[:, None, None, :]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys[self._at, :, self._lengths] = key[:, 0].to(keys.dtype)
        values[self._at, :, self._lengths] = value[:, 0].to(values.dtype)
        n, span = self._n, self._span
        return decode_attention(query, keys[:n, :, :span].to(query.dtype), values[:n, :, :span].to(query.dtype), self._mask)
