"""The layer that a quantised matrix lives in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athanor.compress import rtn
from athanor.nn.norms import compute_dtype

# Rows of x up to which torch's kernel for 8-bit weights is faster than making the weights whole (docs/log.md).
_FEW_ROWS = 16


class QuantLinear(nn.Module):
    """y = x W^T + b where W = q scale is held as whole numbers of 8 or 4 bits (see `rtn.quantise`); called as nn.Linear is.

    It computes in the dtype in which nn.Linear would (autocast's, else that of x). W is made whole in every call and nothing
    of it is kept; only a few rows in bfloat16 on a CPU go through torch's kernel for 8-bit weights. Gradients flow to x.

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

    @classmethod
    def of(cls, linear: nn.Linear, bits: int, group: int | None) -> QuantLinear:
        """The layer nearest to `linear`, on its device; the bias is kept as it is."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bits, group)
        codes, scale = rtn.quantise(linear.weight, bits, group)
        setattr(layer, f"weight_int{bits}", codes)
        layer.weight_scale, layer.bias = scale, linear.bias
        return layer.train(linear.training)

    @property
    def codes(self) -> Tensor:
        """The whole numbers, as `rtn.quantise` packs them."""
        codes: Tensor = getattr(self, f"weight_int{self.bits}")
        return codes

    def dequantised(self) -> Tensor:
        """W, (N, K) float32."""
        return rtn.dequantise(self.codes, self.weight_scale)

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        x = x.to(compute_dtype(x))
        y = self._product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _product(self, x: Tensor) -> Tensor:
        if self.group or x.dtype == torch.float16:  # x q^T would leave the range of float16
            return F.linear(x, self.dequantised().to(x.dtype))
        scale = self.weight_scale[:, 0].to(x.dtype)
        rows = x.numel() // self.in_features
        if x.dtype == torch.bfloat16 and rows <= _FEW_ROWS and x.device.type == "cpu" and not x.requires_grad:
            return torch._weight_int8pack_mm(x.reshape(rows, -1), self.codes, scale).view(*x.shape[:-1], -1)
        # Whole numbers up to 128 are exact in bfloat16, so a row's scale may as well wait for the product.
        return F.linear(x, self.codes.to(x.dtype)) * scale

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group}, bias={self.bias is not None}"
