from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from athanor.core.errors import ConfigError
from athanor.report import curves, plots, svg
from athanor.report.data import RUNGS
from athanor.report.plots import Look

SVG = "{http://www.w3.org/2000/svg}"


def texts(root: ET.Element) -> list[str]:
    return ["".join(part.itertext()) for part in root.iter(f"{SVG}text")]


def test_the_ladder_names_every_checkpoint_and_loads_nothing(report: Any) -> None:
    source = plots.ladder_svg(report)
    root = ET.fromstring(source.encode())
    assert set(RUNGS) <= set(texts(root))
    assert re.findall(r"https?://[^\"' ]+", source) == ["http://www.w3.org/2000/svg"]
    assert "480 test problems" in " ".join(texts(root))
    assert {part.tag.removeprefix(SVG) for part in root.iter()}.isdisjoint({"script", "image", "metadata", "foreignObject"})


def test_the_ladder_says_in_words_what_it_shows(report: Any) -> None:
    label = ET.fromstring(plots.ladder_svg(report).encode()).get("aria-label")
    assert label is not None
    score = report["ladder"]["sft"]["accuracy"]
    assert f"sft {100 * score['value']:.1f}" in label
    assert f"{100 * score['low']:.1f}" in label
    assert all(name in label for name in RUNGS)


def test_where_the_treads_are(report: Any) -> None:
    """The heights in the picture are the numbers of the report: read back against the grid lines of 0 and 100 %."""
    for name, value in zip(RUNGS, (0.0, 0.25, 0.5, 0.75, 1.0), strict=True):
        report["ladder"][name]["accuracy"] = {"value": value, "low": value, "high": value, "n": 10}
    paths = [part for part in ET.fromstring(plots.ladder_svg(report).encode()).iter(f"{SVG}path") if "style" in part.attrib]

    def heights(style: str) -> list[float]:
        return [float(re.findall(r"[\d.]+", part.attrib["d"])[1]) for part in paths if style in part.attrib["style"]]

    grid, treads = heights("stroke: var(--line)"), heights("stroke-width: 3.2")
    assert len(treads) == len(RUNGS)
    np.testing.assert_allclose(treads, np.linspace(max(grid), min(grid), 5), atol=0.02)


