"""Several runs of one stage beside each other: their curves, and in what their settings differ, as a page or as a picture.

A run is told by colour and dashes together, so nothing hangs on hue alone. English or Chinese.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from athanor.core.errors import ConfigError
from athanor.core.io import atomic_write
from athanor.report import svg, words
from athanor.report.curves import points_of
from athanor.report.plots import EvenTicks, running_mean
from athanor.report.runs import StageLog, differences
from athanor.report.svg import LIGHT, STAND_INS, Palette

Language = Literal["en", "zh"]
_HERE = Path(__file__).parent
_DASHES: dict[str, Any] = {"solid": "solid", "dashed": (0, (4.5, 1.8)), "dotted": (0, (1.2, 1.4))}
# One for each run. Neighbours differ in dashes too: where one lies on the other, both are seen.
STYLES = (
    ("accent", "solid"), ("ink", "dashed"), ("muted", "solid"), ("accent", "dotted"), ("ink", "solid"), ("muted", "dashed"),
    ("accent", "dashed"), ("ink", "dotted"), ("muted", "dotted"),
)  # fmt: skip
_WIDTH, _COLUMN, _TALL, _GAP = 1000, 440, 232, 62  # pixels of the picture, of a panel in it, and between panels
_POINTS = 300  # of a line; more are not seen

TEXT: dict[str, tuple[str, str]] = {
    "title": ("Runs compared", "运行对比"),
    "stage": ("stage", "阶段"),
    "run": ("run", "运行"),
    "state": ("state", "状态"),
    "steps": ("steps", "步数"),
    "tokens": ("tokens", "词元"),
    "time": ("time", "时间"),
    "loss": ("Training loss", "训练损失"),
    "last_loss": ("loss", "损失"),
    "best_heldout": ("held-out", "留出"),
    "speed": ("tokens/s", "词元/秒"),
    "heldout_bits_per_byte": ("Held-out text, bits per byte", "留出文本，每字节比特"),
    "heldout_loss": ("Held-out loss", "留出损失"),
    "reward": ("Reward", "奖励"),
    "accuracy": ("Accuracy of sampled answers", "采样回答的正确率"),
    "lr": ("Learning rate", "学习率"),
    "grad_norm": ("Gradient norm, before clipping", "梯度范数（裁剪前）"),
    "tokens_per_second": ("Tokens per second", "每秒词元"),
    "mfu": ("Model FLOPs utilisation", "算力利用率"),
    "thousand tokens": ("thousand tokens", "千词元"),
    "million tokens": ("million tokens", "百万词元"),
    "billion tokens": ("billion tokens", "十亿词元"),
    "seconds": ("seconds", "秒"),
    "minutes": ("minutes", "分钟"),
    "hours": ("hours", "小时"),
    "running": ("running", "运行中"),
    "finished": ("finished", "已完成"),
    "stopped": ("stopped", "已停止"),
    "stale": ("stale", "已失联"),
    "differ": ("Settings that differ", "不同的设置"),
    "same": ("The settings of these runs are the same.", "这些运行的设置相同。"),
    "field": ("field", "字段"),
    "note": (
        "Lines of more than 40 steps are running means. Loss and gradient norm of the first twentieth of the steps may lie above"
        " their frames. Held-out: the best.",
        "超过40步的曲线为滑动平均。前二十分之一步的损失与梯度范数可能超出图框。留出值为最佳值。",
    ),
    "made": (
        "Made by Athanor. This page is one file and loads nothing.",
        "由 Athanor 生成。本页为单一文件，不加载任何外部内容。",
    ),
}
# What is drawn, over what: everything that at least one of the runs logged twice.
PANELS = (
    ("loss", "steps"), ("loss", "tokens"), ("loss", "time"), ("heldout_bits_per_byte", "steps"), ("heldout_loss", "steps"),
    ("reward", "steps"), ("accuracy", "steps"), ("lr", "steps"), ("grad_norm", "steps"), ("tokens_per_second", "steps"),
    ("mfu", "steps"),
)  # fmt: skip
_EXACT = ("lr", "heldout_bits_per_byte", "heldout_loss")  # no scatter to be smoothed
_SHARES = ("accuracy", "mfu")
_STEEP = ("loss", "grad_norm")  # fall from a height that would flatten all the rest


def say(key: str, language: Language) -> str:
    """A word of TEXT in the language; the key itself where it has none."""
    return TEXT[key][language == "zh"] if key in TEXT else key


@dataclass(frozen=True)
class Panel:
    """One picture: what over what, a line (x, y, where in STYLES) for each run that logged it."""

    key: str
    over: str
    lines: tuple[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], int], ...]

    def title(self, language: Language) -> str:
        """What stands above it."""
        return say(self.key, language)

    def unit(self) -> tuple[str, float]:
        """What the axis below counts, and how many of the line's units that is."""
        longest = max(float(x[-1]) for x, _, _ in self.lines)
        steps = {
            "steps": (("steps", 1.0),),
            "tokens": (("tokens", 1.0), ("thousand tokens", 1e3), ("million tokens", 1e6), ("billion tokens", 1e9)),
            "time": (("seconds", 1.0), ("minutes", 60.0), ("hours", 3600.0)),
        }[self.over]
        return [step for step in steps if longest >= 3 * step[1] or step[1] == 1.0][-1]


