"""Count the even numbers in a list, with a running tally."""

from __future__ import annotations

import random

from athanor.evals.skill import Problem


def problem(rng: random.Random) -> Problem:
    numbers = [rng.randint(10, 99) for _ in range(rng.randint(4, 6))]
    tally = [sum(n % 2 == 0 for n in numbers[: i + 1]) for i in range(len(numbers))]
    shown = ",".join(map(str, numbers))
    return Problem(
        key=",".join(map(str, sorted(numbers))),
        question={
            "en": (f"How many even numbers in {shown}?", f"Count the even numbers: {shown}"),
            "zh": (f"{shown}里有几个偶数？", f"数一数有几个偶数：{shown}"),
        },
        reasoning=",".join(f"{n % 10}:{count}" for n, count in zip(numbers, tally, strict=True)),
        answer=str(tally[-1]),
    )
