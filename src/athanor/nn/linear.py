"""Matrix products of float32 on x86 CPUs by oneDNN where that pays, everywhere else PyTorch's own. Legend: N rows, I in, O out.

PyTorch multiplies float32 by MKL and bfloat16 by oneDNN. oneDNN is the faster one for float32 too (docs/benchmarks.md), but it
prepares code for each number of rows, for as long as a small product takes. So it is asked only where rows are a multiple of
64: fixed shapes, as those of training and of whole batches, come again, and ragged ones are rarely such a multiple.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ROWS = 64


def _find() -> Any:
    """PyTorch's way to oneDNN's product, private but the same in 2.11 to 2.13; None where there is none."""
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return None
    try:
        return torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:
        return None


_POINTWISE = _find()


def pays(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether products of x in a dtype can be oneDNN's and are the faster for it, if their shapes come again."""
    return (
        _POINTWISE is not None
        and dtype == torch.float32
        and x.device.type == "cpu"
        and type(x) is Tensor
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _pays(x: Tensor, weight: Tensor, rows: int = _ROWS) -> bool:
    return (
        x.dtype == weight.dtype
        and pays(x, x.dtype)
        and x.shape[-1] > 0
        and x.numel() // x.shape[-1] % rows == 0
        and x.numel() > 0
        and type(weight) in (Tensor, nn.Parameter)  # not of a kind that knows its own product
    )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = _POINTWISE(x, weight, bias, "none", [], "")
    return out


def multiply(x: Tensor, weight: Tensor, rows: int = _ROWS) -> Tensor:
    """x weight^T without a gradient: (N, I), (O, I) -> (N, O); `weight` may be a transposed view.

    `rows`: how coarse N is in what the caller asks, so that few of them ever come.
    """
    return _multiply(x, weight, None) if _pays(x, weight, rows) else torch.mm(x, weight.t())


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        rows = grad.view(-1, grad.shape[-1])
        d_x = _multiply(rows, weight.t(), None).view(x.shape) if ctx.needs_input_grad[0] else None
        d_weight = torch.mm(rows.t(), x.view(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: (..., I), (O, I), (O,) -> (..., O), as `torch.nn.functional.linear` up to rounding."""
    if not _pays(x, weight):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _multiply(x.contiguous(), weight, bias)
    out: Tensor = _Product.apply(x.contiguous(), weight, bias)
    return out


class Linear(nn.Linear):
    """`torch.nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        return linear(x, self.weight, self.bias)
