"""The attention layer. Legend: B batch, T time, D width, H query heads, G key/value heads, K head width."""

from __future__ import annotations

from torch import Tensor, nn

from athanor.nn.context import Context
from athanor.nn.positions import rotate


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions: query, key and value projections are one matrix.

    Args:
        dim: D, width of the model.
        n_heads: H.
        n_kv_heads: G; divides H.
        head_dim: K.
        bias: whether the input projection has a bias.
    """

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, head_dim: int, bias: bool = False) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.qkv = nn.Linear(dim, (n_heads + 2 * n_kv_heads) * head_dim, bias=bias)
        self.out = nn.Linear(n_heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor, ctx: Context, layer: int, cos: Tensor, sin: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        b, t, _ = x.shape
        h, g = self.n_heads, self.n_kv_heads
        qk, value = self.qkv(x).view(b, t, h + 2 * g, self.head_dim).split((h + g, g), dim=2)
        query, key = rotate(qk, cos, sin).split((h, g), dim=2)
        return self.out(ctx.attend(layer, query, key, value).reshape(b, t, -1))
