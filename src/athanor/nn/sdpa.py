"""Scaled dot-product attention.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, K key width, V value width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from athanor.nn.derivatives import first_only

# Above this many scores per head the probabilities cost more memory traffic than the fused kernel costs arithmetic.
_EXPLICIT_MAX = 512 * 512

# Queries that causal attention takes at a time: no scores are formed of keys that come after the last of them.
_BLOCK = 128

# Of query positions (T,) or (B, T) and key positions (S,) or (B, S): what is added to the scores, (H, T, S) or (B, H, T, S).
Bias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Scoring:
    """How a layer scores keys: softmax over the visible keys of cap(scale q.k) + bias.

    scale      1/sqrt(K) by default
    softcap    cap(s) = softcap tanh(s / softcap) (Gemma 2); no cap by default
    window     keys further away are hidden: causal attention sees `window` positions, its own among them; attention to both
               sides sees `window` on each
    bias       added to the scores, such as T5's relative positions
    landmarks  (B, T) bool, keys that are seen however far away they are; of attention to both sides (`landmarks.py`)
    """

    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    bias: Bias | None = None
    landmarks: Tensor | None = None


PLAIN = Scoring()


def hidden_score(dtype: torch.dtype) -> float:
    """What is added to the score of a key that must not be seen. Finite: a row that sees nothing must not become nan."""
    return -6e4 if dtype == torch.float16 else -1e30


def mask_of(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """bool -> 0 where True and `hidden_score` where False."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, hidden_score(dtype))


def _call(make: Callable[..., Tensor], *of: Any) -> Tensor:
    return make(*of)


# Large masks are made once for all layers, but not kept beside those of other lengths: a hundred of 2,048 positions are 2 GB.
_keep, _keep_large = lru_cache(maxsize=128)(_call), lru_cache(maxsize=1)(_call)


def _kept(make: Callable[..., Tensor], positions: int, *of: Any) -> Tensor:
    """make(positions, *of), once for the same; anew where a compiler traces, which would warn that it looks through the cache."""
    if torch.compiler.is_compiling():
        return make(positions, *of)
    return (_keep if positions**2 <= _EXPLICIT_MAX else _keep_large)(make, positions, *of)


def causal_mask(t: int, repeats: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(repeats * T, T): the causal mask of T positions, once for each of the query heads that share a key/value head."""
    mask = torch.full((t, t), hidden_score(dtype), dtype=dtype, device=device).triu_(1)
    return mask.repeat(repeats, 1)


class _Attention(torch.autograd.Function):
    """softmax(cap(scale q k^T) + mask + bias) v with the probabilities kept for the backward pass, all by batched products.

    On CPUs with bfloat16 this is three to five times as fast as PyTorch's fused kernel for T <= 256 (docs/log.md). Query heads
    that share a key/value head stand below each other in one matrix, so keys and values are never repeated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,  # (B G, R T, K), R = H / G
        key: Tensor,  # (B G, S, K)
        value: Tensor,  # (B G, S, V)
        bias: Tensor | None,  # (1 or B, H, T, S)
        mask: Tensor | None,  # (R T, S) when all rows of the batch share it, else (B, 1, T, S)
        scale: float,
        softcap: float | None,
        shape: tuple[int, int, int, int],  # (B, H, T, S)
    ) -> Tensor:
        shared = mask if mask is not None and mask.ndim == 2 else None
        if shared is not None and softcap is None:
            scores = torch.baddbmm(shared, query, key.transpose(1, 2), alpha=scale)
        else:
            scale_in = scale if softcap is None else scale / softcap
            scores = torch.baddbmm(query.new_empty(()), query, key.transpose(1, 2), beta=0, alpha=scale_in)
        capped = None
        if softcap is not None:
            capped = scores.tanh_()
            scores = capped * softcap if shared is None else torch.add(shared, capped, alpha=softcap)
        if mask is not None and shared is None:
            scores.view(shape).add_(mask)
        if bias is not None:
            scores.view(shape).add_(bias)
        probs = torch.softmax(scores, -1)
        ctx.save_for_backward(query, key, value, probs, capped)
        ctx.scale, ctx.shape = scale, shape
        ctx.biases = 0 if bias is None else bias.shape[0]
        return torch.bmm(probs, value)

    @staticmethod
    @first_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, probs, capped = ctx.saved_tensors
        d_out = grads[0]
        d_value = torch.bmm(probs.transpose(1, 2), d_out)
        d_probs = torch.bmm(d_out, value.transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_probs, probs, -1, probs.dtype)
        d_bias = None
        if ctx.needs_input_grad[3]:
            d_bias = d_scores.view(ctx.shape)
            d_bias = d_bias.sum(0, keepdim=True) if ctx.biases == 1 else d_bias.clone()
        if capped is not None:
            d_scores = torch.ops.aten.tanh_backward(d_scores, capped)
        none = query.new_empty(())
        d_query = torch.baddbmm(none, d_scores, key, beta=0, alpha=ctx.scale)
        d_key = torch.baddbmm(none, d_scores.transpose(1, 2), query, beta=0, alpha=ctx.scale)
        return d_query, d_key, d_value, d_bias, None, None, None, None


