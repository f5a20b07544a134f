"""Show what training supports: every pair of objective, architecture, parallelism, precision and the rest, tested or refused.

    athanor support
    athanor support --of architecture llama
    athanor support --markdown en > docs/support.md

The table comes from the code that refuses and from the cases that the tests run (`athanor.train.support`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table

from athanor.core.errors import ConfigError, nearest
from athanor.report.support import TABLES, grid, label, markdown, title
from athanor.train import support
from athanor.train.support import Cell


@dataclass(frozen=True)
class Config:
    of: tuple[str, str] | None = None
    """An axis and a value of it: only what goes with that."""
    json: bool = False
    """Print all pairs as JSON."""
    markdown: Literal["en", "zh"] | None = None
    """Print the page of the documentation, in English or in Chinese."""


def main(config: Config) -> None:
    cells = support.table()
    if config.of is not None:
        cells = _of(cells, *config.of)
    if config.markdown is not None:
        if config.json or config.of is not None:
            raise ConfigError(f"markdown ({config.markdown!r}) is the whole page: leave json and of out")
        print(markdown(config.markdown), end="")
    elif config.json:
        print(json.dumps([asdict(cell) for cell in cells], indent=1, ensure_ascii=False))
    elif config.of is not None:
        shown = Table("axis", "value", "", "reason", title=" ".join(config.of))
        for cell in cells:
            shown.add_row(cell.axes[1], label(cell.axes[1], cell.values[1]), cell.verdict, cell.reason)
        Console().print(shown)
    else:
        for row, columns in TABLES:
            heads, lines, reasons = grid(row, columns)
            shown = Table(*heads, title=title("en", row, columns))
            for line in lines:
                shown.add_row(*line)
            Console().print(shown, *(f"{n} {why}" for n, why in enumerate(reasons, 1)), sep="\n", highlight=False)


def _of(cells: Sequence[Cell], axis: str, value: str) -> tuple[Cell, ...]:
    """The cells of one value, with that first."""
    found = [name for name in support.AXES if name.startswith(axis)]
    if len(found) != 1:
        raise ConfigError(f"of ({axis!r}) must be one of {', '.join(support.AXES)}{nearest(axis, support.AXES)}")
    known = {name: name for name in support.values(found[0])} | {label(found[0], v): v for v in support.values(found[0])}
    if value not in known:
        raise ConfigError(f"{found[0]} ({value!r}) must be one of {', '.join(filter(None, known))}{nearest(value, known)}")
    wanted = (found[0], known[value])
    turned = [c if c.axes[0] == found[0] else Cell(c.axes[::-1], c.values[::-1], c.verdict, c.reason) for c in cells]
    return tuple(c for c in turned if (c.axes[0], c.values[0]) == wanted)
