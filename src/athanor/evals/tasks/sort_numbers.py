"""Sort two-digit numbers in ascending order: first the tens alone, then each with its ones."""

from __future__ import annotations

import random

from athanor.evals.skill import Problem


def problem(rng: random.Random) -> Problem:
    numbers = rng.sample(range(10, 100), rng.randint(3, 4))
    ordered = sorted(numbers)
    shown = ",".join(map(str, numbers))
    return Problem(
        key=",".join(map(str, ordered)),
        question={
            "en": (f"Sort {shown}.", f"Put in ascending order: {shown}", f"Sort from small to large: {shown}"),
            "zh": (f"从小到大排列：{shown}", f"把{shown}从小到大排序。"),
        },
        reasoning=",".join(str(n // 10) for n in ordered),
        answer=",".join(map(str, ordered)),
    )
