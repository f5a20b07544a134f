"""Random requests, the same for everybody."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Ask:
    """A prompt and how many tokens are wanted."""

    prompt: list[int]
    new: int


class Mix:
    """`count` requests from a seed."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._random = count, random.Random(seed)

    def ids(self, length: int, vocab_size: int) -> list[int]:
        """Tokens, none of them one of the first, which control."""
        return [self._random.randrange(20, vocab_size) for _ in range(length)]

    def requests(self, low: int, high: int, vocab_size: int) -> list[Ask]:
        """Prompts and answers of low..high tokens."""
        draw = self._random.randint
        return [Ask(self.ids(draw(low, high), vocab_size), draw(low, high)) for _ in range(self._count)]
