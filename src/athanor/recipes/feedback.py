"""Show what people think of a model's answers, or export it as preference pairs.

    athanor feedback show runs/first
    athanor feedback export runs/first --out pairs.jsonl

Answers are rated on the server's page (`athanor serve runs/first`). A pair is two finished answers to the same messages, one
rated up and one down; a line of the file has `prompt` (messages), `chosen` and `rejected` (a message each).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from athanor.core.errors import ConfigError, DataError
from athanor.core.io import atomic_write
from athanor.report.words import visible
from athanor.serve.feedback import FILE, Row, Store, pair
from athanor.types import Pair

POSITIONAL = ("action", "path")
WHY = {
    "paired": "",
    "alone": " (no answer to the same prompt is rated the other way)",
    "unrated": "",
    "unfinished": " (stopped, cut off or broken)",
    "repeated": " (the same text, rated the same way)",
    "disputed": " (the same text is rated up and down)",
}
_MARKS = {"up": "up", "down": "down", None: "–"}


@dataclass(frozen=True)
class Config:
    action: Literal["show", "export"]
    """show lists the opinions, export writes preference pairs."""
    path: Path
    """A run folder, or its feedback.db."""
    out: Path | None = None
    """File for the pairs, JSON lines."""


def main(config: Config) -> None:
    rows = Store(config.path if config.path.is_file() else config.path / FILE).rows()
    if config.action == "show":
        if config.out is not None:
            raise ConfigError(f"out ({str(config.out)!r}) is for export: leave it out")
        _show(rows)
        return
    if config.out is None:
        raise ConfigError("out is missing: export writes the pairs to a file, such as --out pairs.jsonl")
    found = pair(rows)
    counts = ", ".join(f"{found.counts[name]} {name}{why}" for name, why in WHY.items() if found.counts[name])
    answers = _some(len(rows), "answer")
    if not found.pairs:
        raise DataError(f"no pair in {answers} ({counts}): rate an answer up and another one to the same prompt down")
    atomic_write(config.out, "".join(json.dumps(_plain(made), ensure_ascii=False) + "\n" for made in found.pairs))
    print(f"{config.out}: {_some(len(found.pairs), 'pair')} from {_some(found.prompts, 'prompt')}\n{answers}: {counts}")


def _plain(made: Pair) -> dict[str, Any]:
    """A pair as JSON: messages without the fields that say nothing."""
    prompt, chosen, rejected = (
        [{name: value for name, value in asdict(message).items() if value not in (None, ())} for message in messages]
        for messages in (made.prompt, [made.chosen], [made.rejected])
    )
    return {"prompt": prompt, "chosen": chosen[0], "rejected": rejected[0]}


def _some(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _show(rows: list[Row]) -> None:
    table = Table("time", "model", "", "prompt", "answer", "note", box=None, padding=(0, 2, 0, 0))
    for row in rows:
        messages: list[Mapping[str, str]] = json.loads(row.messages)
        cells = (row.time[:16].replace("T", " "), row.model, _MARKS[row.rating], messages[-1]["content"], row.answer, row.note)
        table.add_row(*(Text(visible(cell)) for cell in cells))
    Console().print(table)
