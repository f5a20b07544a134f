"""Round to nearest: weights as small whole numbers and scales, each rounded by itself.

Legend: N output features (rows), K input features (columns), G columns that share a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from athanor.core.errors import ConfigError

BITS = (8, 4)
GROUPS = (32, 64, 128)
_LEAST = torch.finfo(torch.float32).tiny  # scale of weights that are all zero


def check(bits: int, group: int | None) -> int | None:
    """The group size that `bits` and `group` mean: 8 bits take a scale per row unless told otherwise, 4 bits groups of 32.

    Raises ConfigError for bits and groups that there are not.
    """
    if bits not in BITS:
        raise ConfigError(
            f"bits is {bits} but must be 8 or 4: 8 changes next to nothing and 4 makes the smallest file; a model that is not"
            " quantised can be used as it is"
        )
    if group is not None and group not in GROUPS:
        raise ConfigError(f"group is {group} but must be 32, 64 or 128 columns (or, with 8 bits, none: a scale per row)")
    return GROUPS[0] if group is None and bits == 4 else group


def check_width(name: str, width: int, bits: int, group: int | None) -> None:
    """Raise ConfigError, naming what does fit, when `group` does not divide the `width` columns of matrix `name`."""
    if group is None or width % group == 0:
        return
    fits = [g for g in GROUPS if width % g == 0]
    remedy = f"use group {fits[-1]}" if fits else "none of 32, 64, 128 does: use bits 8 without group, one scale per row"
    raise ConfigError(f"group ({group}) must divide the {width} columns of {name}: {remedy}")


def quantise(weight: Tensor, bits: int, group: int | None) -> tuple[Tensor, Tensor]:
    """Nearest whole numbers of `bits` bits, symmetric about zero.

    With Q = 2^(bits - 1), for each row, or each run of G columns in it:

        scale = max |w| / (Q - 1/2), at least 2^-126, rounded up to bfloat16
        q     = min(round(w / scale), Q - 1)                                   halves to even; q >= -Q by choice of scale

    so |w - q scale| <= scale / 2 up to float32 rounding of the quotient, and the product q scale is exact in float32. The
    formula is that of compressed-tensors, which leaves the scale in the weight's dtype.

    Args:
        weight: (N, K), any floating dtype.
        bits: 8 or 4.
        group: G, which divides K; None for one scale per row.

    Returns:
        codes: 8 bits: q, (N, K) int8. 4 bits: q + 8, two per byte, even column in the low half, (N, K / 2) uint8.
        scale: (N, K / G) or (N, 1), float32 whose values bfloat16 holds exactly.

    Raises:
        ConfigError: the weight holds inf or nan.
    """
    half = 1 << (bits - 1)
    n, k = weight.shape
    w = weight.detach().float().reshape(n, -1, group or k)
    top = w.abs().amax(-1, keepdim=True)
    if not torch.isfinite(top).all():
        raise ConfigError("the weights hold inf or nan: take a checkpoint from before training diverged")
    scale = _up_to_bfloat16((top / (half - 0.5)).clamp_(min=_LEAST))
    q = (w / scale).round_().clamp_(max=half - 1).to(torch.int8).view(n, k)
    if bits == 4:
        q = q.add_(8).view(torch.uint8)
        q = q[:, 0::2] | (q[:, 1::2] << 4)
    return q, scale.squeeze(-1)


def _up_to_bfloat16(x: Tensor) -> Tensor:
    # Positive floats order as their bit patterns do, and bfloat16 is the upper half of float32.
    return ((x.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def integers(codes: Tensor) -> Tensor:
    """The whole numbers q that `codes` stand for, (N, K) int8."""
    if codes.dtype == torch.int8:
        return codes
    wide = codes.to(torch.int16)  # a byte becomes two: halves at bits 0-3 and 8-11, in the order of the columns
    return (wide << 4).bitwise_or_(wide).bitwise_and_(0x0F0F).view(torch.int8).sub_(8)


def dequantise(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """q scale, (N, K): the weights that `quantise` made `codes` and `scale` of, each off by half a scale at most.

    The product is rounded to `dtype` once: bfloat16 holds both factors exactly, others come from float32, which holds it too.
    """
    exact = dtype if dtype == torch.bfloat16 else torch.float32
    q = integers(codes).to(exact)
    return q.view(*scale.shape, -1).mul_(scale.to(exact).unsqueeze(-1)).view_as(q).to(dtype)
