"""Normalisations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product with x would run: autocast's where autocast is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _RMSNorm(torch.autograd.Function):
    """Fewer passes over memory than the composite of elementary operations: 1.7 times as fast (docs/log.md)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x32 = x.float()
        norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        rstd = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight, rstd)
        return (x32 * rstd).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dy = grads[0].float()
        normed = x.float() * rstd
        weighted = dy * normed
        d_weight = weighted.sum(dim=tuple(range(x.dim() - 1)))
        mean = weighted.mul_(weight).mean(dim=-1, keepdim=True)
        dx = (dy * weight).addcmul_(normed, mean, value=-1).mul_(rstd)
        return dx.to(x.dtype), d_weight.to(weight.dtype), None, None


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension (Zhang and Sennrich 2019).

    Statistics are computed in float32 whatever the dtype of x. The result has autocast's dtype under autocast (a
    matrix product follows), else that of x.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., dim) -> (..., dim)
        y: Tensor = _RMSNorm.apply(x, self.weight, self.eps, compute_dtype(x))
        return y
