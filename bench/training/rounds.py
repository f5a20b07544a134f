"""Contenders take turns, so that a ratio compares neighbours in time."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from athanor.core.device import tune_allocator

Round = Callable[[float], float]  # seconds at least -> tokens per second
Made = Callable[..., tuple[Mapping[str, Round], dict[str, float]]]  # -> contenders, and how long the first step of some took


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


def fastest(rates: Mapping[str, Sequence[float]], among: Iterable[str]) -> str:
    """The contender of the highest median."""
    return max(among, key=lambda name: statistics.median(rates[name]))


_HERE: dict[str, Round] = {}  # in the process of `elsewhere`: its contenders


def _begin(threads: int, tuned: bool) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    if tuned:
        tune_allocator()


def _settle(make: Made, given: Sequence[Any]) -> tuple[list[str], dict[str, float]]:
    made, waits = make(*given)
    _HERE.update(made)
    return list(made), waits


def _turn(name: str, seconds: float) -> float:
    return _HERE[name](seconds)


@contextmanager
def elsewhere(make: Made, *given: Any, tuned: bool) -> Iterator[tuple[dict[str, Round], dict[str, float]]]:
    """Contenders in a process of their own, which has as many threads; and of some how long their first step took, seconds.

    Settings of a process, as those of its allocator, are then each side's own.

    Args:
        make: called there with what is `given` -> contenders, and the waits of those that have one.
        tuned: whether that process has our settings of the allocator.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_begin, initargs=(torch.get_num_threads(), tuned)) as pool:
        names, waits = pool.submit(_settle, make, given).result()

        def turn(name: str, seconds: float) -> float:
            return pool.submit(_turn, name, seconds).result()

        yield {name: partial(turn, name) for name in names}, waits
