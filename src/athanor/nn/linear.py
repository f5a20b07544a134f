"""Matrix products, those of float32 on x86 CPUs by oneDNN where that pays, all others PyTorch's own. Legend: N rows, I in, O out.

PyTorch multiplies float32 by MKL and bfloat16 by oneDNN. oneDNN is the faster one for float32 too (docs/benchmarks.md), but it
prepares code for each number of rows, for as long as a small product takes. So it is asked only where rows are a multiple of
64: fixed shapes, as those of training and of whole batches, come again, and ragged ones are rarely such a multiple. Where MKL
leaves half of the processor's vectors unused, oneDNN is twice as fast at any number of rows: there rows of zeros are added, up to
one of the few numbers for which it shall have code.

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

from athanor.core.device import halves_mkl
from athanor.nn.derivatives import first_only
from athanor.nn.norms import Remake, compute_dtype, remake_of, version

_ROWS = 64
_WORK = 1 << 19  # multiplications that a product must have: to ask oneDNN takes ten microseconds


def _find() -> Any:
    """PyTorch's way to oneDNN's product, private but the same in 2.11 to 2.13; None where there is none."""
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return None
    try:
        return torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:
        return None


_POINTWISE = _find()
_HALVED = halves_mkl()


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


def _coarse(n: int) -> int:
    """n, filled up to one of the numbers of rows that code is made for: all up to 16, then at most an eighth more than n."""
    step = 1 if n <= 16 else max(16, 1 << (n.bit_length() - 4))
    return -(-n // step) * step


def _rows(x: Tensor, weight: Tensor, rows: int = _ROWS) -> int:
    """How many rows oneDNN is to be given, those of x or a few more; 0 where it is not to be asked."""
    if x.dtype != weight.dtype or not pays(x, x.dtype) or x.numel() * weight.shape[0] < _WORK:
        return 0
    if type(weight) not in (Tensor, nn.Parameter):  # of a kind that knows its own product
        return 0
    n = x.numel() // x.shape[-1]
    return n if n % rows == 0 else _coarse(n) if _HALVED else 0


def _shaped(rows: Tensor, x: Tensor) -> Tensor:
    """The first of (N, O) for each row of x (..., I) -> (..., O), and no view, which nobody may change in place."""
    first = rows if len(rows) * x.shape[-1] == x.numel() else rows[: x.numel() // x.shape[-1]]
    out: Tensor = torch.ops.aten._unsafe_view(first, [*x.shape[:-1], rows.shape[1]])
    return out


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int = 0) -> Tensor:
    """The product of oneDNN, given at least so many rows."""
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) < rows:
        flat = F.pad(flat, (0, 0, 0, rows - len(flat)))
    return _shaped(_POINTWISE(flat, weight, bias, "none", [], ""), x)


def multiply(x: Tensor, weight: Tensor, rows: int = _ROWS) -> Tensor:
    """x weight^T without a gradient: (N, I), (O, I) -> (N, O); `weight` may be a transposed view.

    `rows`: how coarse N is in what the caller asks, so that few of them ever come.
    """
    given = _rows(x, weight, rows)
    return _multiply(x, weight, None, given) if given else torch.mm(x, weight.t())


def outer(left: Tensor, right: Tensor) -> Tensor:
    """left^T right without a gradient: (N, A), (N, B) -> (A, B)."""
    fits = left.dtype == right.dtype and pays(left, left.dtype)
    if _HALVED and fits and len(left) % _ROWS == 0 and left.numel() * right.shape[1] >= _WORK:
        return _multiply(left.t(), right.t(), None)
    return torch.mm(left.t(), right)


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
        _PACKED[weight] = _Packed(half, version(weight))


def _ready(weight: Tensor) -> Tensor | None:
    found: _Packed | None = _PACKED.get(weight) if _PACKED else None
    return None if found is None or found.version != version(weight) else found.weight


def narrowed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight.to(dtype)` for weights of experts (E, O, I), or the copy that `pack` keeps; without gradients."""
    kept = None if weight.dtype == dtype or dtype != torch.bfloat16 or torch.compiler.is_compiling() else _ready(weight)
    return weight.to(dtype) if kept is None else kept


def _packed(x: Tensor, weight: Tensor) -> Tensor | None:
    if torch.compiler.is_compiling() or not _PACKED or x.device.type != "cpu" or compute_dtype(x) != torch.bfloat16:
        return None
    return _ready(weight) if 0 < x.numel() <= _FEW * x.shape[-1] else None


# A product as one operation, for compilers: into what is packed they cannot look, nor do they ask oneDNN.
_LIBRARY = torch.library.Library("athanor", "FRAGMENT")
_LIBRARY.define("product(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _own(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product in the dtype of x. What is packed is known by the weight itself, whatever its dtype."""
    same = weight if _packed(x, weight) is not None else weight.to(x.dtype)
    return product(x, same, None if bias is None else bias.to(x.dtype))


_LIBRARY.impl("product", _own, "CPU")
_LIBRARY.impl("product", lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])), "Meta")


def _opaque(x: Tensor) -> bool:
    """Whether a compiler is to see a product as one operation."""
    if _POINTWISE is None or not torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != "cpu":
        return False
    dtype = compute_dtype(x)
    return dtype == torch.bfloat16 or (dtype == torch.float32 and _HALVED)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `linear` computes, without a gradient of its own: (..., I), (O, I), (O,) -> (..., O)."""
    if _opaque(x):
        out: Tensor = torch.ops.athanor.product(x.to(compute_dtype(x)), weight, bias)
        return out
    ready = _packed(x, weight)
    if ready is not None:
        return _multiply(x.to(torch.bfloat16).contiguous(), ready, None if bias is None else bias.to(torch.bfloat16))
    rows = _rows(x, weight)
    return _multiply(x.contiguous(), weight, bias, rows) if rows else F.linear(x, weight, bias)


def unviewed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`product` without a gradient, and no view of something, for a Function to give."""
    return _shaped(product(x.reshape(-1, x.shape[-1]), weight, bias), x)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, remake: Remake | None) -> Tensor:
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        x = x.to(dtype).contiguous()
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.make = None if remake is None else remake.make
        of = (x,) if remake is None else remake.of
        ctx.save_for_backward(weight if need_x else None, *(of if need_weight else ()))
        return unviewed(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @first_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, *of = ctx.saved_tensors
        rows = grads[0].reshape(-1, grads[0].shape[-1])
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = multiply(rows, weight.to(rows.dtype).t()).view(ctx.shape).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            x = (of[0] if ctx.make is None else ctx.make(*of)).to(rows.dtype)
            d_weight = outer(rows, x.reshape(-1, x.shape[-1])).to(ctx.dtypes[1])
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
    if remake is None and not _rows(x, weight) and not _casts(x, weight):
        return product(x, weight, bias)
    out: Tensor = _Product.apply(x, weight, bias, compute_dtype(x), remake)
    return out


class Linear(nn.Linear):
    """`torch.nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        return linear(x, self.weight, self.bias)
