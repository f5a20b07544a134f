"""The picture of a load test: how long clients waited, and how many there were."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from athanor.core.errors import ConfigError
from athanor.core.io import atomic_write
from athanor.report import svg, words
from athanor.report.plots import EvenTicks
from athanor.report.svg import LIGHT, STAND_INS, Palette

_WIDTH, _HEIGHT = 1000, 640
_BOXES = ((66, 118), (566, 118), (66, 398), (566, 398))  # left and top of the panels, pixels
_WIDE, _TALL = 396, 176


def write(result: Mapping[str, Any], path: Path) -> Path:
    """Write the picture of `result` (what `athanor bench serve --out` holds) to `path`: .svg follows the reader's light or dark
    mode, .png is light. Raises ConfigError for another suffix."""
    if path.suffix not in (".svg", ".png"):
        raise ConfigError(f"plot path {str(path)!r} ends in {path.suffix!r}: give one that ends in .svg or .png")
    if path.suffix == ".svg":
        with svg.style(STAND_INS, "load"):
            drawing = _draw(result, STAND_INS)
            atomic_write(path, svg.standalone(drawing, "load", describe(result), _WIDTH, _HEIGHT))
        return path
    buffer = io.BytesIO()
    with svg.style(LIGHT, "load"), matplotlib.rc_context({"font.family": svg.faces()}):
        _draw(result, LIGHT).savefig(buffer, format="png", dpi=144, facecolor=LIGHT.paper, metadata={"Software": None})
    atomic_write(path, buffer.getvalue())
    return path


def describe(result: Mapping[str, Any]) -> str:
    """The picture in words."""
    waits = (("first token", "seconds_to_first_token"), ("each token", "seconds_per_token"))
    parts = [
        f"time to {name}: median {words.number(found['median'])} s, 95th percentile {words.number(found['p95'])} s"
        for name, key in waits
        if (found := result[key]) is not None
    ]
    return f"{_title(result)}. {_note(result)}. {'; '.join(parts) or 'no answer was complete'}."


def _title(result: Mapping[str, Any]) -> str:
    return f"Load on {words.visible(result['model'])}"


def _note(result: Mapping[str, Any]) -> str:
    asked, rate = result["requests"], result["load"]["rate"]
    how = f"{result['load']['clients']} clients" if rate is None else f"{words.number(rate)} requests/s (Poisson)"
    counts = ", ".join(f"{count} {name}" for name, count in asked.items() if count or name == "complete")
    speed = result["throughput"]["output_tokens_per_second"]
    return f"{how}: {counts}; {words.number(round(speed or 0))} output tokens/s"


def _draw(result: Mapping[str, Any], colours: Palette) -> Figure:
    figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), dpi=72)
    figure.text(24 / _WIDTH, 1 - 36 / _HEIGHT, _title(result), size=19)
    figure.text(24 / _WIDTH, 1 - 60 / _HEIGHT, _note(result), size=12, color=colours.muted)
    each: Sequence[Mapping[str, Any]] = result["each"]
    done = [o for o in each if not o["left"] and not o["error"] and o["first"] is not None]
    first = np.asarray([o["first"] - o["sent"] for o in done])
    per_token = np.asarray([(o["last"] - o["first"]) / (o["tokens"] - 1) for o in done if o["tokens"] > 1])
    panels: Sequence[tuple[str, str, Callable[[Axes], None]]] = (
        ("Time to first token, share of answers", "milliseconds", lambda axes: _shares(axes, 1e3 * first, colours)),
        ("Time per token, share of answers", "milliseconds", lambda axes: _shares(axes, 1e3 * per_token, colours)),
        ("Requests in flight", "seconds", lambda axes: _in_flight(axes, result["in_flight"], colours)),
        ("Time to first token (ms), by when it was asked", "seconds", lambda axes: _by_time(axes, done, 1e3 * first, colours)),
    )
    for (left, top), (title, unit, draw) in zip(_BOXES, panels, strict=True):
        box = (left / _WIDTH, 1 - (top + _TALL) / _HEIGHT, _WIDE / _WIDTH, _TALL / _HEIGHT)
        axes = figure.add_axes(box)
        figure.text((left - 42) / _WIDTH, 1 - (top - 16) / _HEIGHT, title, size=13, weight="bold")
        axes.grid(axis="y")
        axes.set_xlabel(unit, fontsize=11, labelpad=3)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EvenTicks())
        draw(axes)
    return figure


def _shares(axes: Axes, values: np.ndarray[Any, Any], colours: Palette) -> None:
    """The share of answers that had waited no longer; median and 95th percentile are named."""
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if not len(values):
        return
    axes.step([0, *np.sort(values)], np.arange(len(values) + 1) / len(values), where="post", color=colours.accent, linewidth=1.7)
    axes.set_xlim(0, 1.2 * values.max())  # with room for the names
    for share, name in ((0.5, "median"), (0.95, "95 %")):
        x = float(np.percentile(values, 100 * share))
        axes.plot([x], [share], marker="o", markersize=5, color=colours.ink)
        axes.annotate(f"{name} {x:.3g}", (x, share), (9, -13), textcoords="offset points", size=11, color=colours.ink)


def _in_flight(axes: Axes, counts: Sequence[Sequence[float]], colours: Palette) -> None:
    times, numbers = counts
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.fill_between(times, numbers, step="post", color=colours.accent, alpha=0.25, linewidth=0)
    axes.step(times, numbers, where="post", color=colours.accent, linewidth=1)
    axes.set_xlim(0, max(times, default=1.0))
    axes.set_ylim(0, None)


def _by_time(axes: Axes, done: Sequence[Mapping[str, Any]], first: np.ndarray[Any, Any], colours: Palette) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(EvenTicks())
    axes.plot([o["sent"] for o in done], first, linestyle="none", marker="o", markersize=3.4, color=colours.accent, alpha=0.6)
    axes.set_xlim(0, None)
    axes.set_ylim(0, None)
