"""Runs beside each other: what is drawn, where, in which words, and that a page loads nothing."""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import html5lib
import matplotlib
import numpy as np
import pytest
from PIL import Image

from athanor.core.errors import ConfigError
from athanor.report import compare, svg
from athanor.report.compare import STYLES, TEXT, panels
from athanor.report.runs import StageLog

SVG = "{http://www.w3.org/2000/svg}"


def log(name: str = "a", n: int = 60, level: float = 2.0, stage: str = "pretrain", **settings: Any) -> StageLog:
    records = []
    for step in range(1, n + 1):
        record: dict[str, Any] = {
            "step": step, "loss": level + 6 / step, "lr": 1e-3, "grad_norm": 0.5 + 3 / step, "tokens": 8192,
            "tokens_per_second": 20_000.0 + step % 3, "batch_seconds": 0.01, "mfu": 0.4,
        }  # fmt: skip
        records.append(record | ({"heldout_bits_per_byte": 1.5 + 1 / step} if step % 10 == 0 else {}))
    return StageLog(name, stage, records, "finished", wanted=n, settings=settings)


def drawn(text: str) -> list[str]:
    return ["".join(part.itertext()) for part in ET.fromstring(text.encode()).iter(f"{SVG}text")]


def test_everything_that_was_logged_is_drawn_over_steps_tokens_and_time() -> None:
    found = panels([log("a"), log("b", 30)])
    assert [(p.key, p.over) for p in found] == [
        ("loss", "steps"), ("loss", "tokens"), ("loss", "time"), ("heldout_bits_per_byte", "steps"), ("lr", "steps"),
        ("grad_norm", "steps"), ("tokens_per_second", "steps"), ("mfu", "steps"),
    ]  # fmt: skip
    x, y, place = found[1].lines[1]
    assert place == 1 and x.tolist() == [8192 * (i + 1) for i in range(30)] and y[-1] == pytest.approx(2.2)
    x, _, _ = found[2].lines[0]
    assert x[-1] == pytest.approx(sum(0.01 + 8192 / (20_000 + s % 3) for s in range(1, 61)))
    assert found[3].lines[0][0].tolist() == [10, 20, 30, 40, 50, 60]


def test_a_run_that_did_not_log_a_field_has_no_line_there_and_keeps_its_style() -> None:
    bare = StageLog("a", "sft", [{"step": s, "loss": 1.0} for s in (1, 2, 3)], "running")
    found = {(p.key, p.over): [place for *_, place in p.lines] for p in panels([bare, log("b")])}
    assert found["loss", "steps"] == [0, 1] and found["lr", "steps"] == [1]
    assert found["loss", "tokens"] == found["loss", "time"] == [1]


def test_values_that_are_no_numbers_are_gaps() -> None:
    records = [{"step": s, "loss": "nan" if s == 2 else 1.0} for s in (1, 2, 3)]
    (panel,) = panels([StageLog("a", "sft", records, "running")])
    assert panel.lines[0][0].tolist() == [1, 3]


@pytest.mark.parametrize(
    ("tokens", "seconds", "units"),
    [
        (10, 0.5, ("tokens", "seconds")),
        (2_000, 10.0, ("thousand tokens", "minutes")),
        (10**6, 300.0, ("million tokens", "hours")),
        (10**9, 300.0, ("billion tokens", "hours")),
    ],
)
def test_axes_count_in_units_of_a_readable_size(tokens: int, seconds: float, units: tuple[str, str]) -> None:
    records = [{"step": s, "loss": 1.0, "tokens": tokens, "step_seconds": seconds} for s in range(1, 41)]
    _, over_tokens, over_time = panels([StageLog("a", "sft", records, "running")])
    assert (over_tokens.unit()[0], over_time.unit()[0]) == units
    scale = over_time.unit()[1]
    assert seconds * 40 / scale < 3 * 60 or units[1] == "hours"


def test_too_many_runs_and_nothing_to_draw_are_errors() -> None:
    assert len(set(STYLES)) == len(STYLES) == 9
    panels([log(str(i), 4) for i in range(9)])
    with pytest.raises(ConfigError, match=r"10 runs are too many for one picture \(9 at most\): name those to compare"):
        panels([log(str(i), 4) for i in range(10)])
    with pytest.raises(ConfigError, match="none of these runs logged two steps of this stage yet: there is nothing to draw"):
        panels([log(n=1)])


def test_lines_are_where_the_numbers_are() -> None:
    """Two level runs of loss 1 and 3: read back against the grid."""
    flat = [StageLog(n, "sft", [{"step": s, "loss": v} for s in range(1, 11)], "running") for n, v in (("a", 1.0), ("b", 3.0))]
    root = ET.fromstring(compare.picture(flat).encode())
    paths = [(p.attrib["style"], re.findall(r"[\d.]+", p.attrib["d"])) for p in root.iter(f"{SVG}path") if "style" in p.attrib]

    def heights(style: str, points: int) -> list[float]:
        return [float(numbers[1]) for styled, numbers in paths if style in styled and len(numbers) == 2 * points]

    (one,), (three,) = heights("stroke: var(--accent)", 10), heights("stroke: var(--ink)", 10)
    grid = heights("stroke: var(--line); stroke-width: 0.8; stroke-linecap", 2)
    assert drawn(compare.picture(flat))[6:9] == ["1", "2", "3"]
    np.testing.assert_allclose([one, three], [grid[0], grid[2]], atol=0.02)


