"""Positions. Legend: B batch, T time, H heads, K head width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021) in Hugging Face's half-split layout.

    Pair i of a head, (x[i], x[i + K/2]), is turned by the angle t f_i at position t, f_i = theta^(-2i/K). Tables are built in
    float64 and stay float32 whatever the module is cast to: in bfloat16 neighbouring positions fall together past 256.

    They are no part of any file. They live on the CPU until the module is moved, even in a model that is built on no device,
    and grow to the positions that were asked for.

    Args:
        dim: K, even; what is wider than K is turned in its first K entries only (partial rotation).
        max_positions: positions must stay below it.
        theta: base of the frequencies.
        frequencies: (K/2,) float64, the f_i where they are others than theta's (`rope.py`).
        magnitude: factor of what is turned.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        dim: int,
        max_positions: int,
        theta: float = 10_000.0,
        frequencies: Tensor | None = None,
        magnitude: float = 1.0,
    ) -> None:
        super().__init__()
        if frequencies is None:
            frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
        self.max_positions, self.magnitude = max_positions, magnitude
        self._frequencies = frequencies
        self.register_buffer("cos", torch.empty(0, dim, device="cpu"), persistent=False)
        self.register_buffer("sin", torch.empty(0, dim, device="cpu"), persistent=False)

    def _grow(self, extent: int) -> None:
        assert extent <= self.max_positions, f"position {extent - 1} of {self.max_positions}"
        rows = min(self.max_positions, max(256, 1 << (extent - 1).bit_length()))
        # Made in ordinary mode even while generating: training goes on with the same tables.
        with torch.inference_mode(False), torch.no_grad():
            angle = torch.outer(torch.arange(rows, dtype=torch.float64, device="cpu"), self._frequencies)
            cos, sin = (angle.cos() * self.magnitude).float(), (angle.sin() * self.magnitude).float()
            # The second half of sin carries the sign of the rotation, so that turning is x * cos + swapped(x) * sin.
            self.cos, self.sin = (torch.cat(x, -1).to(self.cos.device) for x in ((cos, cos), (-sin, sin)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        # `module.to(torch.bfloat16)` and its like come here: the tables follow to another device, never to another dtype.
        device = fn(torch.empty(0, device=self.cos.device)).device
        self.cos, self.sin = self.cos.to(device), self.sin.to(device)
        return self

    def reserve(self, extent: int) -> None:
        """Make the tables long enough for positions below `extent`, so that they need not grow later."""
        if extent > self.cos.shape[0]:
            self._grow(extent)

    def at(self, positions: Tensor, extent: int, cached: bool = False) -> tuple[Tensor, Tensor]:
        """cos and sin for `positions` (B, T), as (B or 1, T, 1, K), to meet heads (B, T, H, K).

        Args:
            positions: of the tokens.
            extent: all are below it.
            cached: whether keys go to a cache; frequencies that depend on a sequence's length (`rope.py`) have to know.
        """
        if positions.stride(0) == 0:  # one row that stands for all
            positions = positions[:1]
        if extent > self.cos.shape[0]:
            self._grow(extent)
        return self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)


_FEW = 1 << 16  # numbers of which a call takes longer than its work


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((_turn(x[..., :width], cos, sin), x[..., width:]), -1)
    half = width // 2
    # Converted once, and halves in place: half the time of products of mixed dtypes and a swapped copy.
    wide = x.to(cos.dtype)
    out = wide * cos
    if torch.compiler.is_compiling() or x.numel() <= _FEW:  # no compiler is to make one function for few and one for many
        out = torch.addcmul(out, wide.roll(half, -1), sin)
    else:
        out[..., :half].addcmul_(wide[..., half:], sin[..., :half])
        out[..., half:].addcmul_(wide[..., :half], sin[..., half:])
    return out if out.dtype == x.dtype else out.to(x.dtype)  # so, and not in place, for torch 2.11: see `norms.py`


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
    if not torch.is_grad_enabled():
        return _turn(x, cos, sin)
    y: Tensor = _Rotate.apply(x, cos, sin)
    return y


def sinusoids(max_positions: int, dim: int, interleaved: bool = True) -> Tensor:
    """Table (max_positions, dim) float32 of sin(t f_i) and cos(t f_i), f_i = 10000^(-2i/dim) (Vaswani et al. 2017, section 3.5).

    Args:
        max_positions: rows.
        dim: even.
        interleaved: sine and cosine of a frequency stand side by side, as in the paper; else all sines stand first.
    """
    frequency = 10_000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    angle = torch.outer(torch.arange(max_positions, dtype=torch.float64, device="cpu"), frequency)
    both = torch.stack((angle.sin(), angle.cos()), -1) if interleaved else torch.stack((angle.sin(), angle.cos()), 1)
    return both.reshape(max_positions, dim).float()
