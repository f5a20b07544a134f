"""Trackers that other programs show: TensorBoard, Weights & Biases, trackio. Each is imported when it is opened, not before.

A record's nested fields are logged as `field/name`. Text goes to TensorBoard alone; the others are given numbers.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from athanor.core.errors import ConfigError, MissingExtraError


def flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of each leaf of a record: {"norm": {"head": 1.0}} -> ("norm/head", 1.0); elements of lists by their place."""
    for key, value in record.items():
        if hasattr(value, "tolist"):  # a tensor or NumPy scalar
            value = value.tolist()
        if isinstance(value, (list, tuple)):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _numbers(record: Mapping[str, Any]) -> dict[str, int | float]:
    return {name: value for name, value in flat(record) if isinstance(value, (int, float))}


def _import(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"sink {extra!r} needs a library that is not installed ({error}): pip install 'athanor-lm[{extra}]'"
        ) from error


class TensorBoardTracker:
    """Event files in `folder`; numbers as scalars, text as text.

    `start` is the step a run begins at: what the folder holds of later steps, written by a run that was killed, is hidden.
    """

    def __init__(self, folder: Path, start: int = 0) -> None:
        _import("tensorboard", "tensorboard")
        writer = _import("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._writer = writer(str(folder), purge_step=start + 1 if start else None)

    def log(self, record: Mapping[str, Any]) -> None:
        """Write `record` at its step."""
        step = int(record.get("step", 0))
        for name, value in flat(record):
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)
            elif isinstance(value, str):
                self._writer.add_text(name, value, step)

    def close(self) -> None:
        """Write what is held back and close the file."""
        self._writer.close()


class WandbTracker:
    """A run of Weights & Biases in the project of WANDB_PROJECT, or "athanor"; the other WANDB_ variables work too.

    A resumed run goes on under its old id, which comes of its folder. W&B takes no step a second time, so steps are logged as a
    field that the others are drawn over.

    Raises ConfigError where W&B does not begin, for want of a login for instance.
    """

    def __init__(self, run: Path, stage: str, folder: Path, settings: Mapping[str, Any]) -> None:
        wandb = _import("wandb", "wandb")
        folder.mkdir(parents=True, exist_ok=True)
        identity = hashlib.sha256(f"{run.resolve()}/{stage}".encode()).hexdigest()[:16]
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "athanor"), name=f"{run.resolve().name}/{stage}", id=identity,
                dir=str(folder), config=dict(settings), resume="allow", reinit="create_new",
            )  # fmt: skip
        except wandb.Error as error:
            raise ConfigError(f"sink 'wandb' did not begin ({error}): run `wandb login`, or set WANDB_MODE=offline") from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, record: Mapping[str, Any]) -> None:
        """Log the numbers of `record`."""
        self._run.log(_numbers(record))

    def close(self) -> None:
        """End the run; waits until it is uploaded, unless W&B is offline."""
        self._run.finish()


class TrackioTracker:
    """A run of trackio, in the project of TRACKIO_PROJECT or "athanor": a local database (in TRACKIO_DIR) by default."""

    def __init__(self, run: Path, stage: str, settings: Mapping[str, Any]) -> None:
        trackio = _import("trackio", "trackio")
        self._trackio = trackio
        trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "athanor"), name=f"{run.resolve().name}-{stage}", config=dict(settings),
            resume="allow", embed=False, auto_log_cpu=False, auto_log_gpu=False,
        )  # fmt: skip

    def log(self, record: Mapping[str, Any]) -> None:
        """Log the numbers of `record` at its step."""
        numbers = _numbers(record)
        self._trackio.log({name: value for name, value in numbers.items() if name != "step"}, step=int(numbers.get("step", 0)))

    def close(self) -> None:
        """End the run."""
        self._trackio.finish()
