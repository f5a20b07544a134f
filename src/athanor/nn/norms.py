"""Normalisations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from athanor.nn.derivatives import first_only


class Remake(NamedTuple):
    """How a tensor is made once more, bit for bit, of others that a backward pass holds anyway: it need not be kept itself.

    versions  of the tensor and of what it is made of, when it was made: after a change in place it would be made otherwise
    """

    of: tuple[Tensor, ...]
    make: Callable[..., Tensor]
    versions: tuple[int, ...]


def version(x: Tensor) -> int:
    """How often a tensor was changed in place, as PyTorch counts it; 0 for those of inference mode, where it does not."""
    return 0 if x.is_inference() else x._version


def remake_of(x: Tensor) -> Remake | None:
    """How x is made once more, where whoever made it left word and nothing has changed since."""
    found: Remake | None = getattr(x, "_remake", None)
    return found if found is None or found.versions == tuple(map(version, (x, *found.of))) else None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product with x would run: autocast's where autocast is on, else x's own; float64 stays."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype


def _normalised(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """What `RMSNorm` gives, and of it the factor and one over the root mean square."""
    factor = weight.float() + offset if offset else weight
    x32 = x.float()
    norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
    rstd = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
    y = x32 * rstd
    # torch 2.11 compiles a Function to gradients of zero where what it gives was made in place, or by a `to` that does nothing.
    y = y * factor if torch.compiler.is_compiling() else y.mul_(factor)
    return y if y.dtype == dtype else y.to(dtype), factor, rstd


class _RMSNorm(torch.autograd.Function):
    """Fewer passes over memory than the composite of elementary operations: 1.7 times as fast (docs/log.md)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, offset: float) -> Tensor:
        ctx.kind = weight.dtype
        y, factor, rstd = _normalised(x, weight, eps, dtype, offset)
        ctx.save_for_backward(x, factor, rstd)
        return y

    @staticmethod
    @first_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dy = grads[0].float()
        normed = x.float() * rstd
        weighted = dy * normed
        rows = tuple(range(x.dim() - weight.dim()))
        d_weight = weighted.sum(rows) if rows else weighted.clone()
        mean = weighted.mul_(weight).mean(dim=-1, keepdim=True)
        dx = (dy * weight).addcmul_(normed, mean, value=-1).mul_(rstd)
        return dx.to(x.dtype), d_weight.to(ctx.kind), None, None, None


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * (weight + offset), over the last dimension (Zhang and Sennrich 2019).

    Statistics are computed in float32 whatever the dtype of x. The result has autocast's dtype under autocast (a
    matrix product follows), else that of x.

    Args:
        dim: of x's last dimension.
        eps: added to the mean square.
        offset: 1 where files hold how far the factor is from one (Gemma).
    """

    def __init__(self, dim: int, eps: float = 1e-5, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:  # (..., dim) -> (..., dim)
        return rms_norm(x, self.weight, self.eps, self.offset)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """What `RMSNorm` computes. A weight (H, dim) is one for each of the heads of x (..., H, dim)."""
    if not torch.is_grad_enabled():
        return _normalised(x, weight, eps, compute_dtype(x), offset)[0]
    dtype = compute_dtype(x)
    y: Tensor = _RMSNorm.apply(x, weight, eps, dtype, offset)
    if not torch.compiler.is_compiling():
        of = x, weight
        y._remake = Remake(of, partial(_renormalised, eps, dtype, offset), tuple(map(version, (y, *of))))  # type: ignore[attr-defined]  # our own, see `remake_of`
    return y


def _renormalised(eps: float, dtype: torch.dtype, offset: float, x: Tensor, weight: Tensor) -> Tensor:
    return _normalised(x, weight, eps, dtype, offset)[0]