def test_the_same_report_gives_the_same_picture_whatever_the_users_settings(report: Any, tmp_path: Path) -> None:
    plain = plots.ladder_svg(report)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert plots.ladder_svg(report) == plain
        assert matplotlib.rcParams["font.size"] == 30
    first, second = (plots.write_ladder(report, tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second


def test_write_ladder(report: Any, tmp_path: Path) -> None:
    picture = plots.write_ladder(report, tmp_path / "ladder.svg")
    assert picture.read_text(encoding="utf-8") == plots.ladder_svg(report)
    with Image.open(plots.write_ladder(report, str(tmp_path / "ladder.png"))) as image:
        assert image.size == (1640, 920)
        assert image.convert("RGB").getpixel((3, 3)) == tuple(int(svg.LIGHT.paper[i : i + 2], 16) for i in (1, 3, 5))
    with pytest.raises(ConfigError, match=r"'ladder\.pdf' ends in '\.pdf': give one that ends in \.svg or \.png"):
        plots.write_ladder(report, "ladder.pdf")


def test_a_ladder_of_any_checkpoints(report: Any) -> None:
    for name in ("base", "sft", "int8"):
        del report["ladder"][name]
    report["ladder"]["$dpo_1$"] = report["ladder"]["rl"]  # not to be read as a formula
    found = texts(ET.fromstring(plots.ladder_svg(report).encode()))
    assert {"rl", "int4", "$dpo_1$"} <= set(found)
    assert "base" not in found


def test_pictures_take_their_colours_from_the_page(report: Any) -> None:
    for picture in [
        plots.ladder_inline(report),
        *(panel.svg for stage in curves.STAGES for panel in curves.panels(report, stage)),
    ]:
        assert "var(--accent)" in picture
        assert not re.findall(r"#[0-9a-f]{6}", picture)
        assert "font-family" not in picture


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def mixed(over: str, under: str, opacity: float) -> str:
    parts = (round(opacity * int(over[i : i + 2], 16) + (1 - opacity) * int(under[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{part:02x}" for part in parts)


@pytest.mark.parametrize("palette", [svg.LIGHT, svg.DARK], ids=["light", "dark"])
def test_contrast_is_that_of_wcag_aa(palette: svg.Palette) -> None:
    for colour in (palette.ink, palette.muted, palette.accent):
        assert contrast(colour, palette.paper) >= 4.5
    for tint in np.linspace(0.03, 0.53, 11):  # of the heat map
        assert contrast(palette.ink, mixed(palette.accent, palette.paper, tint)) >= 4.5


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60), st.integers(1, 20))
def test_running_mean(values: list[float], window: int) -> None:
    found = plots.running_mean(values, window)
    assert len(found) == len(values)
    for i, mean in enumerate(found):
        reach = min(i, window // 2)
        near = values[i - reach : i + reach + 1]
        assert mean == pytest.approx(sum(near) / len(near), abs=1e-8)


@given(st.lists(st.floats(0, 10), max_size=8).map(sorted), st.floats(0.01, 2))
def test_labels_are_spread(values: list[float], apart: float) -> None:
    places = plots.spread(values, apart)
    assert len(places) == len(values)
    assert all(b - a >= apart * (1 - 1e-6) - 1e-9 for a, b in pairwise(places))
    assert sum(places) == pytest.approx(sum(values), abs=1e-6)
    if all(b - a >= apart for a, b in pairwise(values)):
        assert places == pytest.approx(values)


def shown(svg_text: str) -> list[str]:
    return texts(ET.fromstring(svg_text))


@pytest.mark.parametrize("count", [2, 12, 13, 39, 40, 300, 301, 2000])
def test_a_curve_of_any_length(count: int) -> None:
    values = list(np.linspace(0.2, 0.6, count))
    picture = plots.curve(range(count), values, "x", "Thing", Look(share=True))
    assert ET.fromstring(picture).get("aria-label") == (
        f"Thing over {count} logged steps: 0.2 at step 0, 0.6 at step {count - 1}; lowest 0.2, highest 0.6."
    )
    assert any(re.fullmatch(r"\d0 %", text) for text in shown(picture))
    assert len(picture) < 40_000


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0] * 50, [1e-9, 1e9], [-1.0, 1.0], [0.0, 1e-7]])
@pytest.mark.parametrize("look", [Look(), Look(log=True), Look(share=True), Look(smooth=False)])
def test_odd_values_can_be_drawn(values: list[float], look: Look) -> None:
    assert "<path" in plots.curve(range(len(values)), values, "x", "Thing", look)
    assert "<path" in plots.heldout(range(len(values)), values, {}, "x", look)


def test_ticks_are_written_plainly() -> None:
    ticks = plots.EvenTicks()
    assert ticks.format_ticks([0.0, 0.5, 1.0]) == ["0.0", "0.5", "1.0"]
    assert ticks.format_ticks([-2.0, 0.0]) == ["\u22122", "0"]
    assert ticks.format_ticks([0.0, 1e-7, 2.5e-7]) == ["0", "1e-7", "2.5e-7"]
    assert ticks.format_ticks([15_000.0]) == ["15,000"]
    assert plots.EvenTicks(100, " %").format_ticks([0.25, 0.5]) == ["25 %", "50 %"]


def test_a_small_gap_is_drawn_on_a_logarithmic_axis(report: Any) -> None:
    panel = next(panel for panel in curves.panels(report, "grpo") if panel.key == "ratio_gap")
    assert {"1e-7", "1e-6"} <= set(shown(panel.svg))


def test_the_compressors_stand_beside_held_out_text(report: Any) -> None:
    panel = next(panel for panel in curves.panels(report, "pretrain") if panel.key == "heldout_bits_per_byte")
    assert {"gzip 1.98", "bz2 1.69", "xz 1.64"} <= set(shown(panel.svg))
    report["bits_per_byte"] = None
    panel = next(panel for panel in curves.panels(report, "pretrain") if panel.key == "heldout_bits_per_byte")
    assert "gzip" not in panel.svg


def test_every_logged_number_is_shown_once(report: Any) -> None:
    report["curves"]["grpo"][5] |= {"note": "a text", "flag": True, "once": 0.5, "tokens": 12}
    keys = [panel.key for panel in curves.panels(report, "grpo")]
    assert len(keys) == len(set(keys))
    assert set(keys) == set(report["curves"]["grpo"][0]) - {"step"}
    assert curves.short(report, "grpo") == ["once 0.5"]


def test_values_that_are_missing_at_some_steps_are_left_out() -> None:
    points = [{"step": 1, "a": 1.0}, {"step": 2, "a": None}, {"step": 3}, {"step": 4, "a": 2}, {"step": 5, "a": False}]
    assert curves.points_of(points, "a") == ([1, 4], [1.0, 2.0])
