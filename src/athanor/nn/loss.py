"""Losses over a vocabulary that never hold all logits at once. Legend: N tokens, D width, V vocabulary."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from athanor.nn.derivatives import first_only
from athanor.nn.linear import multiply, outer
from athanor.nn.norms import compute_dtype

_CHUNK_ELEMENTS = 1 << 22  # logits in flight: 16 MiB of float32, small enough to stay near the cache


_SPAN = 3  # chunks whose gradients make one product with the hidden states: each is added to all of a large matrix
_LEVEL, _FINE = 256, 64  # rows of a bfloat16 product are filled up to a multiple of this (of _FINE where they are few)


def _chunk_rows(vocab: int) -> int:
    return max(_LEVEL, _CHUNK_ELEMENTS // vocab // _LEVEL * _LEVEL)


def _level(x: Tensor, rows: int = 0) -> Tensor:
    """Rows of zeros after the last, so that batches of any size come as few shapes: oneDNN prepares (and keeps) code for each.

    Where x is to be cut into chunks of `rows`, a multiple of `_LEVEL`, its last chunk is levelled.
    """
    if x.dtype != torch.bfloat16:  # other products do not run in oneDNN
        return x
    last = x.shape[0] % rows if rows else x.shape[0]
    return F.pad(x, (0, 0, 0, -last % (_LEVEL if last > _LEVEL else _FINE)))


class _Output(NamedTuple):
    """How logits are made of hidden states: cap(hidden weight^T + bias), cap(z) = softcap tanh(z / softcap)."""

    weight: Tensor  # (V, D), in the dtype of the product
    bias: Tensor | None
    softcap: float | None

    def logits(self, h: Tensor, n: int) -> Tensor:
        """float32, of the first n rows."""
        z = multiply(h, self.weight)[:n].float()
        if self.bias is not None:
            z += self.bias
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, logits: Tensor) -> Tensor:
        """The derivative of the cap where it gave `logits`; only where there is a cap."""
        assert self.softcap is not None
        return torch.addcmul(logits.new_ones(()), logits, logits, value=-(self.softcap**-2))


def _chunk(
    out: _Output, h: Tensor, y: Tensor, smoothing: float, grad: Tensor | None, d_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss (float64) and correct ones of a few rows, (n, D) and targets (n, 1).

    The gradient of the logits goes into the first n rows of `grad`, its sum over rows is added to `d_bias`, each where given.
    """
    logits = out.logits(h, len(y))
    top, picked = logits.amax(dim=1, keepdim=True), logits.gather(1, y)
    probs = torch.softmax(logits, dim=1)
    # Exponentials are taken once: with z* the largest logit and p* its probability, log softmax(z) = z - z* + log p*.
    log_top = probs.amax(dim=1, keepdim=True).log_()
    correct = (picked >= top).sum()
    total = (top - picked - log_top).sum(dtype=torch.float64) * (1 - smoothing)
    if smoothing:
        total -= (logits - top + log_top).sum(dtype=torch.float64) * (smoothing / logits.shape[1])
    slope = None if out.softcap is None or grad is None else out.slope(logits)
    del logits
    if grad is not None:
        grad32 = probs.scatter_add_(1, y, torch.full_like(picked, smoothing - 1))
        if smoothing:
            grad32 -= smoothing / grad32.shape[1]
        if slope is not None:
            grad32 *= slope
        if d_bias is not None:
            d_bias += grad32.sum(0)
        grad[: len(y)] = grad32
    return total, correct


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is formed beside the loss, chunk by chunk, so logits are computed once and freed at once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        smoothing: float,
        dtype: torch.dtype,
        need: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor]:
        out = _Output(weight.to(dtype), bias, softcap)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if need[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need[1] else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if need[2] and bias is not None else None
        rows = _chunk_rows(weight.shape[0])
        for first in range(0, hidden.shape[0], _SPAN * rows):
            span = hidden[first : first + _SPAN * rows].to(dtype)
            n = span.shape[0]
            span = _level(span, rows)
            grads = span.new_empty(span.shape[0] if any(need) else 0, weight.shape[0])
            grads[n:] = 0
            for start in range(0, n, rows):
                at = slice(first + start, first + min(start + rows, n))
                h, y = span[start : start + rows], targets[at, None]
                grad = grads[start : start + rows] if any(need) else None
                loss, right = _chunk(out, h, y, smoothing, grad, d_bias)
                total += loss
                correct += right
                if d_hidden is not None and grad is not None:
                    d_hidden[at] = multiply(grad, out.weight.t())[: len(y)]
            if d_weight is not None:
                d_weight += outer(grads, span)
            del grads, grad  # before there are new ones
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(correct)
        return total.float(), correct

    @staticmethod
    @first_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place unless the graph is kept for another time: of a large vocabulary this is the largest gradient there is.
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        d_hidden, d_weight, d_bias = (
            None if d is None else d * grads[0].to(d.dtype) if kept else d.mul_(grads[0]) for d in ctx.saved_tensors
        )
        d_weight = None if d_weight is None else d_weight.to(ctx.dtypes[0])
        d_bias = None if d_bias is None else d_bias.to(ctx.dtypes[1])
        return d_hidden, d_weight, None, d_bias, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Sum over N of -log softmax(logits)[target], and how many targets no other token was more probable than.

    Logits are hidden weight^T + bias, and softcap tanh(logits / softcap) of these where there is a cap. With label smoothing e
    the loss of a token is (1 - e) of that, and e of the mean of -log softmax(logits) over the vocabulary (Szegedy et al. 2016,
    arXiv 1512.00567, section 7).

    Args:
        hidden: (N, D).
        weight: (V, D) output embedding.
        targets: (N,) int64 in [0, V).
        bias: (V,) or None.
        softcap: positive or None.
        smoothing: e, in [0, 1).

    Returns:
        loss sum (float32 scalar, nats) and correct count (int64 scalar).
    """
    # Asked here: a Function's forward sees requires_grad of weights even where nothing will ever be differentiated.
    on = torch.is_grad_enabled()
    need = (on and hidden.requires_grad, on and weight.requires_grad, on and bias is not None and bias.requires_grad)
    loss, correct = _LinearCrossEntropy.apply(hidden, weight, targets, bias, softcap, smoothing, compute_dtype(hidden), need)
    return loss, correct


class _TokenLogProbs(torch.autograd.Function):
    """Logits are computed again in the backward pass: two chunks in flight instead of N x V."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        out = _Output(weight.to(dtype), bias, softcap)
        logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        norms = torch.empty_like(logprobs)
        rows = _chunk_rows(weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            at = slice(start, start + rows)
            h, y = _level(hidden[at].to(dtype)), targets[at, None]
            logits = out.logits(h, len(y)).mul_(scale[at, None])
            norm = torch.logsumexp(logits, dim=1, keepdim=True)
            norms[at] = norm.squeeze(1)
            logprobs[at] = (logits.gather(1, y) - norm).squeeze(1)
            logits.sub_(norm)
            entropy[at] = torch.special.entr(logits.exp_()).sum(1)
        ctx.save_for_backward(hidden, weight, targets, scale, bias, norms)
        ctx.dtype, ctx.softcap = dtype, softcap
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @first_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, scale, bias, norms = ctx.saved_tensors
        dtype, upstream = ctx.dtype, grads[0]
        out = _Output(weight.to(dtype), bias, ctx.softcap)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        rows = _chunk_rows(weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            at = slice(start, start + rows)
            h, y = _level(hidden[at].to(dtype)), targets[at, None]
            factor = (upstream[at] * scale[at])[:, None]
            logits = out.logits(h, len(y))
            slope = None if ctx.softcap is None else out.slope(logits)
            probs = logits.mul_(scale[at, None]).sub_(norms[at, None]).exp_()
            grad32 = probs.mul_(-factor).scatter_add_(1, y, factor)
            if slope is not None:
                grad32 *= slope
            if d_bias is not None:
                d_bias += grad32.sum(0)
            grad = _level(grad32.to(dtype))
            d_hidden[at] = multiply(grad, out.weight.t())[: len(y)]
            d_weight += outer(grad, h)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_weight.to(weight.dtype), None, None, d_bias, None, None


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature)[target] per token, and the entropy of that distribution (no gradient).

    Args:
        hidden: (N, D).
        weight: (V, D).
        targets: (N,) int64.
        temperature: (N,) float32, positive.
        bias, softcap: of the logits, as in `linear_cross_entropy`.

    Returns:
        logprobs (N,) and entropy (N,), float32, nats.
    """
    scale = temperature.reciprocal()
    logprobs, entropy = _TokenLogProbs.apply(hidden, weight, targets, scale, bias, softcap, compute_dtype(hidden))
    return logprobs, entropy
