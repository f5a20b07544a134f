"""1 for an answer that keeps to the form: one <think> block, then an answer, then the end."""

from __future__ import annotations

from athanor.align.outcome import Outcome


def reward(outcome: Outcome) -> float:
    """Whether the answer is well formed."""
    return float(outcome.well_formed)
