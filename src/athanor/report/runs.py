"""Runs as they lie on disk: which there are, how each training stage stands, what it logged, and in what its settings differ.

A run is a folder with run.json. Of a training stage there may be `logs/<stage>.jsonl` (a record per step),
`logs/<stage>.state.json` (how it stands, see `train.watch`) and, once it is done, `stages/<stage>.json`. Nothing is written here.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from athanor.core import io
from athanor.core.errors import CheckpointError, nearest
from athanor.report.curves import STAGES

State = Literal["running", "finished", "stopped", "stale"]
HELDOUT = ("heldout_bits_per_byte", "heldout_loss")
QUIET = 600.0  # seconds without a record after which a process on another machine is taken for dead
_UNLIKE = {"run", "save_seconds"}  # settings that differ without making a difference
_LONGEST = 16  # characters of a hash that are shown


@dataclass(frozen=True)
class StageLog:
    """One training stage of a run.

    run       the run's name: its path below the folder in which it was found
    stage     pretrain, sft ...
    records   of its steps, in order; a step that was done again has its last record
    state     running, finished, stopped (with an error or by hand), or stale: its process is gone without a word
    why       what stopped it, or ""
    wanted    steps that it was to have, None where that was not written down
    settings  of the stage, with the hashes of what it was made from
    """

    run: str
    stage: str
    records: Sequence[Mapping[str, Any]]
    state: State
    why: str = ""
    wanted: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def seconds(self) -> list[float]:
        """Seconds from the stage's begin to the end of each step, time between steps (held-out text, saves) left out."""
        return list(accumulate(_seconds(record) for record in self.records))

    def tokens(self) -> list[int]:
        """Tokens trained on up to the end of each step."""
        return list(accumulate(int(record.get("tokens", 0)) for record in self.records))

    def heldout(self) -> str:
        """The name of the held-out measure that it logged, or ""."""
        return next((key for key in HELDOUT if any(key in record for record in self.records)), "")

    def row(self) -> dict[str, Any]:
        """What a list of runs shows of it, as plain JSON; None where it was not logged."""
        last: Mapping[str, Any] = self.records[-1] if self.records else {}
        seconds, tokens, held = sum(map(_seconds, self.records)), sum(r.get("tokens", 0) for r in self.records), self.heldout()
        seen = [r[held] for r in self.records if isinstance(r.get(held), (int, float))]
        return {
            "run": self.run,
            "stage": self.stage,
            "state": self.state,
            "why": self.why,
            "steps": last.get("step", 0),
            "wanted": self.wanted,
            "loss": last.get("loss"),
            "heldout": min(seen, default=None),
            "heldout_measure": held or None,
            "tokens": tokens or None,
            "seconds": round(seconds, 3) or None,
            "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        }


def _seconds(record: Mapping[str, Any]) -> float:
    if "step_seconds" in record:
        return float(record["step_seconds"])
    speed = record.get("tokens_per_second")
    return float(record.get("batch_seconds", 0.0)) + (record.get("tokens", 0) / speed if speed else 0.0)


def find(paths: Sequence[Path], base: Path = Path("runs")) -> dict[str, Path]:
    """{name: folder} of the runs at and below `paths`, which are folders, or names of runs in `base`.

    Raises CheckpointError when a path is neither (with the nearest run), or when there is no run below it.
    """
    found: dict[str, Path] = {}
    for path in paths:
        here = path if path.is_dir() else base / path
        if not here.is_dir():
            known = [str(p.relative_to(folder)) for folder in (path.parent, base) for p in _below(folder)]
            raise CheckpointError(
                f"no run {str(path)!r}{nearest(path.name, known)} Give a run folder, or a folder that holds some."
            )
        runs = _below(here)
        if not runs:
            raise CheckpointError(
                f"no run in {str(here)!r} (a run is a folder with run.json): `athanor run --out {here / 'first'}`"
            )
        for run in runs:
            own = run.resolve().name if here == path else str(path)
            name = own if run == here else str(run.relative_to(here))
            found[str(run) if name in found and found[name].resolve() != run.resolve() else name] = run
    return found


def _below(folder: Path) -> list[Path]:
    """Runs at and below a folder; what lies inside a run is not searched."""
    runs = []
    for root, names, files in os.walk(folder):
        if "run.json" in files:
            runs.append(Path(root))
            names.clear()
    return sorted(runs)


def stages(name: str, run: Path) -> list[StageLog]:
    """The training stages of a run, in the order of a life.

    Raises CheckpointError naming file and line where a record is damaged.
    """
    logged = {path.stem for path in (run / "logs").glob("*.jsonl")}
    done = {path.stem: io.read_json(path) for path in (run / "stages").glob("*.json")}
    known = list(STAGES)
    names = logged | {stage for stage, record in done.items() if record.get("curve")}
    order = sorted(names, key=lambda stage: (known.index(stage) if stage in known else len(known), stage))
    return [_stage(name, run, stage, done.get(stage)) for stage in order]


def _stage(name: str, run: Path, stage: str, done: Mapping[str, Any] | None) -> StageLog:
    log, path = run / "logs" / f"{stage}.jsonl", run / "logs" / f"{stage}.state.json"
    records = read(log) if log.exists() else list((done or {})["curve"])
    about: Mapping[str, Any] = io.read_json(path) if path.exists() else {}
    state = "finished" if done else _alive(about, log) if about.get("state") == "running" else about.get("state", "stopped")
    why = about.get("why", "") if state == "stopped" else ""
    wanted = about.get("steps", (done or {}).get("steps"))
    return StageLog(name, stage, records, state, why, wanted, about.get("settings") or (done or {}).get("settings", {}))


def _alive(about: Mapping[str, Any], log: Path) -> State:
    if about.get("host") != platform.node():
        quiet = time.time() - log.stat().st_mtime if log.exists() else QUIET
        return "running" if quiet < QUIET else "stale"
    try:
        os.kill(about["process"], 0)  # signal 0 only asks whether the process is there
    except ProcessLookupError:
        return "stale"
    except PermissionError:
        pass  # somebody else's, and there
    return "running"


def read(log: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file. A last line without its end is still being written and left out.

    Raises CheckpointError naming the line that is no record.
    """
    records: list[dict[str, Any]] = []
    for number, line in enumerate(log.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            step = record["step"]
            if type(step) is not int:
                raise ValueError(f"its step is {step!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{log}, line {number}, is no record of a step ({error}): delete that line, or move the file away"
            ) from error
        while records and records[-1]["step"] >= step:  # done again after a rollback
            records.pop()
        records.append(record)
    return records


def differences(logs: Sequence[StageLog]) -> dict[str, list[str]]:
    """{field: its value in each of `logs`} of the settings that are not the same everywhere; "–" where there is none."""
    leaves = [_leaves(log.settings) for log in logs]
    fields = dict.fromkeys(name for found in leaves for name in found if name not in _UNLIKE)
    rows = {name: [found.get(name, "–") for found in leaves] for name in fields}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            is_hash = len(text) >= 32 and all(c in "0123456789abcdef" for c in text)
            found[f"{prefix}{key}"] = text[:_LONGEST] if is_hash else text
    return found
