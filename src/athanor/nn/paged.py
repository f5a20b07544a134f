"""A paged cache: keys and values in blocks of a pool, and the context that reads and writes them (Kwon et al. 2023).

A sequence owns a list of blocks, not a row: memory is handed out as sequences grow, two sequences may share the blocks of a
common beginning, and whoever manages blocks (the engine) moves no data. One context serves whole prompts, parts of prompts that
follow what is cached already, and single new tokens.

Legend: P blocks of the pool, Z positions of a block, S sequences, N new tokens laid end to end, G key/value heads, K, V key and
value width, W width of a recurrent state.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from athanor.core.errors import ConfigError
from athanor.nn.cache import KV, Layer, State, Store
from athanor.nn.context import Cell, Memory, Packed, Project, from_rows, to_rows
from athanor.nn.rectangle import Rectangle
from athanor.nn.sdpa import PLAIN, Scoring, attend_rows, decode_attention, mask_of


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.zeros`, which on CPUs takes memory for what is written alone: pages that the system fills with zeros when they are
    first touched. A cache has room for the longest sequences, and most are short."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ConfigError(
            f"a cache of {size:,} bytes for each layer is more than the system gives ({error.strerror}): lower max_len or"
            " cache_tokens"
        ) from error
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class PagedCache:
    """The pool. Keys are (G, P, Z, K) and values (G, P, Z, V) for each layer; recurrent states have a slot for each sequence.

    With the heads outermost the blocks of many sequences are put together as a product wants them, in one copy: of all ways that
    were tried the fastest on CPUs (docs/log.md).

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
            # Zeros: what stands after a sequence's end is multiplied by probability 0, which must not meet a stray nan.
            return _zeros((layer.n_kv_heads, blocks, size, getattr(layer, width)), dtype, device)

        self.size, self.dtype = size, dtype
        self.keys = [pool(layer, "key_dim") for layer in layers]
        self.values = [pool(layer, "value_dim") for layer in layers]
        self.states = [torch.zeros((slots, x.width), device=device) if isinstance(x, State) else None for x in layers]
        # Bytes of a position in the layer that has most.
        self.widest = max((p.shape[0] * p.shape[3] * dtype.itemsize for p in self.keys if p is not None), default=0)

    def copy(self, blocks: Tensor, to_blocks: Tensor, slots: Tensor, to_slots: Tensor) -> None:
        """Make other blocks and slots hold the same."""
        for pool in (*self.keys, *self.values):
            if pool is not None:
                pool[:, to_blocks] = pool[:, blocks]
        for state in self.states:
            if state is not None:
                state[to_slots] = state[slots]

    def clear(self, blocks: Tensor) -> None:
        """Make blocks as they were at the beginning: of what is not finite nothing may be left for whoever gets them next."""
        for pool in (*self.keys, *self.values):
            if pool is not None:
                pool[:, blocks] = 0

    @staticmethod
    def bytes_per_token(layers: Sequence[Layer], dtype: torch.dtype) -> int:
        """Memory of one token in all layers."""
        return dtype.itemsize * sum(x.n_kv_heads * (x.key_dim + x.value_dim) for x in layers if isinstance(x, KV))


