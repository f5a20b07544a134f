"""Watching over a run: steps whose loss jumps are skipped or undone, and a run that no longer improves is ended.

Both are pure Python; their state is plain JSON that lies in checkpoints, so that a resumed run decides as the uninterrupted one
(law L4), and what they are told is the same on all processes, so that all decide alike.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from athanor.core.errors import CheckpointError, ConfigError, TrainingError, nearest

Action = Literal["none", "skip", "rollback"]
# Least deviations, as a share of the median and at all: where all values are nearly equal, a hair's breadth is no jump.
FLOOR, TINY = 0.01, 1e-6


@dataclass(frozen=True)
class SpikeConfig:
    action: Action = "none"
    """What is done where loss or gradient norm jumps: none, skip (no update), or rollback (to the last checkpoint)."""
    factor: float = 12.0
    """Median absolute deviations above the median of the last steps from which on it counts as a jump."""
    window: int = 64
    """Steps that it is compared with; until there are so many, none is judged."""
    most: int = 10
    """Jumps in the whole run beyond which it ends with an error."""

    def __post_init__(self) -> None:
        if self.action not in ("none", "skip", "rollback"):
            raise ConfigError(f"action ({self.action!r}) must be 'none', 'skip' or 'rollback': choose one of them")
        if not self.factor > 0:
            raise ConfigError(f"factor ({self.factor}) must be above 0: 12 lets pass what training usually does")
        if self.window < 4:
            raise ConfigError(f"window ({self.window}) must be at least 4 steps: a median of fewer says nothing")
        if self.most < 0:
            raise ConfigError(f"most ({self.most}) must be at least 0: 0 ends the run at the first jump")


def threshold(values: list[float], factor: float) -> float:
    """median + factor x MAD, the median absolute deviation, which is taken as FLOOR x |median| and TINY at least."""
    middle = median(values)
    return middle + factor * max(median(abs(v - middle) for v in values), FLOOR * abs(middle), TINY)


class Guard:
    """Judges each step by its loss and gradient norm before the update.

    Attributes:
        skipped, rolled_back: steps so far that were.
        shift: where the data goes on: step s takes the batches of s + shift. Each rollback adds the steps that it undid, so that
            the run meets other data than that which led it astray.
    """

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.skipped = self.rolled_back = self.shift = 0
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)

    def judge(self, step: int, loss: float, grad_norm: float, checkpoint: int | None = None) -> Action:
        """What to do with `step` (counted from 0): "none" is to update as usual.

        Args:
            step: whose gradients are there.
            loss: its mean loss, finite, and `grad_norm` before clipping.
            checkpoint: the step at which the newest checkpoint goes on, None where there is none: then a step that asks for a
                rollback is skipped.

        Raises:
            TrainingError: more than `most` steps jumped.
        """
        if self.config.action == "none":
            return "none"
        jumped = self._jump("loss", loss, self._losses) or self._jump("gradient norm", grad_norm, self._norms)
        if not jumped:
            self._losses.append(loss)
            self._norms.append(grad_norm)
            return "none"
        if self.skipped + self.rolled_back >= self.config.most:
            raise TrainingError(
                f"step {step + 1}: {jumped}, and {self.skipped + self.rolled_back} steps jumped before it, as many as `most`"
                f" allows: lower the learning rate, look at the data, or raise factor ({self.config.factor:g})"
            )
        if self.config.action == "rollback" and checkpoint is not None:
            self.rolled_back += 1
            self.shift += step + 1 - checkpoint
            return "rollback"
        self.skipped += 1
        return "skip"

    def _jump(self, what: str, value: float, seen: deque[float]) -> str:
        """How `value` jumped, in words, or "" where it did not."""
        if len(seen) < self.config.window:
            return ""
        limit = threshold(list(seen), self.config.factor)
        return f"its {what} is {value:.4g}, above {limit:.4g}" if value > limit else ""

    def record(self) -> dict[str, int]:
        """What joins a step's record; empty where nothing is guarded."""
        return {} if self.config.action == "none" else {"skipped": self.skipped, "rolled_back": self.rolled_back}

    def state(self) -> dict[str, Any]:
        """Everything that later judgements depend on, as plain JSON."""
        counts = {"skipped": self.skipped, "rolled_back": self.rolled_back, "shift": self.shift}
        return counts | {"losses": list(self._losses), "norms": list(self._norms)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()` of another. Raises CheckpointError when it is none."""
        _check("guard", state, self.state())
        self.skipped, self.rolled_back, self.shift = state["skipped"], state["rolled_back"], state["shift"]
        self._losses = deque(state["losses"], maxlen=self.config.window)
        self._norms = deque(state["norms"], maxlen=self.config.window)


@dataclass(frozen=True)
class StopConfig:
    metric: str = ""
    """Field of the records, such as heldout_loss, whose standstill ends the run; empty for none."""
    patience: int = 5
    """Measurements in a row without an improvement after which the run ends."""
    least: float = 0.0
    """What an improvement must be larger than."""
    mode: Literal["min", "max"] = "min"
    """Whether lower (min) or higher (max) is better."""

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ConfigError(f"patience ({self.patience}) must be at least 1 measurement")
        if not self.least >= 0:
            raise ConfigError(f"least ({self.least}) must be at least 0: it is how much better a measurement must be to count")
        if self.mode not in ("min", "max"):
            raise ConfigError(f"mode ({self.mode!r}) must be 'min' or 'max': choose one of them")


class EarlyStop:
    """Ends a run whose `metric` has not improved for `patience` measurements. Records without the metric are no measurement."""

    def __init__(self, config: StopConfig) -> None:
        self.config = config
        self._best: float | None = None
        self._best_step = self._waited = 0
        self._known: dict[str, None] = {}

    def see(self, record: Mapping[str, Any]) -> str:
        """Take a step's record; returns why to stop, or "". What is not a number counts as no improvement.

        Raises ConfigError when the metric is a field that holds no number at all.
        """
        metric = self.config.metric
        self._known |= dict.fromkeys(record)
        if not metric or metric not in record:
            return ""
        value = record[metric]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"metric {metric!r} is {value!r}, which is no number: name a field that is one")
        if self._better(value):
            self._best, self._best_step, self._waited = float(value), record["step"], 0
            return ""
        self._waited += 1
        if self._waited < self.config.patience:
            return ""
        verb = "fallen" if self.config.mode == "min" else "risen"
        best = "ever been a number" if self._best is None else f"{verb} by more than {self.config.least:g}"
        since = "" if self._best is None else f" since step {self._best_step}, when it was {self._best:.4g}"
        return f"stopped at step {record['step']}: {metric} has not {best}{since} ({self._waited} measurements)"

    def _better(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self._best is None:
            return True
        gain = self._best - value if self.config.mode == "min" else value - self._best
        return gain > self.config.least

    def finish(self) -> None:
        """At the run's end. Raises ConfigError when no record ever had the metric: it was watched for nothing."""
        if self.config.metric and self._known and self.config.metric not in self._known:
            raise ConfigError(
                f"no record has the metric {self.config.metric!r}{nearest(self.config.metric, self._known)}"
                f" They have: {', '.join(self._known)}."
            )

    def state(self) -> dict[str, Any]:
        """Everything that later decisions depend on, as plain JSON."""
        return {"best": self._best, "best_step": self._best_step, "waited": self._waited, "known": list(self._known)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()` of another. Raises CheckpointError when it is none."""
        _check("early stopping", state, self.state())
        self._best, self._best_step, self._waited = state["best"], state["best_step"], state["waited"]
        self._known = dict.fromkeys(state["known"])


def _check(what: str, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    missing = sorted(own.keys() - state.keys())
    if missing:
        raise CheckpointError(f"the state of {what} lacks {', '.join(missing)}: the checkpoint was altered; delete it")
