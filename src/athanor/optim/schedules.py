"""Learning-rate schedules: step -> factor of the base rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from athanor.core.errors import ConfigError, nearest

Schedule = Callable[[int], float]
Name = Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"]


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate changes over a run.

    name    cosine, linear, wsd (warm-up, stable, decay), inverse_sqrt or constant; see `schedule`
    warmup  share of the steps over which it rises
    decay   of wsd: share of the steps over which it falls at the end; None is 0.2
    final   of cosine, linear and wsd: what part of the peak rate the last step has; None is 0.05
    """

    name: Name = "cosine"
    warmup: float = 0.05
    decay: float | None = None
    final: float | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(Name):
            known = get_args(Name)
            raise ConfigError(f"schedule.name ({self.name!r}) must be one of {', '.join(known)}{nearest(self.name, known)}")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"schedule.warmup ({self.warmup}) is a share of the steps: it must lie in [0, 1)")
        if self.decay is not None and self.name != "wsd":
            raise ConfigError(f"schedule.decay ({self.decay}) is read by wsd only, not by {self.name}: leave it out")
        if self.final is not None and self.name in ("inverse_sqrt", "constant"):
            raise ConfigError(f"schedule.final ({self.final}) is not read by {self.name}, which ends where it ends: leave it out")
        if self.decay is not None and not 0 < self.decay <= 1 - self.warmup:
            raise ConfigError(
                f"schedule.decay ({self.decay}) is a share of the steps: it must be above 0, and at most what the warmup"
                f" ({self.warmup}) leaves of 1"
            )
        if self.final is not None:
            _check_final(self.final)


def schedule(config: ScheduleConfig, steps: int) -> Schedule:
    """The schedule of a run of `steps` updates; w = warmup x steps rounded down, at least 1 where warmup is not 0.

    While step < w all rise as (step + 1) / w, and then

    | name         | falls                                                                                                |
    | ------------ | ---------------------------------------------------------------------------------------------------- |
    | cosine       | as half a cosine to `final` (Loshchilov and Hutter 2017)                                             |
    | linear       | in a line to `final`                                                                                 |
    | wsd          | not, but for the last `decay` x steps, and there in a line to `final` (Hu et al. 2024)               |
    | inverse_sqrt | as sqrt(w / (step + 1)) (Vaswani et al. 2017, section 5.3, so scaled that it is 1 when the warm-up ends) |
    | constant     | not                                                                                                  |

    What falls to `final` has it in the last step, steps - 1, where it is not also the first one at the full rate.

    Raises:
        ConfigError: steps below 1.
    """
    if steps < 1:
        raise ConfigError(f"a schedule is over 1 step at least, not {steps}: raise steps")
    warmup = max(1, int(config.warmup * steps)) if config.warmup else 0
    final = 0.05 if config.final is None else config.final
    if config.name == "cosine":
        return warmup_cosine(steps, warmup, final)
    if config.name == "linear":
        return warmup_stable_decay(steps, warmup, steps - warmup, final)
    if config.name == "wsd":
        decay = 0.2 if config.decay is None else config.decay
        return warmup_stable_decay(steps, warmup, min(steps - warmup, max(1, round(decay * steps))), final)
    return inverse_sqrt(warmup) if config.name == "inverse_sqrt" else constant(warmup)


def warmup_cosine(steps: int, warmup: int, final: float = 0.0) -> Schedule:
    """Linear from 1/warmup to 1 over `warmup` steps, then half a cosine down to `final` at step `steps` - 1.

    Raises:
        ConfigError: warmup not in [0, steps], or final not in [0, 1].
    """
    _check(steps, warmup)
    _check_final(final)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def warmup_stable_decay(steps: int, warmup: int, decay: int, final: float = 0.0) -> Schedule:
    """Linear from 1/warmup to 1 over `warmup` steps, then 1, then over the last `decay` steps a line down to `final`.

    Raises:
        ConfigError: warmup or decay that do not fit into steps, or final not in [0, 1].
    """
    _check(steps, warmup)
    _check_final(final)
    if not 0 <= decay <= steps - warmup:
        raise ConfigError(f"decay ({decay}) must lie between 0 and what the warmup leaves of the steps ({steps - warmup})")
    # The first step of the decay still has the full rate, unless it is the only one and an earlier step had it.
    begin = steps - (2 if decay == 1 and steps - decay > warmup else decay)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if step < begin:
            return 1.0
        progress = min(1.0, (step - begin) / max(1, steps - 1 - begin))
        return 1.0 - (1 - final) * progress

    return factor


def inverse_sqrt(warmup: int) -> Schedule:
    """Linear from 1/warmup to 1 over `warmup` steps, then sqrt(warmup / (step + 1)). Raises ConfigError for a warmup below 0."""
    if warmup < 0:
        raise ConfigError(f"warmup ({warmup}) must not be negative")
    length = max(1, warmup)
    return lambda step: min((step + 1) / length, math.sqrt(length / (step + 1)))


def constant(warmup: int = 0) -> Schedule:
    """Linear from 1/warmup to 1 over `warmup` steps, then 1. Raises ConfigError for a warmup below 0."""
    if warmup < 0:
        raise ConfigError(f"warmup ({warmup}) must not be negative")
    return lambda step: (step + 1) / warmup if step < warmup else 1.0


def _check(steps: int, warmup: int) -> None:
    if not 0 <= warmup <= steps:
        raise ConfigError(f"warmup ({warmup}) must lie between 0 and steps ({steps})")


def _check_final(final: float) -> None:
    if not 0 <= final <= 1:
        raise ConfigError(f"final ({final}) is the last fraction of the learning rate: it must lie between 0 and 1")
