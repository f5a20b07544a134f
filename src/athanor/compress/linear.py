"""The layer that a quantised matrix lives in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from athanor.compress import rtn
from athanor.nn.linear import linear
from athanor.nn.norms import compute_dtype

# Rows of x up to which torch's kernels for packed weights are faster than making the weights whole (docs/log.md), by bits.
_FEW_ROWS = {8: 16, 4: 64}


def _by_rows(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x (..., K) W^T with a scale for each row of W, (N, 1)."""
    width, factor = x.shape[-1], scale[:, 0].to(x.dtype)
    kernel = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not x.requires_grad
    # The kernel checks little: it reads past the end of odd widths.
    if kernel and width % 32 == 0 and x.numel() <= _FEW_ROWS[8] * width:
        return torch._weight_int8pack_mm(x.reshape(-1, width).contiguous(), codes, factor).view(*x.shape[:-1], len(codes))
    if x.numel() > width**2 or x.dtype == torch.float16:  # x q^T could leave the range of float16
        return linear(x, rtn.dequantise(codes, scale, x.dtype))
    # Whole numbers up to 128 are exact in every other dtype, so a row's scale may wait for the product while that is smaller.
    return linear(x, codes.to(x.dtype)).mul_(factor)


# PyTorch's compiler does not compile its own product of 8 bits: it is to see one operation.
_LIBRARY = torch.library.Library("athanor", "FRAGMENT")
_LIBRARY.define("by_rows(Tensor x, Tensor codes, Tensor scale) -> Tensor")
_LIBRARY.impl("by_rows", _by_rows, "CompositeExplicitAutograd")
_LIBRARY.impl("by_rows", lambda x, codes, scale: x.new_empty((*x.shape[:-1], codes.shape[0])), "Meta")


class QuantLinear(nn.Module):
    """y = x W^T + b where W = q scale is held as whole numbers of 8 or 4 bits (see `rtn.quantise`); called as nn.Linear is.

    It computes in the dtype in which nn.Linear would (autocast's, else that of x), and gradients flow to x. W is made whole in
    every call and nothing of it is kept. Only few rows in bfloat16 on a CPU go through torch's kernels, of which the one for
    4 bits wants the codes in an order of its own: that copy is made when it is first needed and stays.

    Args:
        in_features: K.
        out_features: N.
        bits: 8 or 4.
        group: columns that share a scale, or None for one scale per row.
        bias: whether there is a bias.
    """

    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int, bits: int, group: int | None, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group = in_features, out_features, bits, group
        width, dtype = (in_features, torch.int8) if bits == 8 else (in_features // 2, torch.uint8)
        self.register_buffer(f"weight_int{bits}", torch.zeros(out_features, width, dtype=dtype))
        self.register_buffer("weight_scale", torch.zeros(out_features, in_features // (group or in_features)))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self._reordered: tuple[Tensor, Tensor] | None = None
        self.register_load_state_dict_post_hook(_forget)

    @classmethod
    def of(cls, linear: nn.Linear, bits: int, group: int | None) -> QuantLinear:
        """The layer nearest to `linear`, with the same bias."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bits, group)
        codes, layer.weight_scale = rtn.quantise(linear.weight, bits, group)
        setattr(layer, f"weight_int{bits}", codes)
        layer.bias = linear.bias
        return layer.train(linear.training)

    @property
    def codes(self) -> Tensor:
        """The whole numbers, as `rtn.quantise` packs them."""
        codes: Tensor = getattr(self, f"weight_int{self.bits}")
        return codes

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W, (N, K)."""
        return rtn.dequantise(self.codes, self.weight_scale, dtype)

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        x = x.to(compute_dtype(x))
        if self.group is None:
            opaque = torch.compiler.is_compiling() and not torch.is_grad_enabled()
            y: Tensor = (torch.ops.athanor.by_rows if opaque else _by_rows)(x, self.codes, self.weight_scale)
        elif self.bits == 4 and self._suits(x):
            y = self._packed(x, self.group)
        else:
            y = linear(x, self.dequantised(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _suits(self, x: Tensor) -> bool:
        """Whether torch's kernel for 4 bits takes x."""
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.requires_grad:
            return False
        return self.out_features % 16 == 0 and x.numel() <= _FEW_ROWS[4] * self.in_features

    def _packed(self, x: Tensor, group: int) -> Tensor:
        if self._reordered is None:
            codes = torch._convert_weight_to_int4pack_for_cpu(rtn.integers(self.codes).int() + 8, 1)
            scale = self.weight_scale.t().to(x.dtype)
            self._reordered = codes, torch.stack((scale, torch.zeros_like(scale)), -1)
        rows = x.reshape(-1, self.in_features).contiguous()
        codes, scale_and_zero = self._reordered
        return torch._weight_int4pack_mm_for_cpu(rows, codes, group, scale_and_zero).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group}, bias={self.bias is not None}"


def _forget(module: nn.Module, incompatible_keys: object) -> None:
    module._reordered = None  # type: ignore[assignment]  # the hook's signature knows nn.Module alone
