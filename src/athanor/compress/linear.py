"""The layer that a quantised matrix lives in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athanor.compress import rtn
from athanor.nn.norms import compute_dtype

# Rows of x up to which torch's kernels for packed weights are faster than making the weights whole (docs/log.md), by bits.
_FEW_ROWS = {8: 16, 4: 64}


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

    def dequantised(self) -> Tensor:
        """W, (N, K) float32."""
        return rtn.dequantise(self.codes, self.weight_scale)

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        x = x.to(compute_dtype(x))
        y = self._packed(x) if self._suits(x) else self._whole(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _whole(self, x: Tensor) -> Tensor:
        many = x.numel() > self.in_features**2
        if self.group or many or x.dtype == torch.float16:  # x q^T could leave the range of float16
            return F.linear(x, self.dequantised().to(x.dtype))
        # Whole numbers up to 128 are exact in every other dtype, so a row's scale may wait for the product while that is smaller.
        return F.linear(x, self.codes.to(x.dtype)).mul_(self.weight_scale[:, 0].to(x.dtype))

    def _suits(self, x: Tensor) -> bool:
        """Whether torch's kernels take x. They check little: the one for 8 bits reads past the end of odd widths."""
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.requires_grad:
            return False
        shape = self.group is None and self.in_features % 32 == 0 if self.bits == 8 else self.out_features % 16 == 0
        return shape and x.numel() <= _FEW_ROWS[self.bits] * self.in_features

    def _packed(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).contiguous()
        if self.bits == 8:
            y = torch._weight_int8pack_mm(rows, self.codes, self.weight_scale[:, 0].to(x.dtype))
        else:
            assert self.group is not None, "4 bits always have groups"
            if self._reordered is None:
                codes = torch._convert_weight_to_int4pack_for_cpu(rtn.integers(self.codes).int() + 8, 1)
                scale = self.weight_scale.t().to(x.dtype)
                self._reordered = codes, torch.stack((scale, torch.zeros_like(scale)), -1)
            codes, scale_and_zero = self._reordered
            y = torch._weight_int4pack_mm_for_cpu(rows, codes, self.group, scale_and_zero)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group}, bias={self.bias is not None}"


def _forget(module: nn.Module, incompatible_keys: object) -> None:
    module._reordered = None  # type: ignore[assignment]  # the hook's signature knows nn.Module alone
