"""Positions. Legend: B batch, T time, H heads, K head width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021) in Hugging Face's half-split layout.

    Pair i of a head, (x[i], x[i + K/2]), is turned by the angle t * theta^(-2i/K) at position t. Tables are built in
    float64 and stay float32 whatever the module is cast to: in bfloat16 neighbouring positions fall together past 256.

    They live on the CPU until the module is moved, even in a model that is built on no device: no file holds them.

    Args:
        head_dim: K, even.
        max_positions: rows of the table; positions must stay below it.
        theta: base of the frequencies.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_positions: int, theta: float = 10_000.0) -> None:
        super().__init__()
        frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
        angle = torch.outer(torch.arange(max_positions, dtype=torch.float64, device="cpu"), frequency)
        cos, sin = angle.cos().float(), angle.sin().float()
        # The second half of sin carries the sign of the rotation, so that turning is x * cos + swapped(x) * sin.
        self.register_buffer("cos", torch.cat((cos, cos), -1), persistent=False)
        self.register_buffer("sin", torch.cat((-sin, sin), -1), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        # `module.to(torch.bfloat16)` and its like come here: the tables follow to another device, never to another dtype.
        device = fn(torch.empty(0, device=self.cos.device)).device
        self.cos, self.sin = self.cos.to(device), self.sin.to(device)
        return self

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rows for `positions` (B, T) as (B, T, 1, K), to meet heads (B, T, H, K)."""
        return self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), -1)
    return (x * cos).addcmul_(swapped, sin).to(x.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, -sin), None, None  # the inverse of a rotation is the rotation back


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (B, T, H, K) by the tables of `Rotary.at`; computed in float32, returned in x's dtype."""
    y: Tensor = _Rotate.apply(x, cos, sin)
    return y
