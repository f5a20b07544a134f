"""Name the larger or the smaller of two three-digit numbers, digit by digit from the left."""

from __future__ import annotations

import random

from athanor.evals.skill import Problem


def problem(rng: random.Random) -> Problem:
    common = rng.randint(0, 2)  # digits in which both agree
    a = rng.randint(100, 999)
    b = a
    while b == a or b < 100:
        unit = 10 ** (3 - common)
        b = a // unit * unit + rng.randrange(unit)
    steps = []
    for x, y in zip(str(a), str(b), strict=True):
        steps.append(f"{x}:{y}{'<' if x < y else '>' if x > y else '='}")
        if x != y:
            break
    larger = rng.random() < 0.5
    en, zh = ("larger", "大") if larger else ("smaller", "小")
    return Problem(
        key=f"{en} {min(a, b)} {max(a, b)}",
        question={
            "en": (f"Which is {en}, {a} or {b}?", f"Give the {en} of {a} and {b}."),
            "zh": (f"{a}和{b}哪个更{zh}？", f"{a}与{b}中较{zh}的是哪个？"),
        },
        reasoning=", ".join(steps),
        answer=str(max(a, b) if larger else min(a, b)),
    )
