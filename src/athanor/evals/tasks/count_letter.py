"""Count how often a letter occurs, with its number and a running tally beside each letter."""

from __future__ import annotations

import random
from string import ascii_lowercase

from athanor.evals.skill import Problem


def problem(rng: random.Random) -> Problem:
    pool = rng.sample(ascii_lowercase, rng.randint(2, 4))
    letters = rng.choices(pool, k=rng.randint(5, 9))
    target = pool[0]
    tally = [letters[: i + 1].count(target) for i in range(len(letters))]
    shown = " ".join(letters)
    return Problem(
        key=f"{target} in {''.join(sorted(letters))}",
        question={
            "en": (f"How many {target} in {shown}?", f"Count the letter {target} in {shown}."),
            "zh": (f"字母 {target} 在 {shown} 中出现几次？", f"数一数有几个 {target} ： {shown}"),
        },
        reasoning=",".join(f"{i}{letter}{count}" for i, (letter, count) in enumerate(zip(letters, tally, strict=True), 1)),
        answer=str(tally[-1]),
    )
