"""The pictures of the report: the ladder, and the curves of training."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from athanor.core.errors import ConfigError
from athanor.core.io import atomic_write
from athanor.report import words
from athanor.report.data import COMPRESSED, Report, parent, rungs
from athanor.report.svg import LIGHT, STAND_INS, Palette, inline, standalone, style
from athanor.report.svg import figure as new_figure

RUNG_WORDS = {"base": "pre-trained", "sft": "taught skills", "rl": "reinforced", "int8": "8-bit weights", "int4": "4-bit weights"}


# The ladder


def describe_ladder(report: Report) -> str:
    """The picture in words: each rung's accuracy with its interval."""
    ladder = report["ladder"]
    rows = []
    for name in rungs(report):
        value, low, high = (words.share(ladder[name]["accuracy"][field]) for field in ("value", "low", "high"))
        rows.append(f"{name} {value} (95 % interval {low} to {high})")
    return "Accuracy by checkpoint: " + "; ".join(rows) + "."


def _draw_ladder(report: Report, width: float, height: float, colours: Palette, titled: bool) -> Figure:
    """Every checkpoint is a tread at its accuracy with a 95 % interval; a riser leads up (or down) from its parent.

    Where a parent was compressed, its interval runs on as a pale band, so that one sees whether the small copies stay in it.
    """
    names, ladder = rungs(report), report["ladder"]
    roomy = width >= 560
    margins = (52, 20, 88, 72) if titled else (46, 6, 26, 66) if roomy else (40, 6, 26, 34)
    figure, axes = new_figure(width, height, margins)
    place = {name: i + (0.35 if name in COMPRESSED else 0.0) for i, name in enumerate(names)}
    half = 0.27
    axes.set_xlim(-0.55, max(place.values()) + 0.55)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.yaxis.set_major_locator(MaxNLocator(4 if roomy else 2))
    axes.grid(axis="y")
    axes.spines["bottom"].set_visible(False)

    last_copy = {above: place[name] for name in names if name in COMPRESSED and (above := parent(report, name)) is not None}
    for above, x in last_copy.items():
        band = ladder[above]["accuracy"]
        axes.fill_between(
            [place[above] + half, x + half], band["low"], band["high"], color=colours.accent, alpha=0.09, linewidth=0
        )
    for name in names:
        x, score = place[name], ladder[name]["accuracy"]
        above = parent(report, name)
        if above is not None:
            level = ladder[above]["accuracy"]["value"]
            start, turn = place[above] + half, x - half
            dashes = (0, (1, 2.4)) if name in COMPRESSED else "solid"
            axes.plot([start, turn, turn], [level, level, score["value"]], color=colours.muted, linewidth=1, linestyle=dashes)
        axes.fill_between(
            [x - half, x + half], score["low"], score["high"], color=colours.accent, alpha=0.28, linewidth=0, clip_on=False
        )
        axes.plot(
            [x - half, x + half], [score["value"]] * 2, color=colours.accent, linewidth=3.2, solid_capstyle="butt", clip_on=False
        )
        axes.annotate(
            words.share(score["value"], 1 if roomy else 0), (x, score["high"]), (0, 6), textcoords="offset points",
            ha="center", size=15 if roomy else 12.5, weight="bold", annotation_clip=False,
        )  # fmt: skip

    axes.set_xticks([place[name] for name in names], names)
    axes.tick_params(axis="x", labelsize=14 if roomy else 12.5, labelcolor=colours.ink, pad=8)
    if roomy:
        for name in names:
            below = (RUNG_WORDS.get(name, ""), words.size(ladder[name]["bytes"]))
            for offset, text in zip((-42, -58), below, strict=True):
                axes.annotate(
                    text, (place[name], 0), (0, offset), textcoords="offset points",
                    ha="center", size=11, color=colours.muted, annotation_clip=False,
                )  # fmt: skip
    if titled:
        _title(figure, report, width, height, colours)
    return figure


def _title(figure: Figure, report: Report, width: float, height: float, colours: Palette) -> None:
    parameters, duration = words.parameters(report["plan"]["parameters"]), words.duration(report["seconds"])
    head = f"{parameters} parameters, from raw text to assistant in {duration}"
    note = f"share of {ladder_trials(report)} test problems answered correctly, with 95 % intervals"
    figure.text(16 / width, 1 - 32 / height, head, size=19)
    figure.text(16 / width, 1 - 54 / height, note, size=12, color=colours.muted)


