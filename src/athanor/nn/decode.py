"""One new token of each of many sequences over a paged cache, written for torch.compile: what is read is never copied.

Legend: P blocks of the pool, Z positions of a block, S sequences, n blocks of each, G key/value heads, H query heads, R = H / G,
K, V key and value width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from athanor.nn.context import Cell, Project
from athanor.nn.paged import PagedCache
from athanor.nn.sdpa import PLAIN, Scoring, hidden_score

# Operations that a compiler does not look into. `enter` writes new entries into pools in place and gives the tables back: what is
# read through these is read after that. It says that it changes nothing, as compilers copy what changes, or take minutes to see
# that they need not. `settle` has a value computed once, where a compiler would compute it again for every key that it meets.
_LIBRARY = torch.library.Library("athanor", "FRAGMENT")
_LIBRARY.define("enter(Tensor keys, Tensor? values, Tensor places, Tensor key, Tensor value, Tensor tables) -> Tensor")
_LIBRARY.define("settle(Tensor x) -> Tensor")


def _enter(keys: Tensor, values: Tensor | None, places: Tensor, key: Tensor, value: Tensor, tables: Tensor) -> Tensor:
    """keys (G, P, Z, K), places (S,), key (S, G, K); values likewise, or None where keys hold them."""
    for pool, new in ((keys, key), (values, value)):
        if pool is not None:
            pool.view(pool.shape[0], -1, pool.shape[3]).index_copy_(1, places, new.transpose(0, 1).to(pool.dtype))
    return tables.clone()


_LIBRARY.impl("enter", _enter, "CompositeExplicitAutograd")
_LIBRARY.impl("enter", lambda keys, values, places, key, value, tables: torch.empty_like(tables), "Meta")
_LIBRARY.impl("settle", lambda x: x.clone(memory_format=torch.contiguous_format), "CompositeExplicitAutograd")
_LIBRARY.impl("settle", lambda x: x.new_empty(x.shape), "Meta")


class Decode:
    """The context of a compiled step; as it stands, not compiled, it gives the same numbers slowly.

    Args:
        cache: the pool.
        tables: (S, n) int64, blocks of each sequence in order, enough for its new token; what stands after these is not seen.
        starts: (S,) tokens of each sequence that are in the cache.
    """

    cached = True
    extent = 1  # who compiles makes tables of positions as long as they will ever have to be (`Rotary.reserve`)

    def __init__(self, cache: PagedCache, tables: Tensor, starts: Tensor) -> None:
        self._cache, self._tables, self._starts = cache, tables, starts
        self.positions = starts.unsqueeze(0)
        block = tables.gather(1, (starts // cache.size).unsqueeze(1)).squeeze(1)
        self._places = torch.ops.athanor.settle(block * cache.size + starts % cache.size)
        self._keys = torch.arange(tables.shape[1] * cache.size, device=tables.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring = PLAIN) -> Tensor:
        """query (1, S, H, K), key (1, S, G, K), value (1, S, G, V) -> (1, S, H, V)."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        assert keys is not None
        tables = torch.ops.athanor.enter(keys, values, self._places, key[0], value[0], self._tables)
        s, g, h, k = len(self._starts), keys.shape[0], query.shape[2], query.shape[3]
        query = torch.ops.athanor.settle(query.view(s, g, h // g, k).transpose(0, 1))  # (G, S, R, K)
        read = keys[:, tables].flatten(2, 3)  # (G, S, n Z, K)
        scores = (query.unsqueeze(3).float() * read.unsqueeze(2)).sum(-1)  # (G, S, R, n Z)
        scores = scores * (1 / math.sqrt(k) if scoring.scale is None else scoring.scale)
        if scoring.softcap is not None:
            scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
        if scoring.bias is not None:
            bias = scoring.bias(self._starts[:, None], self._keys)  # (1 or S, H, 1, n Z)
            scores = scores + bias.reshape(-1, g, h // g, bias.shape[-1]).transpose(0, 1)
        back = self._starts[:, None] - self._keys
        seen = back >= 0 if scoring.window is None else (back >= 0) & (back < scoring.window)
        shares = torch.softmax(torch.where(seen[:, None], scores, hidden_score(scores.dtype)), -1)
        read = read[..., : value.shape[3]] if values is None else values[:, tables].flatten(2, 3)
        out = (shares.unsqueeze(-1) * read.unsqueeze(2)).sum(-2)  # (G, S, R, V)
        return out.transpose(0, 1).reshape(1, s, h, -1).to(query.dtype)

    # Models that would call these are refused before (`infer/compiled.py`).
    def cross(self, layer: int, query: Tensor, project: Project, scoring: Scoring = PLAIN) -> Tensor:
        raise NotImplementedError("a compiled step reads no source")

    def scan(self, layer: int, cell: Cell, x: Tensor) -> Tensor:
        raise NotImplementedError("a compiled step keeps no recurrent state")