def panels(logs: Sequence[StageLog]) -> list[Panel]:
    """What can be drawn of these runs. Raises ConfigError when they are more than there are STYLES, or none logged two steps."""
    if len(logs) > len(STYLES):
        raise ConfigError(f"{len(logs)} runs are too many for one picture ({len(STYLES)} at most): name those to compare")
    made = []
    for key, over in PANELS:
        lines = []
        for place, log in enumerate(logs):
            steps, values = points_of(log.records, key)
            at = {record["step"]: i for i, record in enumerate(log.records)}
            below: Sequence[float] = log.tokens() if over == "tokens" else log.seconds()
            x = steps if over == "steps" else [below[at[step]] for step in steps]
            if len(values) >= 2 and x[-1] > x[0]:
                lines.append((np.asarray(x, dtype=float), np.asarray(values, dtype=float), place))
        if lines:
            made.append(Panel(key, over, tuple(lines)))
    if not made:
        raise ConfigError("none of these runs logged two steps of this stage yet: there is nothing to draw")
    return made


def _draw(axes: Axes, panel: Panel, colours: Palette, language: Language) -> None:
    unit, scale = panel.unit()
    for x, y, place in panel.lines:
        colour, dash = STYLES[place]
        ink = getattr(colours, colour)
        smooth = panel.key not in _EXACT and len(y) >= 40
        keep = np.unique(np.linspace(0, len(y) - 1, min(len(y), _POINTS)).round().astype(int))
        if smooth and len(panel.lines) <= 3:
            axes.plot(x[keep] / scale, y[keep], color=ink, alpha=0.2, linewidth=0.8)
        line = np.asarray(running_mean(list(y), max(5, len(y) // 40))) if smooth else y
        dots: dict[str, Any] = {"marker": "o", "markersize": 3.2} if len(y) <= 12 else {}
        axes.plot(x[keep] / scale, line[keep], color=ink, linestyle=_DASHES[dash], linewidth=1.7, **dots)
    if panel.key in _STEEP:
        _frame(axes, panel)
    axes.grid(axis="y")
    axes.margins(x=0.01)
    axes.set_xlabel(say(unit, language), fontsize=11, labelpad=3)
    nice = [1, 2, 2.5, 5, 10]
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=panel.over == "steps", steps=nice))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=nice))
    axes.xaxis.set_major_formatter(EvenTicks())
    axes.yaxis.set_major_formatter(EvenTicks(100, " %") if panel.key in _SHARES else EvenTicks())


