"""How processes are laid out: `ddp=2`, `fsdp=4,zero=2`, `hsdp=2x2`, `tp=2`, `pp=2,schedule=interleaved`, and products of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from athanor.core.errors import ConfigError, nearest

SCHEDULES = ("1f1b", "gpipe", "interleaved", "zero_bubble")
_KEYS = ("ddp", "fsdp", "hsdp", "zero", "tp", "pp", "ep", "schedule", "micro")


@dataclass(frozen=True)
class Layout:
    """Processes in each direction; their product is how many there are.

    ddp       copies of everything, which take different data
    fsdp      processes that share weights, gradients and optimiser state, and take different data (ZeRO)
    tp        processes that share every matrix product and every sequence
    pp        processes that hold consecutive layers
    zero      with fsdp: 3 frees gathered weights after each block, 2 keeps them until the update
    ep        how many of the data processes the experts of a mixture are dealt out to
    schedule  of pp: 1f1b, gpipe, interleaved or zero_bubble
    micro     of pp: micro-batches in flight; 0 is one a stage, or twice as many where a process holds two stages
    """

    ddp: int = 1
    fsdp: int = 1
    tp: int = 1
    pp: int = 1
    zero: int = 3
    ep: int = 1
    schedule: str = "1f1b"
    micro: int = 0

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.ddp * self.fsdp * self.tp * self.pp

    @property
    def data(self) -> int:
        """Processes that take different data."""
        return self.ddp * self.fsdp

    @property
    def stages(self) -> int:
        """Stages of the pipeline: two a process where the schedule interleaves."""
        return self.pp * (2 if self.schedule in ("interleaved", "zero_bubble") else 1)

    @property
    def in_flight(self) -> int:
        """Micro-batches of one pass through the pipeline."""
        return self.micro or self.stages

    def __str__(self) -> str:
        parts = [f"{k}={getattr(self, k)}" for k in ("ddp", "fsdp", "tp", "pp", "ep") if getattr(self, k) > 1]
        parts += [f"zero={self.zero}"] * (self.fsdp > 1 and self.zero != 3)
        parts += [f"schedule={self.schedule}"] * (self.pp > 1 and self.schedule != "1f1b")
        return ",".join(parts) or "one process"


def parse(text: str) -> Layout:
    """The layout that a text names; "" is one process.

    Raises ConfigError for an unknown key, a number that is none, or a combination that makes no sense.
    """
    found: dict[str, int | str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, _, value = part.partition("=")
        if key not in _KEYS:
            raise ConfigError(f"parallel ({text!r}) has an unknown part {key!r}{nearest(key, _KEYS)} Known: {', '.join(_KEYS)}.")
        if key == "schedule":
            if value not in SCHEDULES:
                raise ConfigError(f"schedule ({value!r}) must be one of {', '.join(SCHEDULES)}{nearest(value, SCHEDULES)}")
            given: dict[str, int | str] = {key: value}
        elif key == "hsdp":
            copies, _, shards = value.partition("x")
            given = {"ddp": _number(text, key, copies), "fsdp": _number(text, key, shards)}
        else:
            given = {key: _number(text, key, value)}
        for name, chosen in given.items():
            if name in found:
                raise ConfigError(f"parallel ({text!r}) says {name} twice: say it once")
            found[name] = chosen
    layout = Layout(**found)  # type: ignore[arg-type]  # every key has the type of its field
    if layout.zero not in (2, 3):
        raise ConfigError(f"zero ({layout.zero}) must be 2 or 3: 1 is no saving over 2 here")
    if "zero" in found and layout.fsdp == 1:
        raise ConfigError(f"parallel ({text!r}): zero says how fsdp shares, so it needs fsdp=N with N above 1")
    for name in ("schedule", "micro"):
        if name in found and layout.pp == 1:
            raise ConfigError(f"parallel ({text!r}): {name} is of the pipeline, so it needs pp=N with N above 1")
    if layout.pp > 1 and layout.in_flight < layout.stages:
        raise ConfigError(f"micro ({layout.micro}) must be at least the {layout.stages} stages of the pipeline, or 0")
    if layout.data % layout.ep:
        raise ConfigError(
            f"ep ({layout.ep}) must divide the {layout.data} processes that take different data (ddp x fsdp): experts are dealt"
            " out to them"
        )
    if layout.ep > 1 and layout.ep != layout.ddp:
        raise ConfigError(
            f"ep ({layout.ep}) must be ddp ({layout.ddp}): experts are dealt out to the copies; fsdp shares what else there is"
        )
    if layout.ep > 1 and (layout.fsdp > 1 or layout.tp > 1 or layout.pp > 1):
        raise ConfigError(f"parallel ({text!r}): ep goes with ddp alone; fsdp shares experts by itself")
    return layout


def _number(text: str, key: str, value: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,4}", value):
        form = "hsdp=COPIESxSHARDS, as hsdp=2x2" if key == "hsdp" else f"{key}=N with N from 1, as {key}=2"
        raise ConfigError(f"parallel ({text!r}): {key} is given as {value!r} and must be {form}")
    return int(value)