def _block_mask(last: int, first: int, repeats: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(repeats * (last - first), last): the rows first .. last - 1 of the causal mask."""
    return _kept(causal_mask, last, 1, dtype, device)[first:].repeat(repeats, 1)


def forget_masks() -> None:
    """Make masks anew that were kept: some tensors (those without data) must not outlive the mode in which they were made."""
    _keep.cache_clear()
    _keep_large.cache_clear()


class _CausalAttention(torch.autograd.Function):
    """`_Attention` of causal rows, by blocks of queries that meet only the keys up to their last one.

    Of N blocks (N + 1) / 2N of the scores are formed and kept: at T = 512 it takes 0.7 of the time (docs/log.md).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,  # (B G, R, T, K), R = H / G
        key: Tensor,  # (B G, T, K)
        value: Tensor,  # (B G, T, V)
        scale: float,
    ) -> Tensor:
        n, repeats, t, k = query.shape
        out = query.new_empty(n, repeats, t, value.shape[2])
        kept = []
        for first in range(0, t, _BLOCK):
            last = min(first + _BLOCK, t)
            mask = _kept(_block_mask, last, first, repeats, query.dtype, query.device)
            block = query[:, :, first:last].reshape(n, repeats * (last - first), k)
            probs = torch.softmax(torch.baddbmm(mask, block, key[:, :last].transpose(1, 2), alpha=scale), -1)
            out[:, :, first:last] = torch.bmm(probs, value[:, :last]).view(n, repeats, last - first, value.shape[2])
            kept.append(probs)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale = scale
        return out

    @staticmethod
    @first_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        n, repeats, t, k = query.shape
        none = query.new_empty(())
        d_query = torch.empty_like(query)
        d_key = d_value = none
        for i in reversed(range(len(kept))):  # the last block meets all keys
            first, last, probs = i * _BLOCK, min((i + 1) * _BLOCK, t), kept[i]
            block, d_out = (x[:, :, first:last].reshape(n, repeats * (last - first), x.shape[3]) for x in (query, grads[0]))
            d_probs = torch.bmm(d_out, value[:, :last].transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_probs, probs, -1, probs.dtype)
            d_block = torch.baddbmm(none, d_scores, key[:, :last], beta=0, alpha=ctx.scale)
            d_query[:, :, first:last] = d_block.view(n, repeats, last - first, k)
            to_key = torch.baddbmm(none, d_scores.transpose(1, 2), block, beta=0, alpha=ctx.scale)
            to_value = torch.bmm(probs.transpose(1, 2), d_out)
            if last == t:
                d_key, d_value = to_key, to_value
            else:
                d_key[:, :last] += to_key
                d_value[:, :last] += to_value
        return d_query, d_key, d_value, None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of B rows: query (B, T, H, K), key (B, S, G, K), value (B, S, G, V) -> (B, T, H, V).

    Query head h reads key/value head h // (H / G) (grouped-query attention, Ainslie et al. 2023).

    Args:
        query, key, value: as above; G divides H.
        causal: position i sees the keys 0..i, where T = S. Leaves no place for a mask.
        mask: (1 or B, T, S), added to the scores: 0 where a key is seen and `hidden_score` where it is not.
        bias: (1 or B, H, T, S), added to the scores.
        scale, softcap: see `Scoring`.
    """
    b, t, h, k = query.shape
    s, g, v = key.shape[1], key.shape[2], value.shape[3]
    repeats = h // g
    scale = 1 / math.sqrt(k) if scale is None else scale
    dtype, device = query.dtype, query.device
    if bias is not None:
        bias = bias.to(dtype)
    # The fused kernel knows no cap; on CPUs it is taken for long rows only.
    if softcap is None and (device.type != "cpu" or t * s > _EXPLICIT_MAX):
        both = None if mask is None else mask.unsqueeze(1)
        if bias is not None:
            both = bias if both is None else bias + both
            if causal:
                both = both + _kept(causal_mask, t, 1, dtype, device)
        q, k_, v_ = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        out = F.scaled_dot_product_attention(
            q, k_, v_, both, is_causal=causal and both is None, scale=scale, enable_gqa=repeats > 1
        )
        return out.transpose(1, 2)
    q = query.transpose(1, 2).reshape(b * g, repeats, t, k)
    flat = (x.transpose(1, 2).reshape(b * g, s, x.shape[-1]) for x in (key, value))
    explicit: Tensor
    if causal and bias is None and softcap is None and t > _BLOCK:
        explicit = _CausalAttention.apply(q, *flat, scale)
        return explicit.view(b, h, t, v).transpose(1, 2)
    if causal:
        mask = _kept(causal_mask, t, repeats, dtype, device)
    elif mask is not None:
        mask = mask[0].repeat(repeats, 1) if mask.shape[0] == 1 else mask.unsqueeze(1)
    explicit = _Attention.apply(q.flatten(1, 2), *flat, bias, mask, scale, softcap, (b, h, t, s))
    return explicit.view(b, h, t, v).transpose(1, 2)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One new position per sequence: query (B, 1, H, K); key (B, G, S, K), value (B, G, S, V) -> (B, 1, H, V).

    `mask` (B, S) and `bias` (1 or B, H, 1, S) are added to the scores.
    """
    b, _, h, k = query.shape
    g, s = key.shape[1:3]
    rows, added = query.view(b, g, h // g, k), None if bias is None else bias.reshape(-1, g, h // g, s)
    seen = None if mask is None else mask[:, None, None]
    return attend_rows(rows, key, value, seen, bias=added, scale=scale, softcap=softcap).view(b, 1, h, value.shape[3])


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """A few queries R of each head and sequence, in any order X, Y of these: (X, Y, R, K), (X, Y, S, K), (X, Y, S, V) ->
    (X, Y, R, V). By plain products, which for few queries are much faster than fused kernels on CPUs.

    `mask` and `bias`, each broadcast to (X, Y, R, S), are added to the scores.
    """
    scores = torch.matmul(query, key.transpose(2, 3)).float()
    scores.mul_(1 / math.sqrt(query.shape[3]) if scale is None else scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores.add_(mask)
    if bias is not None:
        scores.add_(bias)
    return torch.matmul(torch.softmax(scores, -1).to(value.dtype), value)
