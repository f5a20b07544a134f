"""Where a run's records go: the console, a JSON-lines file, TensorBoard, Weights & Biases, trackio, or several of these."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from athanor.core import _sinks, dist, io
from athanor.core.errors import CheckpointError, ConfigError, nearest

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

PLAIN_SECONDS = 5.0  # between two lines where no terminal shows a moving bar
SHOWN_FIELDS = 4
SINKS = ("console", "jsonl", "tensorboard", "wandb", "trackio")


class Tracker(Protocol):
    """A sink for records such as {"step": 12, "loss": 3.2}."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one record."""

    def close(self) -> None:
        """Write what is still held back; nothing is logged afterwards."""


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):  # a tensor or NumPy scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # 'nan', 'inf': JSON has no word for them, and `float()` reads them back
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


class JsonlTracker:
    """Appends each record to a file as one line of JSON, flushed. A number that is not finite is written as text, "nan" or "inf".

    On opening, a last line that a killed writer left unfinished is cut off; with `last_step`, records of later steps are
    cut off too, so that a run resumed from that step's checkpoint logs every step once.

    Raises CheckpointError when `last_step` is given and a line of the file is not a record.
    """

    def __init__(self, path: str | os.PathLike[str], last_step: int | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._mend(path, last_step)
        self._file = path.open("a", encoding="utf-8")

    @staticmethod
    def _mend(path: Path, last_step: int | None) -> None:
        content = path.read_bytes()
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        if last_step is not None:
            try:
                lines = [line for line in lines if json.loads(line).get("step", 0) <= last_step]
            except (ValueError, AttributeError, TypeError) as error:
                raise CheckpointError(f"{path} has a line that is no record ({error}): move the file away") from error
        mended = b"".join(lines)
        if mended != content:
            io.atomic_write(path, mended)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append `record`."""
        self._file.write(json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _shown(record: Mapping[str, Any]) -> str:
    fields: list[str] = []
    for key, value in _plain(record).items():
        if key != "step" and isinstance(value, (bool, int, float, str)) and len(fields) < SHOWN_FIELDS:
            fields.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return "  ".join(fields)


class ConsoleTracker:
    """Shows steps done, rate, time left and the first few fields of the last record.

    On a terminal a moving bar (rich); elsewhere a plain line at most every 5 seconds, and the last record's. `start` is
    the step a resumed run begins at; the rate counts from there. The work ends after `seconds`, done or not. `console`
    and `clock` are for tests.
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        unit: str = "steps",
        *,
        start: int = 0,
        seconds: float | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from rich.console import Console

        self._title, self._total, self._unit, self._clock = title, total, unit, clock
        self._start, self._most, self._began = start, math.inf if seconds is None else seconds, clock()
        self._console = console or Console(file=sys.stdout)
        self._pending: str | None = None
        self._printed = -math.inf
        self._bar: Progress | None = self._open_bar() if self._console.is_terminal else None

    def _open_bar(self) -> Progress:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"))
        bar = Progress(*columns, console=self._console, refresh_per_second=4)
        self._task = bar.add_task(self._title, total=self._total, completed=self._start, shown=self._unit)
        bar.start()
        return bar

    def _pace(self, step: int, now: float) -> str:
        seconds, done = now - self._began, step - self._start
        if seconds <= 0 or done <= 0:
            return self._unit
        rate = done / seconds
        left = min(math.inf if self._total is None else (self._total - step) / rate, self._most - seconds)
        return f"{self._unit}  {rate:.3g}/s" + (f"  {_seconds(left)} left" if 0 < left < math.inf else "")

    def log(self, record: Mapping[str, Any]) -> None:
        """Show `record`; "step" is how far the work is."""
        now, step = self._clock(), int(record.get("step", 0))
        shown = f"{self._pace(step, now)}  {_shown(record)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, shown=shown)
            return
        total = "" if self._total is None else f"/{self._total}"
        self._pending = f"{self._title} {step}{total} {shown}"
        if now - self._printed >= PLAIN_SECONDS:
            self._print(now)

    def _print(self, now: float) -> None:
        self._console.print(self._pending, markup=False, highlight=False, soft_wrap=True)
        self._pending, self._printed = None, now

    def close(self) -> None:
        """Show the last record and leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
        elif self._pending is not None:
            self._print(self._clock())


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def log(self, record: Mapping[str, Any]) -> None:
        """Hand `record` to each."""
        for tracker in self._trackers:
            tracker.log(record)

    def close(self) -> None:
        """Close each."""
        for tracker in self._trackers:
            tracker.close()


def open_sinks(
    names: Sequence[str], run: Path, stage: str, *, total: int | None, start: int = 0, settings: Mapping[str, Any] | None = None
) -> Tracker:
    """The trackers of one stage of a run folder. Of several processes only the main one writes; the others get an empty tracker.

    | name        | where the records go                                                        |
    | ----------- | --------------------------------------------------------------------------- |
    | console     | standard output                                                             |
    | jsonl       | `logs/<stage>.jsonl`, which `athanor runs` and the report read              |
    | tensorboard | `logs/tensorboard/<stage>/`: `tensorboard --logdir runs`                    |
    | wandb       | Weights & Biases; its files in `logs/wandb/`, WANDB_MODE=offline for no network |
    | trackio     | trackio's own database                                                      |

    Args:
        names: of SINKS.
        run: the run folder.
        stage: its name.
        total: steps in all.
        start: the step that it begins at; what was logged of later ones by a run that was killed is cut off.
        settings: plain JSON, shown by W&B and trackio.

    Raises:
        ConfigError: a name that is no sink.
        MissingExtraError: the sink's library is not installed.
    """
    for name in names:
        if name not in SINKS:
            raise ConfigError(f"no sink {name!r}{nearest(name, SINKS)} There are: {', '.join(SINKS)}.")
    logs, opened = run / "logs", list[Tracker]()
    try:
        for name in dict.fromkeys(names) if dist.is_main() else ():
            if name == "console":
                opened.append(ConsoleTracker(stage, total, "step", start=start))
            elif name == "jsonl":
                opened.append(JsonlTracker(logs / f"{stage}.jsonl", last_step=start))
            elif name == "tensorboard":
                opened.append(_sinks.TensorBoardTracker(logs / "tensorboard" / stage, start))
            elif name == "wandb":
                opened.append(_sinks.WandbTracker(run, stage, logs / "wandb", settings or {}))
            else:
                opened.append(_sinks.TrackioTracker(run, stage, settings or {}))
    except BaseException:
        Trackers(opened).close()
        raise
    return Trackers(opened)