def _frame(axes: Axes, panel: Panel) -> None:
    """Leave the height of the first twentieth of the steps above the frame, so that the rest can be told apart."""
    low = min(float(y.min()) for _, y, _ in panel.lines)
    high = max(float(y[len(y) // 20 :].max()) for _, y, _ in panel.lines)
    if math.isfinite(low) and high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def _describe(panel: Panel, logs: Sequence[StageLog], language: Language) -> str:
    """The picture in words: where each line ends."""
    ends = "; ".join(f"{logs[place].run} {words.number(float(y[-1]))}" for _, y, place in panel.lines)
    return f"{panel.title(language)} / {say(panel.over, language)}: {ends}"


def _picture(logs: Sequence[StageLog], colours: Palette, language: Language) -> tuple[Figure, int]:
    """All panels in two columns below the names of the runs; the figure and its height."""
    shown = panels(logs)
    rows, names = math.ceil(len(shown) / 2), math.ceil(len(logs) / 3)
    top = 66 + 24 * names
    height = top + rows * (_TALL + _GAP) + 18
    figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72)
    figure.text(24 / _WIDTH, 1 - 36 / height, f"{say('title', language)} · {logs[0].stage}", size=19)
    for i, log in enumerate(logs):
        x, y = 24 + (i % 3) * 320, 68 + 24 * (i // 3)
        colour, dash = STYLES[i]
        line: dict[str, Any] = {"color": getattr(colours, colour), "linestyle": _DASHES[dash], "linewidth": 2.0}
        key = matplotlib.lines.Line2D([x / _WIDTH, (x + 34) / _WIDTH], [1 - y / height] * 2, transform=figure.transFigure, **line)
        figure.add_artist(key)
        name = log.run if len(log.run) <= 38 else "…" + log.run[-37:]
        figure.text((x + 44) / _WIDTH, 1 - y / height, words.visible(name), size=13, va="center")
    for i, panel in enumerate(shown):
        left, above = 66 + (i % 2) * (_COLUMN + 56), top + 22 + (i // 2) * (_TALL + _GAP)
        box = (left / _WIDTH, 1 - (above + _TALL - 26) / height, (_COLUMN - 44) / _WIDTH, (_TALL - 26) / height)
        figure.text((left - 42) / _WIDTH, 1 - (above - 14) / height, panel.title(language), size=13, weight="bold")
        _draw(figure.add_axes(box), panel, colours, language)
    return figure, height


def picture(logs: Sequence[StageLog], language: Language = "en") -> str:
    """The picture as an SVG file that follows the reader's light or dark mode."""
    with svg.style(STAND_INS, "runs"):
        figure, height = _picture(logs, STAND_INS, language)
        text = ". ".join(_describe(panel, logs, language) for panel in panels(logs))
        return svg.standalone(figure, "runs", text, _WIDTH, height)


def pixels(logs: Sequence[StageLog], language: Language = "en") -> bytes:
    """The picture as PNG, light, 2000 pixels wide. Raises ConfigError for Chinese where no installed font has it."""
    if language == "zh" and not set(svg.faces()) & set(svg.CHINESE):
        raise ConfigError(f"no installed font has Chinese signs: install {svg.CHINESE[0]}, or write .svg or .html")
    buffer = io.BytesIO()
    with svg.style(LIGHT, "runs"), matplotlib.rc_context({"font.family": svg.faces()}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # of a run's name
        figure, _ = _picture(logs, LIGHT, language)
        figure.savefig(buffer, format="png", dpi=144, facecolor=LIGHT.paper, metadata={"Software": None})
    return buffer.getvalue()


def page(logs: Sequence[StageLog], language: Language = "en") -> str:
    """One self-contained page: a table of the runs, the panels, the settings that differ."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {name: getattr(words, name) for name in ("number", "duration", "visible")}
    shown = []
    for i, panel in enumerate(panels(logs)):
        salt = f"runs-{i}"
        with svg.style(STAND_INS, salt):
            figure, axes = svg.figure(400, 250, (50, 8, 8, 44))
            _draw(axes, panel, STAND_INS, language)
            shown.append((panel.title(language), Markup(svg.inline(figure, salt, _describe(panel, logs, language)))))
    keys = [(colour, {"solid": "", "dashed": "7 3", "dotted": "2 2"}[dash]) for colour, dash in STYLES]
    context: Mapping[str, Any] = {
        "say": lambda key: say(key, language),
        "language": {"en": "en", "zh": "zh-CN"}[language],
        "css": Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        "themes": {"light": svg.LIGHT, "dark": svg.DARK},
        "stage": logs[0].stage,
        "rows": list(zip(keys, [log.row() for log in logs], strict=False)),
        "panels": shown,
        "names": [log.run for log in logs],
        "differences": differences(logs),
    }
    return environment.get_template("compare.html.j2").render(context) + "\n"


def write(logs: Sequence[StageLog], path: Path, language: Language = "en") -> Path:
    """Write the comparison to `path`: .html, .svg or .png. Raises ConfigError for another suffix, and as `panels`."""
    if path.suffix not in (".html", ".svg", ".png"):
        raise ConfigError(f"plot path {str(path)!r} ends in {path.suffix!r}: give one that ends in .html, .svg or .png")
    made: str | bytes = (
        pixels(logs, language) if path.suffix == ".png" else (page if path.suffix == ".html" else picture)(logs, language)
    )
    atomic_write(path, made)
    return path
