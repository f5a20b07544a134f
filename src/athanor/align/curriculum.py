"""Which skills the next prompts come from: those that answers are sometimes right and sometimes wrong on teach most."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

_DECAY = 0.9  # of a skill's running success rate, per step in which it was asked
_FLOOR = 0.05  # weight that a mastered (or hopeless) skill keeps, so that its rate stays known


class Curriculum:
    """Running success rate of each skill; a skill's weight is p (1 - p), the variance of its reward, plus a floor.

    The state is a function of what `update` was given, so a resumed run rebuilds it from its logged records.

    Args:
        names: the skills; each starts at a rate of one half.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.rates = dict.fromkeys(names, 0.5)

    def update(self, rates: Mapping[str, float]) -> None:
        """Take the success rates of one step (of the skills that were asked in it)."""
        for name, rate in rates.items():
            self.rates[name] = _DECAY * self.rates[name] + (1 - _DECAY) * rate

    def draw(self, count: int, seed: int) -> dict[str, int]:
        """How many of `count` prompts each skill gets, in the order of the names; skills without any are left out."""
        names = list(self.rates)
        weights = [rate * (1 - rate) + _FLOOR for rate in self.rates.values()]
        drawn = random.Random(seed).choices(names, weights, k=count)
        return {name: drawn.count(name) for name in names if name in drawn}
