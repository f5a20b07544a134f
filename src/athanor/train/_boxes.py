"""Boxes of a tensor: what two have in common, and whether some of them are the whole tensor, each element once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Box:
    """A box of a whole tensor; of a scalar the empty tuples, whose volume is 1.

    at    where it begins, of each dimension
    size  its extent
    """

    at: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Elements in it."""
        return math.prod(self.size)

    def meet(self, other: Box) -> Box | None:
        """The box of the elements that both have; None where there is none."""
        at = tuple(max(a, b) for a, b in zip(self.at, other.at, strict=True))
        ends = zip(self.at, self.size, other.at, other.size, strict=True)
        size = tuple(min(a + n, b + m) - start for (a, n, b, m), start in zip(ends, at, strict=True))
        return Box(at, size) if all(n > 0 for n in size) else None

    def within(self, origin: tuple[int, ...]) -> tuple[slice, ...]:
        """The box as an index of a tensor whose first element lies at `origin` of the whole."""
        return tuple(slice(a - o, a - o + n) for a, o, n in zip(self.at, origin, self.size, strict=True))


def tiling_fault(shape: tuple[int, ...], boxes: Iterable[Box]) -> str | None:
    """Why `boxes` are not all of a tensor of `shape`, each element once; None where they are."""
    whole = Box((0,) * len(shape), shape)
    filled = sorted(box for box in boxes if box.volume)
    for box in filled:
        if len(box.at) != len(shape) or box.meet(whole) != box:
            return f"a piece at {box.at} of size {box.size} leaves it"
    # Sorted by where they begin in the first dimension, a box is compared with those alone that have not ended there.
    alive: list[Box] = []
    for box in filled:
        alive = [other for other in alive if not shape or other.at[0] + other.size[0] > box.at[0]]
        for other in alive:
            if other.meet(box):
                return f"pieces at {other.at} of size {other.size} and at {box.at} of size {box.size} overlap"
        alive.append(box)
    missing = whole.volume - sum(box.volume for box in filled)
    return f"{missing} of {whole.volume} elements are in no piece" if missing else None
