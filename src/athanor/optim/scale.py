"""Precisions that a device trains in, and the scale of losses that float16 needs (Micikevicius et al. 2018, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from athanor.core.errors import CheckpointError, ConfigError, NonFiniteLossError, nearest

PRECISIONS = {
    "fp32": "float32 throughout",
    "bf16": "matrix products in bfloat16, weights in float32",
    "bf16-pure": "weights in bfloat16 with float32 copies in the optimiser",
    "fp16": "matrix products in float16, losses scaled",
}


def check_precision(precision: str, device: torch.device) -> None:
    """Raise ConfigError for a precision that is unknown, or that `device` does not train in."""
    if precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise ConfigError(f"precision ({precision!r}) must be one of {known}{nearest(precision, PRECISIONS)}")
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            "precision ('fp16') does not go with a CPU, which multiplies float16 matrices about 25 times slower than float32 ones"
            " (docs/log.md): use bf16, or fp32 where the CPU has no bfloat16"
        )


@dataclass
class LossScale:
    """What losses are multiplied with, so that small gradients do not vanish in float16; gradients are divided by it after.

    A step whose gradients are not finite is skipped and halves the scale; `every` good ones after another double it.

    scale  the factor; a power of two, so that it rounds nothing
    good   steps since it last changed
    every  good steps before it doubles
    """

    scale: float = 2.0**16
    good: int = 0
    every: int = 2000

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ConfigError(f"the scale of losses ({self.scale}) must be positive: 65536 is usual")
        if self.every < 1:
            raise ConfigError(f"every ({self.every}), after how many good steps the scale of losses doubles, must be at least 1")

    def update(self, finite: bool) -> bool:
        """Tell whether the gradients of a step were finite; returns the same, which is whether to apply them.

        Raises:
            NonFiniteLossError: they were not, and the scale is as small as it can be: it is not the scale.
        """
        if finite:
            self.good += 1
            if self.good == self.every:
                self.scale, self.good = min(self.scale * 2, 2.0**120), 0
            return True
        self.scale, self.good = self.scale / 2, 0
        if self.scale < 2.0**-24:
            raise NonFiniteLossError(
                "gradients are not finite even where losses are scaled by 2^-24: lower the learning rate, or train in bf16"
            )
        return False

    def state(self) -> dict[str, Tensor]:
        """What `load` takes: `scale` and `good`."""
        return {"scale": torch.tensor(self.scale, dtype=torch.float64), "good": torch.tensor(self.good, dtype=torch.int64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state. Raises CheckpointError when it is none."""
        missing = [name for name in ("scale", "good") if name not in state]
        if missing:
            raise CheckpointError(f"the scale of losses lacks {' and '.join(missing)} in this checkpoint: start without it")
        self.scale, self.good = float(state["scale"]), int(state["good"])