class Sources:
    """What the decoder of an encoder-decoder reads of each source: keys and values by slot, kept from its first call on.

    Args:
        layers: what each decoder layer keeps of the memory.
        slots: sequences at once.
        dtype, device: of keys and values.
    """

    def __init__(self, layers: Sequence[KV], slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.store = Store(list(layers), dtype, device)
        self.store.reserve(slots, 0)
        self.lengths = torch.ones(slots, dtype=torch.int64, device=device)
        self.pending: tuple[Memory, Tensor, Tensor] | None = None

    def receive(self, memory: Memory, slots: Tensor) -> None:
        """Take what an encoder made of new sources; keys and values are written by the next call of the decoder."""
        assert memory.lengths is not None
        self.lengths[slots] = memory.lengths
        self.store.reserve(len(self.lengths), int(memory.lengths.max()))
        at = torch.cat([torch.arange(n, device=slots.device) for n in memory.lengths.tolist()])
        self.pending = memory, torch.repeat_interleave(slots, memory.lengths), at

    def clear(self, slot: int) -> None:
        """See `PagedCache.clear`."""
        for x in (*self.store.keys, *self.store.values):
            if x is not None:
                x[slot] = 0

    def copy(self, slots: Tensor, to_slots: Tensor) -> None:
        """Make other slots hold the same."""
        self.store.copy_rows(slots, to_slots, int(self.lengths[slots].max()))
        self.lengths[to_slots] = self.lengths[slots]


# Bytes of keys of a layer that are put together at a time, on CPUs: what stays in the caches is read once, not three times.
_TOGETHER = 4 << 20


class _Group(NamedTuple):
    """Sequences that attend together.

    which   those of the batch, None for all in order
    starts  (R,) where their new tokens stand
    read    (R n,) blocks of each, filled up to as many as the longest has
    first   the first of these, where they are the blocks of one sequence and stand side by side in the pool
    keys    (n Z,) positions of what is read
    masks   (R, 1, n Z) by window, added to the scores
    """

    which: Tensor | None
    starts: Tensor
    read: Tensor
    first: int | None
    keys: Tensor
    masks: dict[int | None, Tensor]


class Paged:
    """New tokens of S sequences laid end to end as (1, N), each after what the cache already holds of its sequence.

    Args:
        cache: the pool.
        tables: (S, blocks) int64, the blocks of each sequence in order, enough for all its positions; what stands after these
            is not read.
        starts: (S,) tokens of each sequence that are in the cache.
        lengths: (S,) new tokens of each sequence, at least one.
        slots: (S,) slot of each sequence's recurrent state and source; only for models that have one.
        sources: for encoder-decoders.
        steady: whether what a token sees is computed by itself, in shapes that nobody else's length changes, so that its bits do
            not either; for single tokens.
    """

    cached = True

    def __init__(
        self,
        cache: PagedCache,
        tables: Tensor,
        starts: Tensor,
        lengths: Tensor,
        slots: Tensor | None = None,
        sources: Sources | None = None,
        steady: bool = False,
    ) -> None:
        device, self._steady = lengths.device, steady
        self._cache, self._starts, self._lengths, self._slots, self._sources = cache, starts, lengths, slots, sources
        longest = int(lengths.max())
        self.extent = int((starts + lengths).max())
        self._single = longest == 1
        owner = torch.arange(len(lengths), device=device)
        if self._single:
            at = starts
        else:
            owner = torch.repeat_interleave(owner, lengths)
            at = torch.arange(len(owner), device=device) - torch.repeat_interleave(lengths.cumsum(0) - lengths - starts, lengths)
        self.positions = at.unsqueeze(0)
        self._places = tables[owner, at // cache.size] * cache.size + at % cache.size
        self._tables = tables
        self._rows: dict[int, list[Tensor]] = {}  # by heads of a pool: what each group reads of it
        self._across: Rectangle | None = None
        self._whole: Packed | None = None
        if self._single:
            self._groups = [*(self._each() if steady else self._grouped())]
            return
        if not int(starts.max()):
            self._whole = Packed(lengths)  # nothing to read
            return
        self._groups = [self._group(None, starts, tables)]
        rows = starts[:, None] + torch.arange(longest, device=device)
        # What lies beyond a sequence's end comes after all its queries, so the causal rule hides it.
        self._rectangle = Rectangle(rows, self._groups[0].keys.expand(len(lengths), -1), causal=True)

    def _grouped(self) -> Iterator[_Group]:
        """Sequences of like length side by side: what is read of each is filled up to the longest of its group only."""
        count, size = len(self._starts), self._cache.size
        most = _TOGETHER // max(1, self._cache.widest * size)
        if count == 1 or self._starts.device.type != "cpu" or -(-self.extent // size) * count <= most:
            yield self._group(None, self._starts, self._tables)
            return
        ends = (self._starts // size + 1).tolist()
        order = sorted(range(count), key=ends.__getitem__)
        while order:
            some = max(1, most // ends[order[-1]])
            which = torch.tensor(order[-some:])
            yield self._group(which, self._starts[which], self._tables[which])
            del order[-some:]

    def _each(self) -> Iterator[_Group]:
        """Every sequence by itself; what is read is filled up to a power of two of blocks, as shapes are prepared one by one."""
        for i, start in enumerate(self._starts.tolist()):
            blocks = 1 << (start // self._cache.size).bit_length()
            table = F.pad(self._tables[i, :blocks], (0, max(0, blocks - self._tables.shape[1])))
            which = torch.tensor([i], device=self._starts.device)
            yield self._group(which, self._starts[i : i + 1], table[None], blocks)

    def _group(self, which: Tensor | None, starts: Tensor, tables: Tensor, blocks: int = 0) -> _Group:
        size, device = self._cache.size, starts.device
        extent = self.extent if which is None else int(starts.max()) + 1
        read = tables[:, : blocks or -(-extent // size)].flatten()
        first = None
        if len(starts) == 1 and device.type == "cpu" and not self._steady:
            first = int(read[0])
            if not torch.equal(read, torch.arange(first, first + len(read))):
                first = None
        return _Group(which, starts, read, first, torch.arange(len(read) // len(starts) * size, device=device), {})

    def _gather(self, pool: Tensor, group: int, like: Tensor) -> Tensor:
        """The blocks of a group's sequences, (G, R, positions, K)."""
        heads, blocks, _, width = pool.shape
        some = self._groups[group]
        if some.first is not None:
            # Of few keys a product in float32 takes less than what one in bfloat16 takes to begin with.
            return pool[:, some.first : some.first + len(some.read)].flatten(1, 2).unsqueeze(1).float()
        if heads not in self._rows:
            head = torch.arange(0, heads * blocks, blocks, device=pool.device)[:, None]
            self._rows[heads] = [(head + g.read).flatten() for g in self._groups]
        # Rows of a matrix are copied whole, and twice as fast as slices of a tensor.
        found = pool.view(heads * blocks, -1).index_select(0, self._rows[heads][group])
        return found.view(heads, len(some.starts), -1, width).to(like.dtype)

    def _write(self, pool: Tensor, new: Tensor) -> None:
        """Entries (1, N, G, K)."""
        pool.view(len(pool), -1, pool.shape[3]).index_copy_(1, self._places, new[0].transpose(0, 1).to(pool.dtype))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring = PLAIN) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        assert keys is not None
        self._write(keys, key)
        if values is not None:
            self._write(values, value)
        if self._whole is not None:
            return self._whole.attend(layer, query, key, value, scoring)
        if self._single:
            return self._decode(keys, values, query.transpose(0, 1), value.shape[3], scoring).transpose(0, 1)
        key, value = (x.permute(1, 2, 0, 3) for x in self._read(keys, values, 0, query, value.shape[3]))
        rows = self._rectangle.attend(to_rows(query[0], self._lengths), key, value, scoring)
        return from_rows(rows, self._lengths).unsqueeze(0)

    def _read(self, keys: Tensor, values: Tensor | None, group: int, like: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a group; where a layer has no values of its own they are the first entries of its keys."""
        key = self._gather(keys, group, like)
        return key, key[..., :width] if values is None else self._gather(values, group, like)

    def _decode(self, keys: Tensor, values: Tensor | None, query: Tensor, width: int, scoring: Scoring) -> Tensor:
        """query (S, 1, H, K) -> (S, 1, H, V)."""
        n, _, h, k = query.shape
        g = keys.shape[0]
        rows = query.view(n, g, h // g, k).transpose(0, 1)
        out = rows.new_empty((g, n, h // g, width))
        for i, group in enumerate(self._groups):
            if scoring.window not in group.masks:
                back = group.starts[:, None] - group.keys
                visible = (back >= 0) if scoring.window is None else (back >= 0) & (back < scoring.window)
                group.masks[scoring.window] = mask_of(visible, torch.float32)[:, None]
            bias = None
            if scoring.bias is not None:
                added = scoring.bias(group.starts[:, None], group.keys)  # (1 or R, H, 1, positions)
                bias = added.reshape(-1, g, h // g, added.shape[-1]).transpose(0, 1)
            key, value = self._read(keys, values, i, query, width)
            some = rows if group.which is None else rows.index_select(1, group.which)
            mask, softcap = group.masks[scoring.window], scoring.softcap
            found = attend_rows(some.to(key.dtype), key, value, mask, bias=bias, scale=scoring.scale, softcap=softcap)
            if group.which is None:
                out = found.to(query.dtype)
            else:
                out.index_copy_(1, group.which, found.to(query.dtype))
        return out.transpose(0, 1).reshape(n, 1, h, width)

    def cross(self, layer: int, query: Tensor, project: Project, scoring: Scoring = PLAIN) -> Tensor:
        sources = self._sources
        assert sources is not None and self._slots is not None
        if sources.pending is not None:
            memory, slot, at = sources.pending
            key, value = project(memory.hidden)
            sources.store.write(layer, slot, at, key[0], value[0])
        lengths = sources.lengths[self._slots]
        span = int(lengths.max())
        keys, values = sources.store.keys[layer], sources.store.values[layer]
        assert keys is not None and values is not None
        key, value = (x[self._slots, :, :span].to(query.dtype) for x in (keys, values))  # (S, G, span, K)
        hidden = torch.arange(span, device=query.device) >= lengths[:, None]
        if self._single:
            out = decode_attention(
                query.transpose(0, 1), key, value, mask_of(~hidden, torch.float32), scale=scoring.scale, softcap=scoring.softcap
            )
            return out.transpose(0, 1)
        if self._across is None:
            steps = torch.arange(int(self._lengths.max()), device=query.device)
            self._across = Rectangle(steps, torch.arange(span, device=query.device), causal=False, hidden=hidden)
        rows = to_rows(query[0], self._lengths)
        rows = self._across.attend(rows, key.transpose(1, 2), value.transpose(1, 2), scoring)
        return from_rows(rows, self._lengths).unsqueeze(0)

    def scan(self, layer: int, cell: Cell, x: Tensor) -> Tensor:
        states = self._cache.states[layer]
        assert states is not None and self._slots is not None
        # A slot is as its last sequence left it: what starts at 0 starts from zeros.
        state = torch.where((self._starts > 0)[:, None], states[self._slots], 0.0)
        out, state = cell(to_rows(x[0], self._lengths), self._lengths, state.to(x.dtype))
        states[self._slots] = state.to(states.dtype)
        return from_rows(out, self._lengths).unsqueeze(0)
