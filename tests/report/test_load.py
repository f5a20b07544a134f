"""The picture of a load test."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import asdict
from pathlib import Path

import pytest

from athanor.core.errors import ConfigError
from athanor.report import load as picture
from athanor.serve.load import Load, Outcome, Result, running


def result(outcomes, **options):
    found = Result("first/rl", outcomes)
    each = [asdict(outcome) for outcome in outcomes]
    return {"model": "first/rl", "load": asdict(Load(**options)), **found.summary(), "in_flight": running(outcomes), "each": each}


@pytest.fixture
def measured():
    outcomes = [
        Outcome(0.5 * i, 0.5 * i, 0.5 * i + 0.1 + 0.01 * i, 0.5 * i + 1.1 + 0.01 * i, 0.5 * i + 1.2, 100, 11, "stop")
        for i in range(40)
    ]
    return result(
        [*outcomes, Outcome(20, 20, ended=20.5, error="HTTP 429"), Outcome(21, 21, 21.2, 21.3, 21.4, tokens=3, left=True)]
    )


def test_the_picture_says_what_was_measured(measured, tmp_path):
    path = picture.write(measured, tmp_path / "load.svg")
    text = path.read_text("utf-8")
    root = ET.fromstring(text)
    said = root.get("aria-label")
    assert "Load on first/rl. 4 requests/s (Poisson): 40 complete, 1 left, 1 failed" in said
    assert "time to first token: median 0.295 s, 95th percentile 0.4705 s; time to each token: median 0.1 s" in said
    shown = " ".join("".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text"))
    for title in ("Time to first token, share of answers", "Time per token", "Requests in flight", "by when it was asked"):
        assert title in shown
    assert "median 295" in shown and "95 % 47" in shown and "median 100" in shown
    assert "prefers-color-scheme:dark" in text and "#00000" not in text
    assert picture.write(measured, tmp_path / "again.svg").read_bytes() == path.read_bytes()


def test_pixels(measured, tmp_path):
    data = picture.write(measured, tmp_path / "load.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (2000, 1280)


@pytest.mark.parametrize("outcomes", [[], [Outcome(0, 0, ended=1.0, error="timeout")]])
def test_nothing_to_show(outcomes, tmp_path):
    said = ET.parse(picture.write(result(outcomes, rate=None), tmp_path / "load.svg")).getroot().get("aria-label")
    assert "64 clients: 0 complete" in said and "no answer was complete" in said


def test_another_suffix():
    with pytest.raises(ConfigError, match=r"plot path 'x.gif' ends in '.gif': give one that ends in .svg or .png"):
        picture.write({}, Path("x.gif"))