def ladder_trials(report: Report) -> str:
    """How many problems each checkpoint was asked: `480`, or `240 to 480` where they differ."""
    counts = [rung["accuracy"]["n"] for rung in report["ladder"].values()]
    low, high = words.number(min(counts)), words.number(max(counts))
    return low if low == high else f"{low} to {high}"


def ladder_inline(report: Report, narrow: bool = False) -> str:
    """The ladder for the page, in the page's colours; `narrow` for a phone."""
    salt = "ladder-narrow" if narrow else "ladder"
    with style(STAND_INS, salt):
        figure = _draw_ladder(report, *((350, 290) if narrow else (760, 400)), STAND_INS, titled=False)
        return inline(figure, salt, describe_ladder(report))


def ladder_svg(report: Report) -> str:
    """The ladder as a file of its own: with a title, its own paper, and a dark version inside."""
    with style(STAND_INS, "ladder"):
        return standalone(_draw_ladder(report, 820, 460, STAND_INS, titled=True), "ladder", describe_ladder(report), 820, 460)


def write_ladder(report: Report, path: str | Path) -> Path:
    """Write the ladder to `path`: `.svg` follows the reader's light or dark mode, `.png` is light, 1640 pixels wide.

    Raises ConfigError for another suffix.
    """
    path = Path(path)
    if path.suffix == ".svg":
        atomic_write(path, ladder_svg(report))
    elif path.suffix == ".png":
        buffer = io.BytesIO()
        with style(LIGHT, "ladder"):
            figure = _draw_ladder(report, 820, 460, LIGHT, titled=True)
            figure.savefig(buffer, format="png", dpi=144, facecolor=LIGHT.paper, metadata={"Software": None})
        atomic_write(path, buffer.getvalue())
    else:
        raise ConfigError(f"picture path {str(path)!r} ends in {path.suffix!r}: give one that ends in .svg or .png")
    return path


# Curves


