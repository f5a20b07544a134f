"""List the runs of folders, or compare some of them in plots.

    athanor runs
    athanor runs runs experiments --json
    athanor runs runs/a runs/b --plot out.html

A comparison shows loss over steps, tokens and time, held-out measures, learning rate, gradient norm and speed, and the settings
in which the runs differ. A stage is stale when its process is gone without having said so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from athanor.core.errors import ConfigError, nearest
from athanor.report import compare, words
from athanor.report.compare import Language, say
from athanor.report.runs import StageLog, differences, find, stages

POSITIONAL = ("folders",)


@dataclass(frozen=True)
class Config:
    folders: tuple[Path, ...] = (Path("runs"),)
    """Run folders, folders that hold some, or names of runs in runs/."""
    plot: Path | None = None
    """File for the comparison: .html, .svg or .png."""
    stage: str | None = None
    """Training stage to list or compare; all are listed by default, and the first that all runs have is compared."""
    language: Language = "en"
    """Of table and plots: en or zh."""
    json: bool = False
    """Print the list as JSON; with --plot the settings that differ too."""


def main(config: Config) -> None:
    found = {name: stages(name, folder) for name, folder in find(config.folders).items()}
    logs = [log for of_run in found.values() for log in of_run]
    _check(config.stage, logs)
    if config.stage:
        logs = [log for log in logs if log.stage == config.stage]
    differ: dict[str, list[str]] | None = None
    if config.plot:
        logs = _chosen(config.stage, found)
        compare.write(logs, config.plot, config.language)
        differ = differences(logs)
    if config.json:
        listed: dict[str, Any] = {"runs": [log.row() for log in logs]}
        if differ is not None:
            listed |= {"differences": differ, "plot": str(config.plot)}
        print(json.dumps(listed, indent=1, ensure_ascii=False))
        return
    _show(logs, [name for name, of_run in found.items() if not of_run], config.language)
    if differ is not None:
        _show_differences(logs, differ, config.language)
        print(f"\nplot: {config.plot}")


def _check(stage: str | None, logs: Sequence[StageLog]) -> None:
    there = dict.fromkeys(log.stage for log in logs)
    if stage and stage not in there:
        raise ConfigError(
            f"none of these runs has a stage {stage!r}{nearest(stage, there)} They have: {', '.join(there) or 'none'}."
        )


def _chosen(stage: str | None, found: dict[str, list[StageLog]]) -> list[StageLog]:
    """What is drawn: of each run the stage that was asked for, or the first that all of them have."""
    if stage is None:
        common = [name for name in _names(found) if all(name in {log.stage for log in of_run} for of_run in found.values())]
        if not common:
            each = "; ".join(f"{run} has {', '.join(log.stage for log in logs) or 'none'}" for run, logs in found.items())
            raise ConfigError(
                f"these runs have no training stage in common ({each}): name the runs, or one of the stages as --stage"
            )
        stage = common[0]
    for run, logs in found.items():
        if stage not in {log.stage for log in logs}:
            print(f"left out: {run} has no stage {stage}")
    return [log for logs in found.values() for log in logs if log.stage == stage]


def _names(found: dict[str, list[StageLog]]) -> list[str]:
    return list(dict.fromkeys(log.stage for logs in found.values() for log in logs))


def _show(logs: Sequence[StageLog], empty: Sequence[str], language: Language) -> None:
    """The list; runs without a training stage are named below it."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(say("run", language), overflow="fold", min_width=8)
    for name in ("stage", "state"):
        table.add_column(say(name, language), no_wrap=True)
    for name in ("steps", "last_loss", "best_heldout", "tokens", "time", "speed"):
        table.add_column(say(name, language), justify="right", no_wrap=True)
    before = None
    for log in logs:
        row = log.row()
        steps = words.number(row["steps"])
        if row["wanted"] and row["wanted"] != row["steps"]:
            steps += f"/{words.number(row['wanted'])}"
        cells = (_cell(row["loss"]), _cell(row["heldout"]), _cell(row["tokens"], words.short), _cell(row["seconds"], words.clock))
        title = Text("" if log.run == before else words.visible(log.run))
        speed = _cell(row["tokens_per_second"], lambda value: words.number(round(value)))
        table.add_row(title, log.stage, say(log.state, language), steps, *cells, speed)
        before = log.run
    Console().print(table)
    for log in logs:
        if log.why:
            print(f"{log.run} {log.stage}: {log.why}")
    if empty:
        print(f"without a training stage: {', '.join(empty)}")


def _cell(value: Any, show: Callable[[Any], str] = words.number) -> str:
    return "–" if value is None else value if isinstance(value, str) else show(value)  # text: nan, inf


def _show_differences(logs: Sequence[StageLog], differ: dict[str, list[str]], language: Language) -> None:
    if not differ:
        print(f"\n{say('same', language)}")
        return
    print()
    table = Table(title=say("differ", language), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in (say("field", language), *(words.visible(log.run) for log in logs)):
        table.add_column(Text(name), overflow="fold")
    for field, values in differ.items():
        table.add_row(Text(field), *(Text(words.visible(value)) for value in values))
    Console().print(table)
