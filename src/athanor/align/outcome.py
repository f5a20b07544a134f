"""What a reward may look at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """One answer, judged.

    correct      the skill's metric, in [0, 1]
    well_formed  <think> reasoning </think> answer <|end|>, nothing else
    stopped      it ended by itself
    tokens       its length
    """

    correct: float
    well_formed: bool
    stopped: bool
    tokens: int