def test_the_steep_begin_is_left_above_the_frame() -> None:
    labels = drawn(compare.picture([log(n=200)]))
    assert "8" not in labels and "2" in {label.split(".")[0] for label in labels}


def test_a_picture_names_the_runs_and_loads_nothing() -> None:
    logs = [log("first"), log("a/very/long/name/" + "x" * 60), log("$x$ <b>")]
    source = compare.picture(logs)
    root = ET.fromstring(source.encode())
    found = drawn(source)
    assert {"first", "$x$ <b>", "Runs compared · pretrain", "Training loss", "steps"} <= set(found)
    assert any(text.startswith("…") and len(text) == 38 for text in found)
    assert re.findall(r"https?://[^\"' ]+", source) == ["http://www.w3.org/2000/svg"]
    assert {part.tag.removeprefix(SVG) for part in root.iter()}.isdisjoint({"script", "image", "metadata"})
    said = root.get("aria-label")
    assert said is not None and "Training loss / steps: first 2.1;" in said
    with matplotlib.rc_context({"font.size": 30}):
        assert compare.picture(logs) == source


def test_a_picture_of_pixels() -> None:
    with Image.open(io.BytesIO(compare.pixels([log(), log("b")]))) as image:
        assert image.size[0] == 2000
        assert image.convert("RGB").getpixel((3, 3)) == tuple(int(svg.LIGHT.paper[i : i + 2], 16) for i in (1, 3, 5))


def test_chinese() -> None:
    logs = [log(optim={"lr": 1})]
    assert {"运行对比 · pretrain", "训练损失", "步数"} <= set(drawn(compare.picture(logs, "zh")))
    page = compare.page(logs, "zh")
    assert '<html lang="zh-CN">' in page and "已完成" in page and "这些运行的设置相同。" in page
    english = {words[0] for words in TEXT.values()}
    shown = {text.strip() for text in html5lib.parse(page, namespaceHTMLElements=False).itertext()}
    assert not shown & english
    assert all(re.search("[\u4e00-\u9fff]", chinese) and not re.search("[\u4e00-\u9fff]", eng) for eng, chinese in TEXT.values())


def test_chinese_pixels_need_a_font(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svg, "faces", lambda: ["DejaVu Sans"])
    with pytest.raises(
        ConfigError, match=r"no installed font has Chinese signs: install Noto Sans CJK SC, or write .svg or .html"
    ):
        compare.pixels([log()], "zh")
    monkeypatch.setattr(svg, "faces", lambda: ["DejaVu Sans", svg.CHINESE[0]])
    monkeypatch.setattr(compare, "_picture", lambda *given: (matplotlib.figure.Figure(), 0))
    assert compare.pixels([log()], "zh").startswith(b"\x89PNG")


def test_a_page_is_strict_html_and_shows_what_differs() -> None:
    logs = [log("<i>a</i>", seed=0), StageLog("b", "pretrain", log().records[:20], "stopped", wanted=60, settings={"seed": 1})]
    page = compare.page(logs)
    parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
    root = parser.parse(page)
    assert len(root.findall(".//figure")) == 8
    assert "<i>a" not in page and "&lt;i&gt;a" in page
    assert "20 / 60" in page and "stopped" in page
    cells = [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]
    assert ["seed", "0", "1"] in cells
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "src=" not in page and "@import" not in page and 'role="img"' in page


def test_a_row_without_figures_has_dashes() -> None:
    records = [{"step": s, "loss": "nan" if s == 3 else 1.0} for s in (1, 2, 3)]
    root = html5lib.parse(compare.page([StageLog("a", "sft", records, "running")]), namespaceHTMLElements=False)
    assert ["a", "running", "3", "nan", "–", "–", "–", "–"] in [["".join(c.itertext()) for c in row] for row in root.iter("tr")]


def test_write(tmp_path: Path) -> None:
    logs = [log()]
    assert compare.write(logs, tmp_path / "x.html").read_text(encoding="utf-8") == compare.page(logs)
    assert compare.write(logs, tmp_path / "x.svg", "zh").read_text(encoding="utf-8") == compare.picture(logs, "zh")
    assert compare.write(logs, tmp_path / "x.png").read_bytes() == compare.pixels(logs)
    with pytest.raises(ConfigError, match=r"'x.pdf' ends in '.pdf': give one that ends in .html, .svg or .png"):
        compare.write(logs, Path("x.pdf"))


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-9, 1e12])
def test_odd_values_can_be_drawn(value: float) -> None:
    records = [{"step": s, "loss": value, "lr": value, "grad_norm": value * s} for s in range(1, 51)]
    assert "<path" in compare.picture([StageLog("a", "sft", records, "running")])
    assert math.isfinite(value)
