"""The picture of a memory plan: one bar for each way of training, stacked of the parts of its peak, beside what a device has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from athanor.core.errors import ConfigError
from athanor.core.io import atomic_file
from athanor.report import words
from athanor.report.architecture import FORMATS
from athanor.report.svg import LIGHT, figure, style

_ROW, _WIDTH, _LEFT, _BAR = 40, 860, 250.0, 420.0
# Nothing is told by hue alone: parts have shades and hatches, and stand in the legend in the order of the bars.
_SHADES = (1.0, 0.55, 0.75, 0.3, 0.9, 0.42, 0.18)
_HATCHES = ("", "", "///", "", "...", "xxx", "")


def draw(title: str, subtitle: str, bars: Sequence[tuple[str, Mapping[str, int]]], memory: float | None, path: Path) -> None:
    """Write the picture; the file's name says the format.

    Args:
        title, subtitle: above it.
        bars: (name, {part: bytes}), the same parts in each.
        memory: bytes that there are; a line.
        path: ends with one of FORMATS.

    Raises:
        ConfigError: a format that is not in FORMATS.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"picture ({path}) must end with {', '.join(FORMATS)}: rename it")
    names = [part for part in bars[0][1] if any(parts[part] for _, parts in bars)]
    widest = max([sum(parts.values()) for _, parts in bars] + ([memory] if memory else []))
    top, bottom = 76.0, 20.0 * (1 + (len(names) - 1) // 4) + 24
    height = top + _ROW * len(bars) + bottom + 16
    with style(LIGHT, "memory"):
        drawing, axes = figure(_WIDTH, height, (16, 16, 64, 16))
        drawing.set_facecolor(LIGHT.paper)
        axes.set_xlim(0, _WIDTH - 32)
        axes.set_ylim(height - 80, 0)
        axes.axis("off")
        drawing.text(16 / _WIDTH, 1 - 26 / height, title, fontsize=16, weight="bold", va="center")
        drawing.text(16 / _WIDTH, 1 - 48 / height, subtitle, fontsize=11, color=LIGHT.muted, va="center")
        for i, (name, parts) in enumerate(bars):
            y, left = 14.0 + _ROW * i, _LEFT
            axes.text(0, y + 9, name, va="center", fontsize=12)
            for part in names:
                width = _BAR * parts[part] / widest
                _box(axes, left, y, width, names.index(part))
                left += width
            axes.text(left + 8, y + 9, words.size(sum(parts.values())), va="center", fontsize=11, color=LIGHT.muted)
        if memory:
            x = _LEFT + _BAR * memory / widest
            axes.plot([x, x], [4, 8 + _ROW * len(bars)], color=LIGHT.ink, linewidth=1.2)
            axes.text(x + 4, 2, f"{words.size(memory)} there", fontsize=10, color=LIGHT.ink, va="center")
        for i, part in enumerate(names):
            x, y = 150.0 * (i % 4), 24.0 + _ROW * len(bars) + 20 * (i // 4)
            _box(axes, x, y - 6, 14, i, 12)
            axes.text(x + 20, y, part, va="center", fontsize=11, color=LIGHT.muted)
        with atomic_file(path) as temporary:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            drawing.savefig(temporary, format=path.suffix[1:], dpi=144, metadata=metadata)


def _box(axes: object, left: float, y: float, width: float, kind: int, height: float = 18) -> None:
    axes.barh(  # type: ignore[attr-defined]  # matplotlib's Axes
        y + height / 2, width, left=left, height=height, color=LIGHT.accent, alpha=_SHADES[kind % len(_SHADES)],
        hatch=_HATCHES[kind % len(_HATCHES)], edgecolor=LIGHT.paper, linewidth=0.8,
    )  # fmt: skip
