"""What a model looks at, as a picture and as a page. Legend: L layers, H heads, T tokens that look, S tokens looked at."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from athanor.core.io import atomic_file, atomic_write
from athanor.report import words
from athanor.report.svg import DARK, LIGHT, faces, style

_HERE = Path(__file__).parent
FULL = 65535  # what a share of 1 is written as in the page
SHADE = 0.5  # opacity of the accent behind a token that has all of a share: ink stays legible on it
_LABELLED = 48  # tokens, up to which they are written beside a map
_GRID, _SIDE = 1040, 430  # pixels: width of the grid of heads, and of the mean map's sides


@dataclass(frozen=True)
class Panel:
    """One kind of attention.

    title    in words: who looks at what
    rows     tokens that look, T
    columns  tokens looked at, S
    layers   numbers of the layers, L
    weights  (L, H, T, S) probabilities
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    layers: Sequence[int]
    weights: Any


def _shown(token: str) -> str:
    """A token for a label: white space is seen."""
    text = words.visible(token.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥"))
    return text if len(text) <= 14 else text[:13] + "…"


def draw(title: str, panels: Sequence[Panel], path: Path) -> None:
    """The picture: of each panel the mean of all heads with its tokens, and every head of every layer. SVG, PNG or PDF."""
    ramp = LinearSegmentedColormap.from_list("attention", [LIGHT.paper, LIGHT.accent, LIGHT.ink])
    heights = [_height(panel) for panel in panels]
    width, height = _GRID + 110, 70 + sum(heights)
    with style(LIGHT, "attention"), warnings.catch_warnings(), matplotlib.rc_context({"font.family": faces()}):
        # Letters that no installed font has are empty boxes in the picture; the page has them all.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor=LIGHT.paper)
        figure.text(28 / width, 1 - 30 / height, title, fontsize=17, weight="bold", va="center")
        top = 60.0
        for panel, tall in zip(panels, heights, strict=True):
            _draw_panel(figure, panel, width, height, top, ramp)
            top += tall
        with atomic_file(path) as temporary:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(temporary, format=path.suffix[1:], dpi=110, metadata=metadata)


def _cell(panel: Panel) -> tuple[float, float]:
    """Width and height in pixels of one head's map."""
    heads = panel.weights.shape[1]
    wide = min(120.0, _GRID / heads)
    return wide, wide * min(2.0, max(0.5, len(panel.rows) / len(panel.columns)))


def _height(panel: Panel) -> float:
    return 40 + _SIDE + 150 + 40 + panel.weights.shape[0] * (_cell(panel)[1]) + 50


def _draw_panel(figure: Figure, panel: Panel, width: float, height: float, top: float, ramp: LinearSegmentedColormap) -> None:
    def place(left: float, y: float, w: float, h: float) -> Any:
        axes = figure.add_axes((left / width, 1 - (y + h) / height, w / width, h / height))
        axes.tick_params(length=0, pad=4)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return axes

    def say(x: float, y: float, text: str, **more: Any) -> None:
        figure.text(x / width, 1 - y / height, text, va="center", **more)

    say(28, top + 20, panel.title, fontsize=14, weight="bold")
    side = _SIDE / max(len(panel.rows), len(panel.columns))
    mean = place(130, top + 50, side * len(panel.columns), side * len(panel.rows))
    mean.imshow(np.sqrt(panel.weights.mean((0, 1))), cmap=ramp, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    small = max(5.0, min(11.0, side * 0.72))
    told = [
        "Left: the mean of all heads.",
        "A row is a token that looks, a column one that is looked at;",
        "the darker, the more: by the square root of the share, so",
        "that small ones are seen. Below: every head of every layer.",
    ]
    if len(panel.rows) <= _LABELLED and len(panel.columns) <= _LABELLED:
        mean.set_yticks(range(len(panel.rows)), [_shown(t) for t in panel.rows], fontsize=small)
        mean.set_xticks(range(len(panel.columns)), [_shown(t) for t in panel.columns], rotation=90, fontsize=small)
    else:
        mean.set_xticks([])
        mean.set_yticks([])
        told += [
            f"Tokens are written up to {_LABELLED} of them; here there are more,",
            "and the page beside this picture names them.",
        ]
    for i, line in enumerate(told):
        say(width - 460, top + 70 + 18 * i, line, fontsize=11, color=LIGHT.muted)
    wide, tall = _cell(panel)
    y = top + 50 + _SIDE + 130
    for head in range(panel.weights.shape[1]):
        say(70 + wide * (head + 0.5), y - 12, str(head), fontsize=9, color=LIGHT.muted, ha="center")
    say(70 + wide * panel.weights.shape[1] / 2, y - 28, "head", fontsize=10, color=LIGHT.muted, ha="center")
    for i, layer in enumerate(panel.layers):
        say(60, y + tall * (i + 0.5), f"layer {layer}", fontsize=9, color=LIGHT.muted, ha="right")
    grid = place(70, y, wide * panel.weights.shape[1], tall * len(panel.layers))
    grid.imshow(_together(panel.weights), cmap=ramp, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    grid.axis("off")


def _together(weights: Any) -> Any:
    """All maps as one image, a blank row and column between them."""
    layers, heads, t, s = weights.shape
    gap = max(1, round(max(t, s) * 0.06))
    image = np.full((layers * (t + gap), heads * (s + gap)), np.nan)
    for i in range(layers):
        for j in range(heads):
            image[i * (t + gap) : i * (t + gap) + t, j * (s + gap) : j * (s + gap) + s] = np.sqrt(weights[i, j])
    return image


def write(title: str, panels: Sequence[Panel], path: Path) -> None:
    """The page: one file, without network, in which layer, head and token can be chosen."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    data = [
        {
            "title": panel.title,
            "rows": [words.visible(t) for t in panel.rows],
            "columns": [words.visible(t) for t in panel.columns],
            "layers": list(panel.layers),
            "heads": panel.weights.shape[1],
            # With 8 bits the many small shares of a long text would be rounded to sums far from 1.
            "weights": base64.b64encode(np.round(panel.weights * FULL).astype("<u2").tobytes()).decode(),
        }
        for panel in panels
    ]
    page = environment.get_template("attention.html.j2").render(
        title=title, panels=data, full=FULL, shade=SHADE, light=LIGHT, dark=DARK
    )
    atomic_write(path, page + "\n")
