"""Scaled dot-product attention. Legend: B batch, T time, S time of keys, H query heads, G key/value heads, K head width."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Above this length the T x T probabilities cost more memory traffic than the fused kernel costs arithmetic.
_EXPLICIT_MAX_T = 512


@lru_cache(maxsize=64)
def _causal_mask(t: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((t, t), -torch.inf, dtype=dtype, device=device).triu_(1)


class _CausalAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(K) + mask) v with the probabilities kept for the backward pass, all by batched matrix products.

    On CPUs with bfloat16 this is three to five times as fast as PyTorch's fused kernel for T <= 256 (docs/log.md).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # each (N, T, K)
        t, k = query.shape[-2:]
        mask = _causal_mask(t, query.dtype, query.device)
        scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=1 / math.sqrt(k))
        probs = torch.softmax(scores, -1)
        ctx.save_for_backward(query, key, value, probs)
        return torch.bmm(probs, value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, probs = ctx.saved_tensors
        d_out = grads[0]
        d_value = torch.bmm(probs.transpose(1, 2), d_out)
        d_probs = torch.bmm(d_out, value.transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_probs, probs, -1, probs.dtype)
        d_scores.mul_(1 / math.sqrt(query.shape[-1]))
        return torch.bmm(d_scores, key), torch.bmm(d_scores.transpose(1, 2), query), d_value


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of B sequences of one length: query (B, T, H, K), key and value (B, T, G, K) -> (B, T, H, K).

    Query head h reads key/value head h // (H / G) (grouped-query attention, Ainslie et al. 2023).
    """
    b, t, h, k = query.shape
    repeats = h // key.shape[2]
    if query.device.type != "cpu" or t > _EXPLICIT_MAX_T:
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True, enable_gqa=repeats > 1
        )
        return out.transpose(1, 2)
    if repeats > 1:
        key, value = (x.unsqueeze(3).expand(b, t, h // repeats, repeats, k).reshape(b, t, h, k) for x in (key, value))
    flat = (x.transpose(1, 2).reshape(b * h, t, k) for x in (query, key, value))
    out = _CausalAttention.apply(*flat)
    return out.view(b, h, t, k).transpose(1, 2)


def decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """One new position per sequence: query (B, 1, H, K); key, value (B, G, S, K); additive mask (B, 1, 1, S) -> (B, 1, H, K)."""
    b, _, h, k = query.shape
    g = key.shape[1]
    scores = torch.matmul(query.view(b, g, h // g, k), key.transpose(2, 3)).float()  # (B, G, H/G, S)
    probs = torch.softmax(scores.mul_(1 / math.sqrt(k)).add_(mask), -1).to(value.dtype)
    return torch.matmul(probs, value).view(b, 1, h, k)
