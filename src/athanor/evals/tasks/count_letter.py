"""Count how often a letter occurs: number the letters, strike those out, count the gaps."""

from __future__ import annotations

import random
from string import ascii_lowercase

from athanor.evals.skill import Problem


def problem(rng: random.Random) -> Problem:
    target, *letters = rng.sample(ascii_lowercase, rng.randint(4, 7))
    # Each gap takes the letter once at most: a repeat in a row leaves nothing to tell one from the other.
    for gap in sorted(rng.sample(range(len(letters)), rng.randint(0, 3)), reverse=True):
        letters.insert(gap, target)
    struck = [f"{i}{'_' if letter == target else letter}" for i, letter in enumerate(letters, 1)]
    shown = " ".join(letters)
    return Problem(
        key=f"{target} in {''.join(sorted(letters))}",
        question={
            "en": (f"How many {target} in {shown}?", f"Count the letter {target} in {shown}."),
            "zh": (f"字母 {target} 在 {shown} 中出现几次？", f"数一数有几个 {target} ： {shown}"),
        },
        reasoning=f"{target}: {''.join(struck)}",
        answer=str(letters.count(target)),
    )
