"""Attention layers. Legend: B batch, T time, D width, H query heads, G key/value heads, K head width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from athanor.nn.context import Context
from athanor.nn.linear import Linear
from athanor.nn.norms import RMSNorm, rms_norm
from athanor.nn.positions import rotate
from athanor.nn.sdpa import PLAIN, Scoring

Turn = tuple[Tensor, Tensor]  # cos and sin of `Rotary.at`


class Attention(nn.Module):
    """Grouped-query self-attention: query, key and value projections are one matrix.

    Args:
        dim: D, width of the model.
        n_heads: H.
        n_kv_heads: G; divides H.
        head_dim: K.
        bias: whether the input projection has a bias.
        out_bias: whether the output projection has one.
        qk_norm: epsilon of an RMSNorm over each query and key head before rotation (Qwen 3); none by default.
        qk_offset: that of this norm (Gemma 3: 1).
        scoring: how keys are scored.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        out_bias: bool = False,
        qk_norm: float | None = None,
        qk_offset: float = 0.0,
        scoring: Scoring = PLAIN,
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.per_pair = 4 * n_heads * head_dim  # FLOPs of one query with one key and its value
        self.scoring = scoring
        self.qkv = Linear(dim, (n_heads + 2 * n_kv_heads) * head_dim, bias=bias)
        self.out = Linear(n_heads * head_dim, dim, bias=out_bias)
        self.query_norm = None if qk_norm is None else RMSNorm(head_dim, qk_norm, qk_offset)
        self.key_norm = None if qk_norm is None else RMSNorm(head_dim, qk_norm, qk_offset)

    def forward(  # (B, T, D) -> (B, T, D)
        self, x: Tensor, ctx: Context, layer: int, turn: Turn | None = None, scoring: Scoring | None = None
    ) -> Tensor:
        """`turn` rotates queries and keys; `scoring` replaces the layer's own for this call."""
        h, g = self.n_heads, self.n_kv_heads
        projected = self.qkv(x)
        b, t = projected.shape[:2]  # with tensor parallelism a projection reads a part of the tokens and gives all
        qk, value = projected.view(b, t, h + 2 * g, self.head_dim).split((h + g, g), dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            # Queries and keys side by side: one norm and one turn for both.
            weight = torch.cat((self.query_norm.weight.expand(h, -1), self.key_norm.weight.expand(g, -1)))
            qk = rms_norm(qk, weight, self.query_norm.eps, self.query_norm.offset)
        query, key = (qk if turn is None else rotate(qk, *turn)).split((h, g), dim=2)
        return self.out(ctx.attend(layer, query, key, value, scoring or self.scoring).reshape(b, t, -1))


class CrossAttention(nn.Module):
    """Attention of a decoder to what the encoder made (Vaswani et al. 2017, section 3.2.3).

    Args:
        dim: D, width of both.
        n_heads: H.
        head_dim: K.
        bias: whether the four projections have biases.
        scoring: how keys are scored.
    """

    def __init__(self, dim: int, n_heads: int, head_dim: int, *, bias: bool = False, scoring: Scoring = PLAIN) -> None:
        super().__init__()
        self.n_heads, self.head_dim = n_heads, head_dim
        self.per_pair = 4 * n_heads * head_dim  # FLOPs of one query with one key and its value
        self.scoring = scoring
        self.query = Linear(dim, n_heads * head_dim, bias=bias)
        self.kv = Linear(dim, 2 * n_heads * head_dim, bias=bias)
        self.out = Linear(n_heads * head_dim, dim, bias=bias)

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, S, H, K) of the memory (B, S, D)."""
        key, value = self.kv(memory).view(*memory.shape[:2], 2 * self.n_heads, self.head_dim).chunk(2, dim=2)
        return key, value

    def forward(self, x: Tensor, ctx: Context, layer: int) -> Tensor:  # (B, T, D) -> (B, T, D)
        query = self.query(x).view(*x.shape[:2], self.n_heads, self.head_dim)
        return self.out(ctx.cross(layer, query, self.project, self.scoring).reshape(*x.shape[:2], -1))
