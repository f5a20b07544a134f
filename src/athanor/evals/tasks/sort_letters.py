"""Put letters in alphabetical order, the next one found among those that are left."""

from __future__ import annotations

import random
from string import ascii_lowercase

from athanor.evals.skill import Problem


def problem(rng: random.Random) -> Problem:
    letters = rng.sample(ascii_lowercase, rng.randint(4, 6))
    ordered = sorted(letters)
    shown = " ".join(letters)
    return Problem(
        key="".join(ordered),
        question={
            "en": (f"Sort the letters {shown}.", f"Put in alphabetical order: {shown}"),
            "zh": (f"按字母顺序排列： {shown}", f"把 {shown} 按字母表排序。"),
        },
        reasoning="<".join(ordered),
        answer=" ".join(ordered),
    )
