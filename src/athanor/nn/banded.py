"""Attention within a window to both sides, in blocks along the diagonal: memory grows with T, not with T squared.

Queries stand in blocks of C; a block sees its own C keys and `window` more on each side, C + 2 window in all, besides keys that
are seen from anywhere (Beltagy et al. 2020, appendix A). The blocks are rows of ordinary attention.

Legend: B batch, T time, H query heads, G key/value heads, K key width, V value width, W window, C queries of a block,
N = ceil(T / C) blocks, M keys seen from anywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from athanor.nn.sdpa import attention, mask_of

_BLOCK = 32  # at least so many queries: products of fewer are not worth their start
_WORTH = 2  # rows so many times as long as what a block sees are cut


def block_of(window: int) -> int:
    """C for a window of W."""
    return max(window, _BLOCK)


def pays(window: int, time: int) -> bool:
    """Whether rows of T are to be cut into blocks: for shorter ones a mask is the faster."""
    return time >= _WORTH * (block_of(window) + 2 * window)


class Band:
    """softmax(cap(scale q k^T)) v over the keys j of query i with |i - j| <= W, and those seen from anywhere.

    Args:
        shape: B and T.
        window: W.
        hidden: (B or 1, T) bool, keys that nobody sees; None for none.
        landmarks: (B, T) bool, keys that are seen from anywhere; None for none.
        dtype: of the queries.
        device: of the queries.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        window: int,
        hidden: Tensor | None,
        landmarks: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        rows, self._time = shape
        self._window, self._block = window, block_of(window)
        self._blocks = -(-self._time // self._block)
        query = torch.arange(self._blocks * self._block, device=device).view(self._blocks, self._block, 1)
        near = torch.arange(self._block + 2 * window, device=device) - window + query[:, :1]  # (N, 1, C + 2W)
        visible = ((query - near).abs() <= window) & (near >= 0) & (near < self._time)
        seen = visible.unsqueeze(0)  # (1, N, C, C + 2W)
        apart = landmarks if hidden is None else hidden if landmarks is None else hidden | landmarks
        if apart is not None:
            seen = seen & ~apart[:, near.clamp(0, self._time - 1).squeeze(1)].unsqueeze(2)
        self._places: Tensor | None = None
        if landmarks is not None:
            if hidden is not None:
                landmarks = landmarks & ~hidden
            # Of each row the places of its landmarks, in order, filled up to the most that a row has.
            most = int(landmarks.sum(1).max())
            order = torch.argsort((~landmarks).int(), dim=1, stable=True)[:, :most]
            self._places = (order + torch.arange(rows, device=device).unsqueeze(1) * self._time).flatten()
            there = landmarks.gather(1, order)[:, None, None].expand(rows, *visible.shape[:2], most)
            seen = torch.cat((there, seen.expand(rows, -1, -1, -1)), dim=3)
        self._mask = mask_of(seen.expand(rows, -1, -1, -1).flatten(0, 1), dtype)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, softcap: float | None) -> Tensor:
        """query (B, T, H, K), key (B, T, G, K), value (B, T, G, V) -> (B, T, H, V)."""
        keys, values = self._seen(key), self._seen(value)
        out = attention(self._cut(query).flatten(0, 1), keys, values, mask=self._mask, scale=scale, softcap=softcap)
        return out.reshape(query.shape[0], -1, *out.shape[2:])[:, : self._time]

    def _cut(self, x: Tensor) -> Tensor:  # (B, T, ..) -> (B, N, C, ..)
        fill = self._blocks * self._block - self._time
        return F.pad(x, (0, 0, 0, 0, 0, fill)).view(x.shape[0], self._blocks, self._block, *x.shape[2:])

    def _seen(self, x: Tensor) -> Tensor:  # (B, T, G, K) -> (B N, M + C + 2W, G, K)
        own = self._cut(x)
        before = F.pad(own[:, :-1, self._block - self._window :], (0,) * 6 + (1, 0))
        after = F.pad(own[:, 1:, : self._window], (0,) * 6 + (0, 1))
        parts = [before, own, after]
        if self._places is not None:
            anywhere = x.flatten(0, 1).index_select(0, self._places).view(x.shape[0], 1, -1, *x.shape[2:])
            parts.insert(0, anywhere.expand(-1, self._blocks, -1, -1, -1))
        return torch.cat(parts, dim=2).flatten(0, 1)
