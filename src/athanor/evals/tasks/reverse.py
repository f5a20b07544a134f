"""Reverse a string of letters: number them, then read the numbers downwards."""

from __future__ import annotations

import random
from string import ascii_lowercase

from athanor.evals.skill import Problem


def problem(rng: random.Random) -> Problem:
    letters = rng.sample(ascii_lowercase, rng.randint(4, 7))
    numbered = [f"{i}{letter}" for i, letter in enumerate(letters, 1)]
    shown = " ".join(letters)
    return Problem(
        key="".join(letters),
        question={
            "en": (f"Reverse {shown}.", f"Write backwards: {shown}"),
            "zh": (f"把 {shown} 倒过来写。", f"倒序写出： {shown}"),
        },
        reasoning="".join(numbered) + "," + "".join(reversed(numbered)),
        answer=" ".join(reversed(letters)),
    )
