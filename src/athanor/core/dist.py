"""Ranks and collectives; on one process (torch.distributed not initialised) nothing is communicated."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def _initialised() -> bool:
    import torch.distributed

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """Number of this process, 0 .. world_size() - 1."""
    if not _initialised():
        return 0
    import torch.distributed

    return torch.distributed.get_rank()


def world_size() -> int:
    """How many processes work together."""
    if not _initialised():
        return 1
    import torch.distributed

    return torch.distributed.get_world_size()


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of `tensor` over all processes, a new tensor; the tensor itself where there is one process."""
    if world_size() == 1:
        return tensor
    import torch.distributed

    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total