@dataclass(frozen=True, slots=True)
class Look:
    """How a curve is drawn. share: percent on the axis. log: a logarithmic axis if all values are positive.
    smooth: off for what is no measurement, such as a learning rate. Width and height in pixels."""

    share: bool = False
    log: bool = False
    smooth: bool = True
    width: int = 256
    height: int = 160


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over `window` neighbours. At the begin, where curves are steep, the window shrinks evenly on both sides;
    at the end it is cut off."""
    total = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    index = np.arange(len(values))
    reach = np.minimum(window // 2, index)
    first, last = index - reach, np.minimum(index + reach, len(values) - 1)
    return [float(mean) for mean in (total[last + 1] - total[first]) / (last + 1 - first)]


def curve(steps: Sequence[int], values: Sequence[float], salt: str, title: str, look: Look) -> str:
    """One series over steps: every point pale, its running mean strong; above 300 points the pale part is a band of the range."""
    colours = STAND_INS
    with style(colours, salt):
        figure, axes = new_figure(look.width, look.height, (48, 8, 8, 26))
        smooth = look.smooth and len(values) >= 40
        if smooth and len(values) > 300:
            parts = np.array_split(np.asarray(values), 150)
            begins = np.cumsum([0] + [len(part) for part in parts[:-1]])
            low, high = [part.min() for part in parts], [part.max() for part in parts]
            axes.fill_between(np.asarray(steps)[begins], low, high, color=colours.accent, alpha=0.25, linewidth=0)
        elif smooth:
            axes.plot(steps, values, color=colours.accent, alpha=0.35, linewidth=1)
        line = running_mean(values, max(5, len(values) // 40)) if smooth else values
        keep = np.unique(np.linspace(0, len(line) - 1, min(len(line), 300)).round().astype(int))
        dots: dict[str, Any] = {"marker": "o", "markersize": 4} if len(line) <= 12 else {}
        axes.plot([steps[i] for i in keep], [line[i] for i in keep], color=colours.accent, linewidth=1.7, **dots)
        _axes_of_steps(axes)
        if look.log and min(values) > 0:
            axes.set_yscale("log")
            decades = np.log10(max(values)) - np.log10(min(values))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if decades < 2.5 else (1,)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _scientific(value)))
        elif look.share:
            axes.yaxis.set_major_formatter(EvenTicks(scale=100, unit=" %"))
        return inline(figure, salt, _describe(steps, values, title))


def heldout(steps: Sequence[int], values: Sequence[float], others: Mapping[str, float], salt: str, look: Look) -> str:
    """Held-out bits per byte over steps, with a horizontal line for each compressor in `others`."""
    colours = STAND_INS
    with style(colours, salt):
        figure, axes = new_figure(look.width, look.height, (48, 72 if others else 8, 8, 26))
        axes.plot(steps, values, color=colours.accent, linewidth=1.7, marker="o" if len(values) <= 40 else None, markersize=4)
        everything = [*values, *others.values()]
        low, high = min(everything), max(everything)
        pad = 0.08 * (high - low) or 0.1
        axes.set_ylim(low - pad, high + pad)
        ranked = sorted(others.items(), key=lambda item: item[1])
        places = spread([value for _, value in ranked], 0.09 * (high - low + 2 * pad))
        for (name, value), y in zip(ranked, places, strict=True):
            axes.axhline(value, color=colours.muted, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                f"{name} {value:.2f}", (1, y), (6, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                va="center", size=11, color=colours.muted, annotation_clip=False,
            )  # fmt: skip
        _axes_of_steps(axes)
        rivals = ", ".join(f"{name} {value:.2f}" for name, value in others.items())
        text = _describe(steps, values, "Held-out bits per byte") + (f" For comparison: {rivals}." if rivals else "")
        return inline(figure, salt, text)


def spread(sorted_values: Sequence[float], apart: float) -> list[float]:
    """Positions near ascending values, neighbours at least `apart`: crowded ones are pushed apart around their mean."""
    groups: list[list[float]] = []
    for value in sorted_values:
        groups.append([value])
        while len(groups) > 1 and _first(groups[-1], apart) - _last(groups[-2], apart) < apart:
            top = groups.pop()
            groups[-1] += top
    return [_first(group, apart) + i * apart for group in groups for i in range(len(group))]


def _first(group: Sequence[float], apart: float) -> float:
    return sum(group) / len(group) - apart * (len(group) - 1) / 2


def _last(group: Sequence[float], apart: float) -> float:
    return sum(group) / len(group) + apart * (len(group) - 1) / 2


class EvenTicks(Formatter):
    """Tick labels of one axis with the same number of decimals; as powers of ten where they are tiny or huge."""

    def __init__(self, scale: float = 1.0, unit: str = "") -> None:
        self.scale, self.unit = scale, unit

    def __call__(self, value: float, position: int | None = None) -> str:
        return self.format_ticks([value])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        values = [value * self.scale for value in values]
        largest = max((abs(value) for value in values), default=0.0)
        if largest and not 1e-3 <= largest < 1e6:
            return [_scientific(value) + self.unit for value in values]
        decimals = next((d for d in range(6) if all(abs(round(v, d) - v) < 1e-6 * largest for v in values)), 6)
        return [f"{value:,.{decimals}f}{self.unit}".replace("-", "\u2212") for value in values]


def _scientific(value: float) -> str:
    """6e-7, 1.5e6, 0"""
    mantissa, _, exponent = f"{value:.2g}".partition("e") if value and 1e-4 <= abs(value) < 100 else f"{value:.1e}".partition("e")
    mantissa = mantissa.removesuffix(".0")
    return "0" if not value else f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _axes_of_steps(axes: Axes) -> None:
    axes.grid(axis="y")
    axes.margins(x=0.01)
    steps = [1, 2, 2.5, 5, 10]
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=steps))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=steps))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(EvenTicks())


def _describe(steps: Sequence[int], values: Sequence[float], title: str) -> str:
    first, last = f"{words.number(values[0])} at step {steps[0]}", f"{words.number(values[-1])} at step {steps[-1]}"
    return (
        f"{title} over {len(values)} logged steps: {first}, {last};"
        f" lowest {words.number(min(values))}, highest {words.number(max(values))}."
    )
