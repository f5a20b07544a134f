"""The forward pass of experts by C++ of our own (`experts.cpp`), on CPUs with AVX-512 where there is a compiler.

Experts have few rows, so that PyTorch's products, one an expert, cost more to start than to compute (docs/adr/0008).

Legend: S rows in the order of their experts, D width, E experts, F inner width, U rows of `up` (2F with a gate, else F).
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from athanor.core import native
from athanor.core.device import supports_bf16

_SOURCE = Path(__file__).with_name("experts.cpp")
_TILE = 16  # rows that are computed together, as in experts.cpp
_RELU = {"relu": True, "silu": False, "swish": False}  # the activations there are
_CPU = torch.device("cpu")


def _function(dtype: torch.dtype) -> Any:
    """The function for a dtype, or None."""
    if dtype not in (torch.float32, torch.bfloat16) or (dtype == torch.bfloat16 and not supports_bf16(_CPU)):
        return None
    library = native.load(_SOURCE)
    return None if library is None else library.experts_bf16 if dtype == torch.bfloat16 else library.experts_fp32


def _matrix_unit() -> bool:
    """Whether the CPU has AMX, by which oneDNN multiplies many rows in bfloat16 several times as fast as vectors do."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def fits(width: int, hidden: int, activation: str, dtype: torch.dtype) -> bool:
    """Whether there is C++ for experts of such widths, D a multiple of 32 and F of 16, activation, silu or relu, and dtype."""
    return activation in _RELU and width % 32 == 0 and hidden % 16 == 0 and _function(dtype) is not None


def computes(x: Tensor, up: Tensor, down: Tensor, rows: int, activation: str) -> bool:
    """Whether `experts` is to compute this many rows of the width and dtype of x (..., D): plain tensors on a CPU that fit."""
    return (
        not any(is_traceable_wrapper_subclass(t) for t in (x, up, down))
        and x.dtype == up.dtype == down.dtype
        and x.device.type == up.device.type == down.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not (x.dtype == torch.bfloat16 and rows > 2 * _TILE * len(up) and _matrix_unit())
        and fits(down.shape[1], down.shape[2], activation, x.dtype)
    )


def experts(rows: Tensor, ends: Tensor, up: Tensor, down: Tensor, activation: str, keep: bool) -> tuple[Tensor | None, Tensor]:
    """down_e(act(gate_e x) * up_e x), or down_e(act(up_e x)), of every row x.

    Args:
        rows: (S, D), those of each expert together.
        ends: (E,) int32, where they end; rows after the last are of no expert, and what comes of them is undefined.
        up: (E, 2F, D), gates first, or (E, F, D).
        down: (E, D, F).
        activation: silu or relu.
        keep: whether to give the first product too.

    Returns:
        The first product (S, U), or None, and the second (S, D). Between the two values are rounded to the dtype as PyTorch's
        operations would; sums are of float32. A row's result is the same to the last bit whatever rows are beside it.
    """
    inner, y = torch.ops.athanor.experts(rows, ends, up, down, _RELU[activation], keep)
    return inner if keep else None, y


def _shaped(rows: Tensor, ends: Tensor, up: Tensor, down: Tensor, relu: bool, keep: bool) -> tuple[Tensor, Tensor]:
    return rows.new_empty(len(rows) if keep else 0, up.shape[1]), rows.new_empty(rows.shape)


def _experts(rows: Tensor, ends: Tensor, up: Tensor, down: Tensor, relu: bool, keep: bool) -> tuple[Tensor, Tensor]:
    n_experts, width, hidden = down.shape
    agree = rows.shape[1] == up.shape[2] == width and len(up) == n_experts and up.shape[1] in (hidden, 2 * hidden)
    if not agree or ends.shape != (n_experts,) or ends.dtype != torch.int32:
        raise ValueError(
            f"rows {tuple(rows.shape)}, ends {tuple(ends.shape)} {ends.dtype}, up {tuple(up.shape)} and down {tuple(down.shape)}"
            " do not go together: they must be (S, D), (E,) int32, (E, F or 2F, D) and (E, D, F)"
        )
    rows, ends, up, down = rows.contiguous(), ends.contiguous(), up.contiguous(), down.contiguous()
    inner, y = _shaped(rows, ends, up, down, relu, keep)
    tiles = len(rows) // _TILE + n_experts
    room = rows.new_empty(tiles * _TILE * width), rows.new_empty(tiles * _TILE * hidden)
    tensors = rows, ends, up, down, *room, inner if keep else None, y
    _function(rows.dtype)(
        *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors),
        *(ctypes.c_int64(n) for n in (n_experts, width, hidden)),
        *(ctypes.c_int(n) for n in (up.shape[1] > hidden, relu, torch.get_num_threads())),
    )
    return inner, y


# As one operation, for whoever looks at operations: a rehearsal of training counts what it makes without running it.
_LIBRARY = torch.library.Library("athanor", "FRAGMENT")
_LIBRARY.define("experts(Tensor rows, Tensor ends, Tensor up, Tensor down, bool relu, bool keep) -> (Tensor, Tensor)")
_LIBRARY.impl("experts", _experts, "CPU")
_LIBRARY.impl("experts", _shaped, "Meta")
