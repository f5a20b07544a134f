"""Which part of a whole tensor a process holds: with it a checkpoint is read under any layout, whatever wrote it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A box of a whole tensor.

    local  where it begins in the tensor that this process holds, of each dimension
    whole  where it begins in the whole tensor
    size   its extent
    """

    local: tuple[int, ...]
    whole: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True)
class Held:
    """What a process holds of one tensor.

    shape   of the whole tensor
    pieces  boxes that together are all of the local tensor
    writes  whether this process is the one, among those that hold the same, that writes it into checkpoints
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    writes: bool = True


def whole(tensor: Tensor, writes: bool = True) -> Held:
    """All of it."""
    shape = tuple(tensor.shape)
    return Held(shape, (Piece((0,) * len(shape), (0,) * len(shape), shape),), writes)
