"""Keys and values of generation in progress: a contiguous cache, a row per sequence, and the contexts that fill and read it.

Legend: R rows (sequences), G key/value heads, S positions, K key width, V value width, W width of a recurrent state, N tokens
laid end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from athanor.nn.context import Cell, Memory, Packed, Project, WithMemory
from athanor.nn.sdpa import PLAIN, Scoring, decode_attention, mask_of

_GRAIN = 64  # positions are added in multiples of this
# In bf16 positions are read in multiples of this, which divides _GRAIN: few shapes, for each of which oneDNN prepares code.
_SPAN = 16


class KV(NamedTuple):
    """What one attention layer keeps of a token: G keys of width K and G values of width V.

    With V = 0 no values are kept: they are the first entries of the keys (multi-head latent attention).
    """

    n_kv_heads: int
    key_dim: int
    value_dim: int


class State(NamedTuple):
    """What one recurrent layer keeps of a sequence: W numbers, however long it is."""

    width: int


Layer = KV | State


class Store:
    """Keys (R, G, S, K) and values (R, G, S, V) of each attention layer; grows in rows and positions as needed."""

    def __init__(self, layers: Sequence[KV | None], dtype: torch.dtype, device: torch.device) -> None:
        def empty(g: int, k: int) -> Tensor:
            return torch.zeros((0, g, 0, k), dtype=dtype, device=device)

        self.keys = [None if x is None else empty(x.n_kv_heads, x.key_dim) for x in layers]
        self.values = [None if x is None or x.value_dim == 0 else empty(x.n_kv_heads, x.value_dim) for x in layers]
        self._rows = self._positions = 0

    def reserve(self, rows: int, positions: int) -> None:
        r, s = self._rows, self._positions
        if rows <= r and positions <= s:
            return
        new_r = r if rows <= r else max(rows, min(2 * r, rows + 64))
        new_s = s if positions <= s else -(-positions // _GRAIN) * _GRAIN
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                if old is not None:
                    # Zeros: positions beyond a sequence's end are multiplied by probability 0, which must not meet a stray nan.
                    new = old.new_zeros((new_r, old.shape[1], new_s, old.shape[3]))
                    new[:r, :, :s] = old
                    tensors[i] = new
        self._rows, self._positions = new_r, new_s

    def copy_rows(self, source: Tensor, target: Tensor, positions: int) -> None:
        for x in (*self.keys, *self.values):
            if x is not None:
                x[target, :, :positions] = x[source, :, :positions]

    def write(self, layer: int, rows: Tensor, at: Tensor, key: Tensor, value: Tensor) -> None:
        """Entries (n, G, K) and (n, G, V) of layer `layer` at (row, position) pairs."""
        keys, values = self.keys[layer], self.values[layer]
        assert keys is not None
        keys[rows, :, at] = key.to(keys.dtype)
        if values is not None:
            values[rows, :, at] = value.to(values.dtype)

    def read(self, layer: int, rows: int, span: int, like: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
        """Keys (rows, G, span, K) and values (rows, G, span, V) in the dtype of `like`."""
        keys, values = self.keys[layer], self.values[layer]
        assert keys is not None
        key = keys[:rows, :, :span].to(like.dtype)
        return key, key[..., :value_dim] if values is None else values[:rows, :, :span].to(like.dtype)


class KVCache:
    """What a model keeps of the sequences it is generating, a row each; grows in rows and positions as needed.

    Args:
        layers: what each layer keeps.
        dtype: of the entries; recurrent states, which are read and written at every step, are float32.
        device: where they live.
        cross: what each decoder layer keeps of the memory, for encoder-decoders.
    """

    def __init__(
        self, layers: Sequence[Layer], dtype: torch.dtype, device: torch.device, cross: Sequence[KV] | None = None
    ) -> None:
        self.dtype, self.device = dtype, device
        self.own = Store([x if isinstance(x, KV) else None for x in layers], dtype, device)
        self.states = [torch.zeros((0, x.width), device=device) if isinstance(x, State) else None for x in layers]
        self.memory = None if cross is None else Store(cross, dtype, device)
        self.memory_lengths = torch.zeros(0, dtype=torch.int64, device=device)

    def reserve(self, rows: int, positions: int, memory: int = 0) -> None:
        """Make room for `rows` rows of `positions` positions (and `memory` of the memory); what is there stays."""
        self.own.reserve(rows, positions)
        have = len(self.memory_lengths)
        if rows > have:
            self.states = [x if x is None else torch.cat((x, x.new_zeros(rows - have, x.shape[1]))) for x in self.states]
            self.memory_lengths = torch.cat((self.memory_lengths, self.memory_lengths.new_ones(rows - have)))
        if self.memory is not None:
            self.memory.reserve(rows, memory)

    def copy_rows(self, source: Tensor, target: Tensor, positions: int) -> None:
        """Copy the first `positions` positions of rows `source` to rows `target`, and all else that rows hold."""
        self.own.copy_rows(source, target, positions)
        for state in self.states:
            if state is not None:
                state[target] = state[source]
        if self.memory is not None:
            self.memory.copy_rows(source, target, int(self.memory_lengths[source].max()))
            self.memory_lengths[target] = self.memory_lengths[source]


class Prefill(Packed):
    """Prompts laid end to end: packed causal attention, with keys, values and states kept in the cache.

    Args:
        cache: where to keep them; must have room.
        rows: (prompts,) row of each prompt.
        lengths: (prompts,) tokens of each prompt.
        memory: what the encoder made of the sources, laid end to end, for encoder-decoders.
    """

    cached = True

    def __init__(self, cache: KVCache, rows: Tensor, lengths: Tensor, memory: Memory | None = None) -> None:
        super().__init__(lengths)
        self._cache = cache
        self._targets = rows
        self._rows = torch.repeat_interleave(rows, lengths)  # (N,)
        if memory is not None:
            assert memory.lengths is not None
            self._reader = WithMemory(Packed(lengths), memory)
            step = [torch.arange(n, device=rows.device) for n in memory.lengths.tolist()]
            self._memory_at = torch.repeat_interleave(rows, memory.lengths), torch.cat(step)
            cache.memory_lengths[rows] = memory.lengths

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring = PLAIN) -> Tensor:
        self._cache.own.write(layer, self._rows, self.positions[0], key[0], value[0])
        return super().attend(layer, query, key, value, scoring)

    def cross(self, layer: int, query: Tensor, project: Project, scoring: Scoring = PLAIN) -> Tensor:
        def keep(hidden: Tensor) -> tuple[Tensor, Tensor]:
            key, value = project(hidden)
            assert self._cache.memory is not None
            self._cache.memory.write(layer, *self._memory_at, key[0], value[0])
            return key, value

        return self._reader.cross(layer, query, keep, scoring)

    def scan(self, layer: int, cell: Cell, x: Tensor) -> Tensor:
        out, state = self._scan(cell, x)
        states = self._cache.states[layer]
        assert states is not None
        states[self._targets] = state.to(states.dtype)
        return out


class Decode:
    """One new token for each of the first R rows of the cache.

    Args:
        cache: with room for the new positions.
        lengths: (R,) tokens of each row already in the cache; the new token's position.
    """

    cached = True

    def __init__(self, cache: KVCache, lengths: Tensor) -> None:
        self._cache = cache
        self._n = lengths.shape[0]
        self._at = torch.arange(self._n, device=lengths.device)
        self._lengths = lengths
        self._grain = _SPAN if cache.dtype == torch.bfloat16 else 1
        self.extent = int(lengths.max()) + 1
        self._span = self._rounded(self.extent)
        self.positions = lengths.unsqueeze(1)
        self._keys = torch.arange(self._span, device=lengths.device)
        self._masks: dict[int | None, Tensor] = {}
        if cache.memory is not None:
            memory = cache.memory_lengths[: self._n]
            self._memory_span = self._rounded(int(memory.max()))
            at = torch.arange(self._memory_span, device=lengths.device)
            self._memory_mask = mask_of(at < memory[:, None], torch.float32)

    def _rounded(self, n: int) -> int:
        return -(-n // self._grain) * self._grain

    def _mask(self, window: int | None) -> Tensor:
        if window not in self._masks:
            back = self._lengths[:, None] - self._keys  # (R, S)
            self._masks[window] = mask_of((back >= 0) if window is None else (back >= 0) & (back < window), torch.float32)
        return self._masks[window]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring = PLAIN) -> Tensor:
        store = self._cache.own
        store.write(layer, self._at, self._lengths, key[:, 0], value[:, 0])
        keys, values = store.read(layer, self._n, self._span, query, value.shape[3])
        bias = None if scoring.bias is None else scoring.bias(self.positions, self._keys)
        mask = self._mask(scoring.window)
        return decode_attention(query, keys, values, mask, bias=bias, scale=scoring.scale, softcap=scoring.softcap)

    def cross(self, layer: int, query: Tensor, project: Project, scoring: Scoring = PLAIN) -> Tensor:
        assert self._cache.memory is not None
        width = self._cache.memory.values[layer].shape[3]  # type: ignore[union-attr]  # kept whole, never in the keys
        keys, values = self._cache.memory.read(layer, self._n, self._memory_span, query, width)
        return decode_attention(query, keys, values, self._memory_mask, scale=scoring.scale, softcap=scoring.softcap)

    def scan(self, layer: int, cell: Cell, x: Tensor) -> Tensor:
        states = self._cache.states[layer]
        assert states is not None
        out, state = cell(x, None, states[: self._n].to(x.dtype))
        states[: self._n] = state.to(states.dtype)
        return out
