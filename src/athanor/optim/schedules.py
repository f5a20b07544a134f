"""Learning-rate schedules: step -> factor of the base rate."""

from __future__ import annotations

import math
from collections.abc import Callable

from athanor.core.errors import ConfigError

Schedule = Callable[[int], float]


def warmup_cosine(steps: int, warmup: int, final: float = 0.0) -> Schedule:
    """Linear from 1/warmup to 1 over `warmup` steps, then half a cosine down to `final` at step `steps` - 1.

    Raises:
        ConfigError: warmup not in [0, steps], or final not in [0, 1].
    """
    if not 0 <= warmup <= steps:
        raise ConfigError(f"warmup ({warmup}) must lie between 0 and steps ({steps})")
    if not 0 <= final <= 1:
        raise ConfigError(f"final ({final}) is the last fraction of the learning rate: it must lie between 0 and 1")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor
