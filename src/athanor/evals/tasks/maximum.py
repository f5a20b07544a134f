"""Name the largest of several two-digit numbers: those with most tens, then the largest of them."""

from __future__ import annotations

import random

from athanor.evals.skill import Problem


def problem(rng: random.Random) -> Problem:
    numbers = rng.sample(range(10, 100), rng.randint(4, 5))
    shown = ",".join(map(str, numbers))
    in_top_ten = [n for n in numbers if n // 10 == max(numbers) // 10]
    return Problem(
        key=",".join(map(str, sorted(numbers))),
        question={
            "en": (f"What is the largest of {shown}?", f"Find the maximum: {shown}"),
            "zh": (f"{shown}中最大的是多少？", f"找出最大的数：{shown}"),
        },
        reasoning=",".join(map(str, in_top_ten)),
        answer=str(max(numbers)),
    )
