"""Continue an arithmetic progression: the step from the ones of the last two numbers, then one step on."""

from __future__ import annotations

import random

from athanor.evals.skill import Problem


def problem(rng: random.Random) -> Problem:
    step, first = rng.randint(1, 9), rng.randint(1, rng.choice((60, 360)))
    given = [first + step * i for i in range(rng.randint(3, 4))]
    last, answer = given[-1], given[-1] + step
    before, ones = given[-2] % 10, last % 10
    steps = [f"{before + step}={before}+{step}", f"{ones}+{step}={ones + step}"]
    if ones + step > 9:
        steps.append(f"{last // 10}+1={answer // 10}")
    shown = ",".join(map(str, given))
    return Problem(
        key=f"{last},{answer}",
        question={
            "en": (f"What comes next: {shown}?", f"Continue {shown}."),
            "zh": (f"{shown}后面是几？", f"按规律写出下一个数：{shown}"),
        },
        reasoning=", ".join(steps),
        answer=str(answer),
    )
