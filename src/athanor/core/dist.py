"""Ranks and collectives; on one process (torch.distributed not initialised) nothing is communicated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


def of_main(value: bool) -> bool:
    """What process 0 says, on every process."""
    if world_size() == 1:
        return value
    import torch.distributed

    told = [value]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        import torch.distributed

        torch.distributed.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Process 0 goes through the block before the others: it writes what they find there."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()
