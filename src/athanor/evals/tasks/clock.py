"""Add tens of minutes to a time of day: the tens of the minutes first, a full hour carried over."""

from __future__ import annotations

import random

from athanor.evals.skill import Problem


def problem(rng: random.Random) -> Problem:
    hour, minute, more = rng.randrange(24), rng.randrange(60), rng.randrange(10, 60, 10)
    tens = minute // 10 + more // 10
    steps = f"{minute // 10}+{more // 10}={tens}"
    later = hour
    if tens > 5:
        later = (hour + 1) % 24
        steps += f", {tens}=6+{tens - 6}, {hour:02}+1={hour + 1:02}" + ", 24=24+00" * (later == 0)
    now, answer = f"{hour:02}:{minute:02}", f"{later:02}:{tens % 6}{minute % 10}"
    return Problem(
        key=f"{now}+{more}",
        question={
            "en": (f"What time is {more} minutes after {now}?", f"It is {now}. What time is it in {more} minutes?"),
            "zh": (f"{now}过{more}分钟是几点？", f"现在是{now}，{more}分钟后是几点？"),
        },
        reasoning=steps,
        answer=answer,
    )
