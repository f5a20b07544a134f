"""1 for a right answer, 0 for a wrong one; a metric between them counts as it is."""

from __future__ import annotations

from athanor.align.outcome import Outcome


def reward(outcome: Outcome) -> float:
    """The skill's own metric."""
    return outcome.correct
