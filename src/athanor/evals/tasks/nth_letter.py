"""Name the letter at a given place of a string: number the letters up to there."""

from __future__ import annotations

import random
from string import ascii_lowercase

from athanor.evals.skill import Problem


def problem(rng: random.Random) -> Problem:
    letters = rng.choices(ascii_lowercase, k=rng.randint(4, 8))
    n = rng.randint(1, len(letters))
    shown = " ".join(letters)
    return Problem(
        key=f"{n} of {''.join(letters)}",
        question={
            "en": (f"What is letter {n} of {shown}?", f"Give letter number {n}: {shown}"),
            "zh": (f"第{n}个字母是什么： {shown}", f"在 {shown} 中，第{n}个字母是哪个？"),
        },
        reasoning="".join(f"{i}{letter}" for i, letter in enumerate(letters[:n], 1)),
        answer=letters[n - 1],
    )
