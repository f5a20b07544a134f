"""Add two two-digit numbers: the ones, the carry, the tens."""

from __future__ import annotations

import random

from athanor.evals.skill import Problem


def problem(rng: random.Random) -> Problem:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    (a1, a0), (b1, b0) = divmod(a, 10), divmod(b, 10)
    steps = [f"{a0}+{b0}={a0 + b0}"]
    if a0 + b0 > 9:
        steps.append(f"{a1}+1={a1 + 1}")
        a1 += 1
    steps.append(f"{a1}+{b1}={a1 + b1}")
    return Problem(
        key=f"{min(a, b)}+{max(a, b)}",
        question={
            "en": (f"What is {a}+{b}?", f"Add {a} and {b}.", f"Compute {a}+{b}."),
            "zh": (f"{a}+{b}等于多少？", f"计算{a}+{b}。", f"{a}加{b}是多少？"),
        },
        reasoning=", ".join(steps),
        answer=str(a + b),
    )
