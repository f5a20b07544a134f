"""Shares with their uncertainty."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from athanor.core.errors import DataError

_Z = 1.959963984540054  # two-sided 95 % of the normal distribution


@dataclass(frozen=True, slots=True)
class Score:
    """A share of `n` trials with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


class Judged(Protocol):
    """What is summarised (`harness.Result` is one)."""

    @property
    def skill(self) -> str: ...
    @property
    def language(self) -> str: ...
    @property
    def correct(self) -> float: ...
    @property
    def well_formed(self) -> bool: ...
    @property
    def stopped(self) -> bool: ...


def wilson(successes: float, n: int) -> Score:
    """Wilson's score interval (1927): (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).

    Args:
        successes: in [0, n]; metrics between 0 and 1 may be summed.
        n: trials, at least one.

    Raises:
        DataError: no trials, or successes outside [0, n].
    """
    if n < 1 or not 0 <= successes <= n:
        raise DataError(f"{successes} successes of {n} trials is no share: there must be a trial, and 0 to {n} successes")
    p = successes / n
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return Score(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), n)


def summarise(results: Sequence[Judged]) -> dict[str, Any]:
    """Accuracy over all, per skill and per language, and the rates of well-formed and of stopped answers, as plain JSON."""

    def share(chosen: Iterable[Judged]) -> dict[str, Any]:
        values = [r.correct for r in chosen]
        return asdict(wilson(sum(values), len(values)))

    skills: dict[str, list[Judged]] = defaultdict(list)
    languages: dict[str, list[Judged]] = defaultdict(list)
    for r in results:
        skills[r.skill].append(r)
        languages[r.language].append(r)
    return {
        "accuracy": share(results),
        "format_rate": sum(r.well_formed for r in results) / len(results),
        "stop_rate": sum(r.stopped for r in results) / len(results),
        "skills": {name: share(group) for name, group in sorted(skills.items())},
        "languages": {name: share(group) for name, group in sorted(languages.items())},
    }
