"""Subtract a two-digit number from a larger one: what is missing to the ones, the borrow, what is missing to the tens."""

from __future__ import annotations

import random

from athanor.evals.skill import Problem


def problem(rng: random.Random) -> Problem:
    b, a = sorted(rng.sample(range(10, 100), 2))
    (a1, a0), (b1, b0) = divmod(a, 10), divmod(b, 10)
    borrow = a0 < b0
    a0 += 10 * borrow
    # 12=7+5 rather than 12-7=5: a sum fact, which the skill `add` needs too, is learned sooner than a difference.
    steps = [f"{a0}={b0}+{a0 - b0}"]
    if borrow:
        steps.append(f"{a1}=1+{a1 - 1}")
        a1 -= 1
    steps.append(f"{a1}={b1}+{a1 - b1}")
    return Problem(
        key=f"{a}-{b}",
        question={
            "en": (f"What is {a}-{b}?", f"Take {b} from {a}.", f"Compute {a}-{b}."),
            "zh": (f"{a}-{b}等于多少？", f"计算{a}-{b}。", f"{a}减去{b}是多少？"),
        },
        reasoning=", ".join(steps),
        answer=str(a - b),
    )
