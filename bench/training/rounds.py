"""Contenders take turns, so that a ratio compares neighbours in time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Round = Callable[[float], float]  # seconds at least -> tokens per second


@dataclass(frozen=True)
class Timing:
    """How it is timed: seconds of each contender, at least, in so many rounds, by what clock."""

    seconds: float
    rounds: int
    clock: Callable[[], float] = time.perf_counter


def repeated(step: Callable[[], int], clock: Callable[[], float]) -> Round:
    """Rounds of a step that returns how many tokens it trained on; the first step of a round is not timed."""

    def run(seconds: float) -> float:
        step()
        tokens, steps, start = 0, 0, clock()
        while (elapsed := clock() - start) < seconds or steps < 2:
            tokens += step()
            steps += 1
        return tokens / elapsed

    return run


def take_turns(contenders: Mapping[str, Round], timing: Timing) -> dict[str, list[float]]:
    """Tokens per second of each contender in each round; every other round goes backwards, against drift of the machine."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(timing.rounds):
        for name in list(contenders)[:: -1 if i % 2 else 1]:
            rates[name].append(contenders[name](timing.seconds / timing.rounds))
    return rates


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds, each of which compares neighbours in time."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
