"""Continue an arithmetic progression: the step from the ones of two neighbours, then the step added or taken away."""

from __future__ import annotations

import random

from athanor.evals.skill import Problem


def problem(rng: random.Random) -> Problem:
    step, rising = rng.randint(1, 9), rng.random() < 0.5
    low = rng.randint(1, 190)
    terms = [low + step * i for i in range(rng.randint(4, 5))]
    *given, answer = terms if rising else terms[::-1]
    small, large = sorted(given[:2])
    (last1, last0), (tens, ones) = divmod(given[-1], 10), divmod(answer, 10)
    base = large % 10 + 10 * (large % 10 < small % 10)
    steps = [f"{base}={small % 10}+{step}"]
    if rising:
        steps.append(f"{last0}+{step}={last0 + step}")
    else:
        steps.append(f"{last0 + 10 * (last0 < step)}={step}+{ones}")
    if tens != last1:
        steps.append(f"{last1}+1={tens}" if rising else f"{last1}=1+{tens}")
    shown = ",".join(map(str, given))
    return Problem(
        key=f"{given[-1]},{answer}",
        question={
            "en": (f"What comes next: {shown}?", f"Continue {shown}."),
            "zh": (f"{shown}后面是几？", f"按规律写出下一个数：{shown}"),
        },
        reasoning=", ".join(steps),
        answer=str(answer),
    )
