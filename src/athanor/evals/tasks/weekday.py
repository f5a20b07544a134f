"""Name the day of the week some weeks and days later: weeks change nothing, days count from Monday = 1, less sevens."""

from __future__ import annotations

import random

from athanor.evals.skill import Problem

DAYS = {
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "zh": ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"),
}


def problem(rng: random.Random) -> Problem:
    start, weeks, days = rng.randint(1, 7), rng.randint(2, 60), rng.randint(2, 9)
    total = start + days
    steps = f"{start}+{days}={total}"
    while total > 7:
        steps += f", {total}=7+{total - 7}"
        total -= 7
    en, zh = DAYS["en"][start - 1], DAYS["zh"][start - 1]
    return Problem(
        key=f"{en}+{weeks}w{days}d",
        question={
            "en": (
                f"What day is {weeks} weeks and {days} days after {en}?",
                f"Today is {en}. What day is it in {weeks} weeks and {days} days?",
            ),
            "zh": (f"{zh}过{weeks}周零{days}天是星期几？", f"今天是{zh}，{weeks}周零{days}天后是星期几？"),
        },
        reasoning=steps,
        answer={language: names[total - 1] for language, names in DAYS.items()},
    )
