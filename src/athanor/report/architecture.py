"""The picture of a model: its parts from the first to the last, each as wide as its share of the parameters."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import matplotlib
from matplotlib.figure import Figure

from athanor.core.errors import ConfigError
from athanor.core.io import atomic_file
from athanor.report import words
from athanor.report.svg import LIGHT, faces, figure, style

_ROW, _INNER, _LINE, _WIDTH = 46, 20, 22, 760
FORMATS = (".svg", ".png", ".pdf")


class Part(Protocol):
    """What is drawn of a part: `models._profile.Part`."""

    @property
    def name(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def parameters(self) -> int: ...
    @property
    def inside(self) -> Sequence[tuple[str, int]]: ...


def draw(title: str, subtitle: str, parts: Sequence[Part], path: Path) -> None:
    """Write the picture; the file's name says the format. Raises ConfigError for one that is not in FORMATS."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"picture ({path}) must end with {', '.join(FORMATS)}: rename it")
    total = sum(part.parameters for part in parts) or 1
    rows = [(part, [name for name, _ in part.inside] if part.count > 1 or len(part.inside) > 1 else []) for part in parts]
    with style(LIGHT, "architecture"), warnings.catch_warnings(), matplotlib.rc_context({"font.family": faces()}):
        # Letters that no installed font has are empty boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        lines = _wrapped(title, _WIDTH - 32)
        above = 80 + _LINE * (len(lines) - 1)
        height = 16 + above + sum(_ROW + _INNER * bool(inner) for _, inner in rows)
        drawing, axes = figure(_WIDTH, height, (16, 16, above - 16, 16))
        drawing.set_facecolor(LIGHT.paper)
        axes.set_xlim(0, _WIDTH - 32)
        axes.set_ylim(height - above, 0)
        axes.axis("off")
        for i, line in enumerate(lines):
            drawing.text(16 / _WIDTH, 1 - (26 + _LINE * i) / height, line, fontsize=16, weight="bold", va="center")
        drawing.text(16 / _WIDTH, 1 - (above - 32) / height, subtitle, fontsize=11, color=LIGHT.muted, va="center")
        y, bar, left = 0.0, 270.0, 330.0
        for part, inner in rows:
            deep = _ROW + _INNER * bool(inner)
            share = part.parameters / total
            axes.barh(y + 18, bar * share, left=left, height=16, color=LIGHT.accent, linewidth=0)
            axes.barh(y + 18, bar, left=left, height=16, facecolor="none", edgecolor=LIGHT.line, linewidth=1)
            name = f"{part.name}   x {part.count}" if part.count > 1 else part.name
            axes.text(0, y + 18, name, va="center", fontsize=12.5, weight="bold")
            figures = f"{words.parameters(part.parameters)}   {share:.1%}"
            axes.text(left + bar + 12, y + 18, figures, va="center", fontsize=11, color=LIGHT.muted)
            if inner:
                axes.text(0, y + 38, "each: " + ", ".join(inner), va="center", fontsize=10.5, color=LIGHT.muted)
            axes.plot([0, _WIDTH - 32], [y + deep - 6] * 2, color=LIGHT.line, linewidth=0.8)
            y += deep
        with atomic_file(path) as temporary:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            drawing.savefig(temporary, format=path.suffix[1:], dpi=144, metadata=metadata)


def _wrapped(title: str, width: float) -> list[str]:
    """The title in lines of at most `width` pixels; names have few spaces, so it is broken anywhere."""
    ruler, lines = Figure(dpi=72).text(0, 0, "", fontsize=16, weight="bold"), [""]
    for letter in title:
        ruler.set_text(lines[-1] + letter)
        if ruler.get_window_extent().width > width:
            lines.append("")
        lines[-1] += letter
    return lines
