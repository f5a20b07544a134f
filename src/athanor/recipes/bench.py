"""Measure a server under load: throughput, time to first token, time per token.

    athanor bench serve http://127.0.0.1:8000 --load.rate 8 --load.requests 500 --plot load.svg
    athanor bench serve http://127.0.0.1:8000 --load.rate none --load.clients 64 --load.seconds 300 --mix.leave 0.05

Any server that speaks OpenAI's dialect can be measured. Its key is taken from the environment variable OPENAI_API_KEY.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from athanor.core import io
from athanor.core.errors import ConfigError
from athanor.core.track import ConsoleTracker
from athanor.report.words import visible
from athanor.serve.clients import base_of, measure
from athanor.serve.load import Load, Mix, Result, running

POSITIONAL = ("what", "url")


@dataclass(frozen=True)
class Config:
    what: Literal["serve"]
    """serve: a server under load."""
    url: str
    """Its address, such as http://127.0.0.1:8000 (/v1 is added where it has no path)."""
    model: str | None = None
    """Which of its models; by default the first that it names."""
    load: Load = Load()
    mix: Mix = Mix()
    out: Path | None = None
    """File for all figures and every request, JSON."""
    plot: Path | None = None
    """File for the picture: .svg or .png."""
    json: bool = False
    """Print the figures as JSON instead of a table."""


def main(config: Config) -> int:
    if config.plot is not None and config.plot.suffix not in (".svg", ".png"):  # before the work, not after it
        raise ConfigError(f"plot ({str(config.plot)!r}) must end in .svg or .png: rename it")
    load = config.load
    bar = ConsoleTracker("requests", load.requests, "answered", seconds=load.seconds, console=Console(stderr=True))
    begun = datetime.now(timezone.utc)
    key = os.environ.get("OPENAI_API_KEY")
    try:
        found = asyncio.run(measure(config.url, config.load, config.mix, model=config.model, key=key, progress=bar.log))
    finally:
        bar.close()
    figures = {
        "url": base_of(config.url),
        "model": found.model,
        "begun": begun.isoformat(timespec="seconds"),
        "load": asdict(config.load),
        "mix": asdict(config.mix),
        **found.summary(),
    }
    whole = figures | {"in_flight": running(found.outcomes), "each": [asdict(outcome) for outcome in found.outcomes]}
    if config.out is not None:
        io.write_json(config.out, whole)
    if config.plot is not None:
        from athanor.report import load as picture  # matplotlib takes its time

        picture.write(whole, config.plot)
    if config.json:
        print(json.dumps(figures, indent=1, ensure_ascii=False))
    else:
        _show(figures)
        for path in filter(None, (config.out, config.plot)):
            print(f"written: {path}")
    return 0 if _any(found) else 1


def _any(found: Result) -> bool:
    return any(not outcome.error for outcome in found.outcomes)


def _show(figures: Mapping[str, Any]) -> None:
    asked = figures["requests"]
    counts = ", ".join(f"{count} {name}" for name, count in asked.items() if count or name == "complete")
    print(f"{visible(figures['model'])} at {figures['url']}: {counts} in {figures['seconds']:.1f} s,")
    print(f"at most {figures['most_in_flight']} in flight; answers ended by {_counts(figures['finish'])}")
    speed = figures["throughput"]
    print(
        f"{_figure(speed['requests_per_second'])} requests/s, {_figure(speed['output_tokens_per_second'])} output tokens/s,"
        f" {_figure(speed['prompt_tokens_per_second'])} prompt tokens/s\n"
    )
    table = Table("milliseconds", box=None)
    for name in ("median", "95 %", "99 %", "max", "mean"):
        table.add_column(name, justify="right")
    for name in ("seconds_to_first_token", "seconds_per_token", "seconds_to_answer", "seconds_late"):
        values = figures[name] or {}
        cells = (values.get(key) for key in ("median", "p95", "p99", "max", "mean"))
        shown = ["–" if cell is None else f"{1e3 * cell:,.1f}" for cell in cells]
        table.add_row(name.removeprefix("seconds_").replace("_", " "), *shown)
    Console().print(table)
    for kind, told in figures["errors"].items():
        print(f"\n{told['count']} x {visible(kind)}: {visible(told['first'])}")


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in found.items()) or "nothing"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"
