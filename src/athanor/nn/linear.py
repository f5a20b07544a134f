"""Matrix products, those of float32 on x86 CPUs by oneDNN where that pays, all others PyTorch's own. Legend: N rows, I in, O out.

PyTorch multiplies float32 by MKL and bfloat16 by oneDNN. oneDNN is the faster one for float32 too (docs/benchmarks.md), but it
prepares code for each number of rows, for as long as a small product takes. So it is asked only where rows are a multiple of
64: fixed shapes, as those of training and of whole batches, come again, and ragged ones are rarely such a multiple.

Under autocast PyTorch keeps a copy of every weight in the dtype of the products until the backward pass is over. Here it is made
once more there: that is one pass over the weight, beside a product that reads it for every row.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

from athanor.nn.norms import Remake, compute_dtype, remake_of

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


class _Packed(NamedTuple):
    """A weight in bfloat16, a matrix in the order that oneDNN's product reads, and which state of the weight that is."""

    weight: Tensor
    version: int


_PACKED = WeakTensorKeyDictionary()  # by the weight itself: who drops the weight drops this
_FEW = 1024  # rows up to which a weight that is in order already is worth it: beyond, putting it in order costs little


def pack(weights: Iterable[Tensor]) -> None:
    """Keep a copy of these weights in bfloat16 while they live, matrices (O, I) as products of few rows read them fastest.

    A product of few rows takes as long as it takes to read the weight, and as oneDNN wants it in blocks it is put in order each
    time: half of the time of a single row (docs/log.md). Weights of experts (E, O, I) are kept in the order they have: under
    autocast they need not be narrowed for every token then. Nothing happens on machines without oneDNN. A copy counts for as
    long as its weight does not change in place; changes through `.data` go unseen, then `pack` has to be told again.
    """
    if _POINTWISE is None:
        return
    for weight in weights:
        if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16) or not weight.numel():
            continue
        half = weight.detach().to(torch.bfloat16).contiguous()
        if weight.dim() == 2:
            half = torch.ops.mkldnn._reorder_linear_weight(half, None)
        _PACKED[weight] = _Packed(half, weight._version)


def _ready(weight: Tensor) -> Tensor | None:
    found: _Packed | None = _PACKED.get(weight) if _PACKED else None
    return None if found is None or found.version != weight._version else found.weight


def narrowed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight.to(dtype)` for weights of experts (E, O, I), or the copy that `pack` keeps; without gradients."""
    kept = None if weight.dtype == dtype or dtype != torch.bfloat16 or torch.compiler.is_compiling() else _ready(weight)
    return weight.to(dtype) if kept is None else kept


def _packed(x: Tensor, weight: Tensor) -> Tensor | None:
    if torch.compiler.is_compiling() or not _PACKED or x.device.type != "cpu" or compute_dtype(x) != torch.bfloat16:
        return None
    return _ready(weight) if 0 < x.numel() <= _FEW * x.shape[-1] else None


# A product of few rows as one operation, for compilers: into what is packed they cannot look.
_LIBRARY = torch.library.Library("athanor", "FRAGMENT")
_LIBRARY.define("few(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _few(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    ready = _packed(x, weight)
    return F.linear(x, weight.to(x.dtype), bias) if ready is None else _multiply(x.contiguous(), ready, bias)


_LIBRARY.impl("few", _few, "CPU")
_LIBRARY.impl("few", lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])), "Meta")


def _opaque(x: Tensor) -> bool:
    """Whether a compiler is to see a product as one operation, since it may read what is packed."""
    if _POINTWISE is None or not torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return x.device.type == "cpu" and compute_dtype(x) == torch.bfloat16


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `linear` computes, without a gradient of its own: (..., I), (O, I), (O,) -> (..., O)."""
    if _opaque(x):
        out: Tensor = torch.ops.athanor.few(x.to(torch.bfloat16), weight, bias)
        return out
    ready = _packed(x, weight)
    if ready is not None:
        return _multiply(x.to(torch.bfloat16).contiguous(), ready, None if bias is None else bias.to(torch.bfloat16))
    return _multiply(x.contiguous(), weight, bias) if _pays(x, weight) else F.linear(x, weight, bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, remake: Remake | None) -> Tensor:
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        x = x.to(dtype).contiguous()
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.make = None if remake is None else remake.make
        of = (x,) if remake is None else remake.of
        ctx.save_for_backward(weight if need_x else None, *(of if need_weight else ()))
        return product(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, *of = ctx.saved_tensors
        rows = grads[0].reshape(-1, grads[0].shape[-1])
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = multiply(rows, weight.to(rows.dtype).t()).view(ctx.shape).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            x = (of[0] if ctx.make is None else ctx.make(*of)).to(rows.dtype)
            d_weight = torch.mm(rows.t(), x.reshape(-1, x.shape[-1])).to(ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            d_bias = rows.sum(0, dtype=ctx.dtypes[2])
        return d_x, d_weight, d_bias, None, None


def owns(weight: Tensor) -> bool:
    """Whether a weight's gradient may be formed here: not where it knows its own product, or a compiler sees more."""
    return not is_traceable_wrapper_subclass(weight) and not torch.compiler.is_compiling()


def _casts(x: Tensor, weight: Tensor) -> bool:
    """Whether autocast would copy this weight."""
    on, kinds = torch.is_autocast_enabled(x.device.type), (torch.float32, torch.bfloat16, torch.float16)
    return on and weight.dtype == torch.float32 and x.dtype in kinds and owns(weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: (..., I), (O, I), (O,) -> (..., O), as `torch.nn.functional.linear` up to rounding."""
    if not torch.is_grad_enabled():
        return product(x, weight, bias)
    remake = remake_of(x) if weight.requires_grad and owns(weight) else None
    if remake is None and not _pays(x, weight) and not _casts(x, weight):
        return product(x, weight, bias)
    out: Tensor = _Product.apply(x, weight, bias, compute_dtype(x), remake)
    return out


class Linear(nn.Linear):
    """`torch.nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        return linear(x, self.weight, self.bias)
