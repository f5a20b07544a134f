"""matplotlib figures as SVG for a light and a dark page alike.

A picture on the page takes its colours from the page: it is drawn in stand-in colours, which then become CSS variables
(`--ink`, `--muted`, `--line`, `--accent`, `--paper`). Text stays text, in the page's font. One unit of a figure is one CSS pixel.
Figures are made without pyplot and hold no date and no version: the same report gives the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

SVG = "http://www.w3.org/2000/svg"
_HREF = "{http://www.w3.org/1999/xlink}href"
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"
CHINESE = ("Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Zen Hei", "PingFang SC", "Heiti SC")


@dataclass(frozen=True, slots=True)
class Palette:
    """One accent among greys; nothing is told by hue alone. Contrast of ink, muted and accent on paper is above 4.5."""

    ink: str
    muted: str
    line: str
    accent: str
    paper: str

    @property
    def accent_rgb(self) -> str:
        """The accent as CSS wants it where it takes an opacity: `176 71 28`."""
        return " ".join(str(int(self.accent[i : i + 2], 16)) for i in (1, 3, 5))


LIGHT = Palette(ink="#1f1d1a", muted="#6b665e", line="#e2ddd3", accent="#b0471c", paper="#fdfcf9")
DARK = Palette(ink="#ebe7df", muted="#a39d92", line="#38342e", accent="#f0905f", paper="#171614")
STAND_INS = Palette(ink="#000001", muted="#000002", line="#000003", accent="#000004", paper="#000005")


def faces() -> list[str]:
    """Installed fonts for pictures of pixels: the first has most signs, the others have Chinese (CHINESE), where there is one."""
    there = {font.name for font in fontManager.ttflist}
    return [face for face in ("DejaVu Sans", *CHINESE) if face in there] or ["sans-serif"]


@contextmanager
def style(colours: Palette, salt: str) -> Iterator[None]:
    """matplotlib set up for one drawing, whatever the user's own settings are; `salt` makes the ids in its SVG."""
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "text.parse_math": False,
        "font.size": 12,
        "text.color": colours.ink,
        "axes.edgecolor": colours.line,
        "axes.labelcolor": colours.muted,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "axes.formatter.use_mathtext": False,
        "grid.color": colours.line,
        "grid.linewidth": 0.8,
        "xtick.color": colours.muted,
        "ytick.color": colours.muted,
        "xtick.labelsize": 11,
        "ytick.labelsize": 11,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.major.pad": 6,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield


def figure(width: float, height: float, margins: tuple[float, float, float, float]) -> tuple[Figure, Axes]:
    """A figure of width x height pixels with one axes; margins left, right, top, bottom in pixels."""
    left, right, top, bottom = margins
    drawing = Figure(figsize=(width / 72, height / 72), dpi=72)
    box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    return drawing, drawing.add_axes(box)


def element(drawing: Figure, salt: str, description: str) -> ET.Element:
    """The figure as an <svg> element for embedding: described, sized by its viewBox, ids only where they are referred to."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # text stays text: the reader's fonts count
        drawing.savefig(buffer, format="svg", metadata={"Date": None})
    source = buffer.getvalue().replace(f"{{{SVG}}}", "")
    root = ET.fromstring(source)
    for part in root.iter():
        for child in list(part):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                part.remove(child)
    used = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', source))
    for part in root.iter():
        if part.get("id") not in used:
            part.attrib.pop("id", None)
        else:
            part.set("id", f"{salt}-{part.get('id')}")
        if _HREF in part.attrib:
            part.set("href", f"#{salt}-{part.attrib.pop(_HREF)[1:]}")
        if "clip-path" in part.attrib:
            part.set("clip-path", part.attrib["clip-path"].replace("#", f"#{salt}-"))
        if "style" in part.attrib:
            part.set("style", re.sub(r"font-family: [^;]*;? ?", "", part.attrib["style"]))
        if "d" in part.attrib:
            part.set("d", re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", part.attrib["d"]).replace("\n", ""))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"class": "plot", "role": "img", "aria-label": description}
    return root


def to_text(root: ET.Element, colours: Mapping[str, str]) -> str:
    """The element as text, its stand-in colours replaced."""
    ET.register_namespace("", SVG)
    text = ET.tostring(root, encoding="unicode")
    for name, stand_in in asdict(STAND_INS).items():
        text = text.replace(stand_in, colours[name])
    return text


VARIABLES = {name: f"var(--{name})" for name in asdict(STAND_INS)}


def inline(drawing: Figure, salt: str, description: str) -> str:
    """The figure for the page; `salt` is its name there, `description` what a screen reader says."""
    return to_text(element(drawing, salt, description), VARIABLES)


def standalone(drawing: Figure, salt: str, description: str, width: int, height: int) -> str:
    """The figure as a file of its own: with its own paper, and a dark version inside."""
    root = element(drawing, salt, description)
    light, dark = (";".join(f"--{k}:{v}" for k, v in asdict(p).items()) for p in (LIGHT, DARK))
    sheet = ET.Element(f"{{{SVG}}}style")
    sheet.text = f":root{{{light};font-family:{FONTS}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
    paper = ET.Element(f"{{{SVG}}}rect", {"width": "100%", "height": "100%", "style": f"fill: {STAND_INS.paper}"})
    root.insert(0, sheet)
    root.insert(1, paper)
    root.attrib |= {"width": str(width), "height": str(height)}
    return '<?xml version="1.0" encoding="utf-8"?>\n' + to_text(root, VARIABLES) + "\n"
