"""Stages of a run folder: each is done once, with the settings it was done with, and says so in `stages/<name>.json`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import athanor
from athanor.core import io
from athanor.core.config import differences
from athanor.core.errors import CheckpointError, ConfigError

FORMAT = 1


def open_run(run: Path) -> None:
    """Make `run` a run folder, or check that it is one of this format. Raises CheckpointError when it is something else."""
    marker = run / "run.json"
    if marker.exists():
        found = io.read_json(marker)
        version = found.get("format") if isinstance(found, dict) else None
        if version != FORMAT:
            raise CheckpointError(
                f"{run} was written by another version of athanor (format {version}, this one writes {FORMAT}):"
                " choose another folder"
            )
        return
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise CheckpointError(f"{run} exists and is not a run folder (it has no run.json): choose a new or empty folder")
    io.write_json(marker, {"format": FORMAT, "athanor": athanor.__version__})


class Stage:
    """One stage of a run.

    Args:
        run: the run folder.
        name: of the stage.
        settings: what makes this stage what it is (its config as plain JSON).

    Attributes:
        record: what `finish` wrote, when the stage is done; else None.

    Raises:
        ConfigError: the stage was done with other settings; they are named.
    """

    def __init__(self, run: Path, name: str, settings: Mapping[str, Any]) -> None:
        open_run(run)
        self.run, self.name, self.settings = run, name, dict(settings)
        self.record: dict[str, Any] | None = None
        self._path = run / "stages" / f"{name}.json"
        self._began = time.perf_counter()
        if self._path.exists():
            record = io.read_json(self._path)
            changed = differences(record["settings"], self.settings)
            if changed:
                raise ConfigError(
                    f"{run} already has stage {name!r}, done with other {', '.join(changed)}: use the same settings, or another"
                    " run folder"
                )
            self.record = record

    def finish(self, *, seconds_before: float = 0.0, **figures: Any) -> dict[str, Any]:
        """Mark the stage as done.

        Args:
            seconds_before: time spent on it by earlier processes that were killed.
            figures: what the report will show of it.
        """
        seconds = seconds_before + time.perf_counter() - self._began
        self.record = {"name": self.name, "seconds": round(seconds, 3), "settings": self.settings, **figures}
        io.write_json(self._path, self.record)
        return self.record


def require(run: Path, name: str) -> dict[str, Any]:
    """The record of a stage that must be done already. Raises CheckpointError naming the command that does it."""
    path = run / "stages" / f"{name}.json"
    if not path.exists():
        raise CheckpointError(f"{run} has not done stage {name!r} yet: run `athanor {name} {run}` first, or `athanor run`")
    record: dict[str, Any] = io.read_json(path)
    return record
