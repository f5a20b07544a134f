"""Multi-head latent attention (DeepSeek-V2, 2024, section 2.1). Legend: B batch, T time, D width, H heads, C width of the latent
that keys and values are made of, Q width of that of queries, R and P widths of the parts of a head that are and are not turned,
V width of a value.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from athanor.nn.attention import Turn
from athanor.nn.cache import KV
from athanor.nn.context import Context
from athanor.nn.linear import Linear
from athanor.nn.norms import RMSNorm
from athanor.nn.positions import rotate
from athanor.nn.sdpa import Scoring

_EPS = 1e-6  # of the norms of latents, whatever that of the model's others


class LatentAttention(nn.Module):
    """Attention whose keys and values are made of one latent of width C, which with R turned entries is all that a cache keeps.

    c = norm(W_c x); head h has the key [turned W_r x; K_h c], whose first part all heads share, the value V_h c, and a query
    [turned; not turned] made of x or, where Q is given, of the latent norm(W_q x).

    Whole sequences compute keys and values of every head. In a cache lie [c; turned W_r x] alone: q.K_h c = (K_h^T q).c, so
    queries are taken to the latent, attend to it as H heads to one, and what they find is taken through V_h. Both are the same
    sums in another order.

    Args:
        dim: D.
        n_heads: H.
        query_rank: Q; None for queries straight from x.
        latent_rank: C.
        rope_dim: R, even.
        nope_dim: P.
        value_dim: V.
        bias: whether the projections to latents and the output have biases.
        sharpness: what scores are multiplied with besides 1/sqrt(R + P).
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        query_rank: int | None,
        latent_rank: int,
        rope_dim: int,
        nope_dim: int,
        value_dim: int,
        *,
        bias: bool = False,
        sharpness: float = 1.0,
    ) -> None:
        super().__init__()
        self.n_heads, self.query_rank, self.latent_rank = n_heads, query_rank, latent_rank
        self.rope_dim, self.nope_dim, self.value_dim = rope_dim, nope_dim, value_dim
        self.per_pair = 2 * n_heads * (rope_dim + nope_dim + value_dim)  # FLOPs of one query with one key and its value
        self.scoring = Scoring(scale=sharpness / math.sqrt(rope_dim + nope_dim))
        # Of x: the latent of queries, that of keys and values, what is turned.
        self.latent = Linear(dim, (query_rank or 0) + latent_rank + rope_dim, bias=bias)
        self.query_norm = None if query_rank is None else RMSNorm(query_rank, _EPS)
        self.query = Linear(query_rank or dim, n_heads * (rope_dim + nope_dim), bias=False)
        self.latent_norm = RMSNorm(latent_rank, _EPS)
        self.key_value = Linear(latent_rank, n_heads * (nope_dim + value_dim), bias=False)
        self.out = Linear(n_heads * value_dim, dim, bias=bias)

    def cache_layer(self) -> KV:
        """What a cache keeps of a token: C + R numbers."""
        return KV(1, self.latent_rank + self.rope_dim, 0)

    def forward(self, x: Tensor, ctx: Context, layer: int, turn: Turn) -> Tensor:  # (B, T, D) -> (B, T, D)
        b, t, _ = x.shape
        query_latent, latent, turned = self.latent(x).split((self.query_rank or 0, self.latent_rank, self.rope_dim), -1)
        query = self.query(x if self.query_norm is None else self.query_norm(query_latent))
        query = rotate(query.view(b, t, self.n_heads, -1), *turn)  # in each head the entries that are turned come first
        latent = self.latent_norm(latent)
        turned = rotate(turned.unsqueeze(2), *turn)
        attend = self._absorbed if ctx.cached else self._expanded
        return self.out(attend(query, latent, turned, ctx, layer).reshape(b, t, -1))

    def _expanded(self, query: Tensor, latent: Tensor, turned: Tensor, ctx: Context, layer: int) -> Tensor:
        pairs = self.key_value(latent).view(*query.shape[:3], self.nope_dim + self.value_dim)
        own, value = pairs.split((self.nope_dim, self.value_dim), -1)
        key = torch.cat((turned.expand(-1, -1, self.n_heads, -1), own), -1)
        return ctx.attend(layer, query, key, value, self.scoring)

    def _absorbed(self, query: Tensor, latent: Tensor, turned: Tensor, ctx: Context, layer: int) -> Tensor:
        b, t, h, _ = query.shape
        to_key, to_value = self._matrix().view(h, -1, self.latent_rank).split((self.nope_dim, self.value_dim), 1)
        rope, nope = query.split((self.rope_dim, self.nope_dim), -1)
        reading = torch.matmul(nope.reshape(b * t, h, -1).transpose(0, 1), to_key).transpose(0, 1)  # (B T, H, C)
        query = torch.cat((reading.reshape(b, t, h, -1), rope), -1)
        latent = latent.unsqueeze(2)
        found = ctx.attend(layer, query, torch.cat((latent, turned), -1), latent, self.scoring)  # (B, T, H, C)
        return torch.matmul(found.reshape(b * t, h, -1).transpose(0, 1), to_value.mT).transpose(0, 1)

    def _matrix(self) -> Tensor:
        """(H (P + V), C), also of a layer that stands in the place of Linear (quantised, adapted)."""
        if type(self.key_value) is Linear:
            return self.key_value.weight
        one = torch.eye(self.latent_rank, dtype=self.latent_norm.weight.dtype, device=self.latent_norm.weight.device)
        matrix: Tensor = self.key_value(one)
        return matrix.t()
