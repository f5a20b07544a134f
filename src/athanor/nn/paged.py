"""A paged cache: keys and values in blocks of a pool, and the context that reads and writes them (Kwon et al. 2023).

A sequence owns a list of blocks, not a row: memory is handed out as sequences grow, two sequences may share the blocks of a
common beginning, and whoever manages blocks (the engine) moves no data. One context serves whole prompts, parts of prompts that
follow what is cached already, and single new tokens.

Legend: P blocks of the pool, Z positions of a block, S sequences, N new tokens laid end to end, G key/value heads, K, V key and
value width, W width of a recurrent state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from athanor.nn.cache import KV, Layer, State
from athanor.nn.context import Cell, Project, from_rows, to_rows
from athanor.nn.rectangle import Rectangle
from athanor.nn.sdpa import PLAIN, Scoring, decode_attention, mask_of


class PagedCache:
    """The pool. Keys are (P, G, Z, K) and values (P, G, Z, V) for each layer; recurrent states have a slot for each sequence.

    Args:
        layers: what each layer keeps.
        blocks: P.
        size: Z.
        slots: sequences with a recurrent state at once.
        dtype: of keys and values; states are float32.
        device: where it lives.
    """

    def __init__(
        self, layers: Sequence[Layer], blocks: int, size: int, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        def pool(layer: Layer, width: str) -> Tensor | None:
            if not isinstance(layer, KV) or not getattr(layer, width):
                return None
            return torch.zeros((blocks, layer.n_kv_heads, size, getattr(layer, width)), dtype=dtype, device=device)

        self.size, self.dtype = size, dtype
        self.keys = [pool(layer, "key_dim") for layer in layers]
        self.values = [pool(layer, "value_dim") for layer in layers]
        self.states = [torch.zeros((slots, x.width), device=device) if isinstance(x, State) else None for x in layers]

    def bytes_per_block(self) -> int:
        """Memory of one block in all layers."""
        return sum(x[0].nbytes for x in (*self.keys, *self.values) if x is not None)


class Paged:
    """New tokens of S sequences laid end to end as (1, N), each after what the cache already holds of its sequence.

    Args:
        cache: the pool.
        tables: (S, blocks) int64, the blocks of each sequence in order, enough for all its positions; what stands after these
            is not read.
        starts: (S,) tokens of each sequence that are in the cache.
        lengths: (S,) new tokens of each sequence, at least one.
        slots: (S,) slot of each sequence's recurrent state; only for models that have one.
    """

    cached = True

    def __init__(self, cache: PagedCache, tables: Tensor, starts: Tensor, lengths: Tensor, slots: Tensor | None = None) -> None:
        device = lengths.device
        self._cache, self._starts, self._lengths, self._slots = cache, starts, lengths, slots
        before = torch.repeat_interleave(lengths.cumsum(0) - lengths - starts, lengths)
        at = torch.arange(int(lengths.sum()), device=device) - before  # (N,) positions
        self.positions = at.unsqueeze(0)
        self.extent = int((starts + lengths).max())
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
        self._block, self._offset = tables[owner, at // cache.size], at % cache.size
        used = -(-self.extent // cache.size)
        self._tables = tables[:, :used]
        keys = torch.arange(used * cache.size, device=device)
        self._single = int(lengths.max()) == 1
        if self._single:
            self._keys, self._back = keys, starts[:, None] - keys
            self._masks: dict[int | None, Tensor] = {}
        else:
            rows = starts[:, None] + torch.arange(int(lengths.max()), device=device)
            # What lies beyond a sequence's end comes after all its queries, so the causal rule hides it.
            self._rectangle = Rectangle(rows, keys.expand(len(lengths), -1), causal=True)

    def _gather(self, pool: Tensor, like: Tensor) -> Tensor:
        """The blocks of all sequences, (S, G, positions, K)."""
        found = pool[self._tables].transpose(1, 2)  # (S, G, blocks, Z, K)
        return found.reshape(*found.shape[:2], -1, found.shape[4]).to(like.dtype)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring = PLAIN) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        assert keys is not None
        keys[self._block, :, self._offset] = key[0].to(keys.dtype)
        if values is not None:
            values[self._block, :, self._offset] = value[0].to(values.dtype)
        key = self._gather(keys, query)
        value = key[..., : value.shape[3]] if values is None else self._gather(values, query)
        if self._single:
            return self._decode(query.transpose(0, 1), key, value, scoring).transpose(0, 1)
        rows = to_rows(query[0], self._lengths)
        out = self._rectangle.attend(rows, key.transpose(1, 2), value.transpose(1, 2), scoring)
        return from_rows(out, self._lengths).unsqueeze(0)

    def _decode(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        window = scoring.window
        if window not in self._masks:
            visible = (self._back >= 0) if window is None else (self._back >= 0) & (self._back < window)
            self._masks[window] = mask_of(visible, torch.float32)
        bias = None if scoring.bias is None else scoring.bias(self._starts[:, None], self._keys)
        return decode_attention(
            query, key, value, self._masks[window], bias=bias, scale=scoring.scale, softcap=scoring.softcap
        )  # fmt: skip

    def cross(self, layer: int, query: Tensor, project: Project, scoring: Scoring = PLAIN) -> Tensor:
        raise AssertionError("memories of encoder-decoders live in a contiguous cache: use Prefill and Decode")

    def scan(self, layer: int, cell: Cell, x: Tensor) -> Tensor:
        states = self._cache.states[layer]
        assert states is not None and self._slots is not None
        # A slot is as its last sequence left it: what starts at 0 starts from zeros.
        state = states[self._slots] * (self._starts > 0)[:, None]
        out, state = cell(to_rows(x[0], self._lengths), self._lengths, state.to(x.dtype))
        states[self._slots] = state.to(states.dtype)
        return from_rows(out, self._lengths).unsqueeze(0)
