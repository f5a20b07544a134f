from __future__ import annotations

import unicodedata
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from athanor.report import words
from athanor.report.data import Score
from athanor.report.words import Change

numbers = st.floats(0, 1)


def said(text: str) -> str:
    return text.replace("\u202f", " ")


@st.composite
def scores(draw: st.DrawFn) -> Score:
    low, value, high = sorted(draw(st.tuples(numbers, numbers, numbers)))
    return {"low": low, "value": value, "high": high, "n": 60}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min"), (60, "1 min"), (588.2, "9 min 48 s"), (7500, "2 h 5 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert said(words.duration(seconds)) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (999_400, "999 kB"),
        (999_600, "1.0 MB"),
        (12_400_000, "12.4 MB"),
        (3e12, "3000 GB"),
    ],
)
def test_size(count: float, text: str) -> None:
    assert said(words.size(count)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12345, "12,345"),
        (0.0123456, "0.01235"),
        (1.6e-7, "1.6e-07"),
        (15210.0, "15,210"),
        (15210.4, "15,210"),
        (0.0, "0"),
        (-2, "-2"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert words.number(value) == text


@pytest.mark.parametrize(
    ("count", "text"), [(951, "951"), (850_000, "850,000"), (3_409_152, "3.4 million"), (1_500_000_000, "1.5 billion")]
)
def test_parameters(count: int, text: str) -> None:
    assert words.parameters(count) == text


@pytest.mark.parametrize(
    ("value", "key", "text"),
    [
        (None, "gpu", "\u2013"),
        (True, "tied", "yes"),
        (33_285_996_544, "memory", "33.3 GB"),
        (1000, "train_bytes", "1.0 kB"),
        ({"pre_train": 12_000, "sft": [1, 2.5]}, "steps", "pre train 12,000, sft 1, 2.5"),
        ([], "list", "\u2013"),
        ("a\x00b", "text", "a\u2400b"),
    ],
)
def test_free_fields(value: Any, key: str, text: str) -> None:
    assert said(words.field(value, key)) == text


@given(st.floats(-1e6, 1e6), st.integers(0, 4))
def test_the_sign_is_that_of_the_rounded_number(value: float, digits: int) -> None:
    text = words.signed(value, digits)
    number = Fraction(text[1:])
    assert {"+": number > 0, "\u2212": number > 0, "\u00b1": number == 0}[text[0]]
    assert abs((-number if text[0] == "\u2212" else number) - Fraction(value)) <= Fraction(1, 2 * 10**digits)


@given(st.text(alphabet=st.characters()))
def test_visible_text_can_be_stored_and_turns_nothing_around(text: str) -> None:
    shown = words.visible(text)
    shown.encode("utf-8")
    assert not [c for c in shown if unicodedata.category(c) == "Cc" and c not in "\t\n" and ord(c) < 128]
    assert not [
        c for c in shown if unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    ]
    assert words.visible(shown) == shown


@given(scores(), scores())
def test_a_change_is_said_to_be_real_only_when_the_intervals_are_apart(before: Score, after: Score) -> None:
    change, back = Change(before, after), Change(after, before)
    common = max(before["low"], after["low"]) <= min(before["high"], after["high"])
    assert change.apart == back.apart == (not common)
    assert {"better": "worse", "worse": "better", "undecided": "undecided"}[change.verdict] == back.verdict
    assert (change.verdict == "undecided") == common
    assert "intervals are apart" not in change.sentence or not common
    assert "chance" not in change.sentence or common


def test_sentences() -> None:
    def score(value: float, reach: float) -> Score:
        return {"value": value, "low": value - reach, "high": value + reach, "n": 100}

    up, near, same = (
        Change(score(0.2, 0.1), score(0.8, 0.1)),
        Change(score(0.8, 0.1), score(0.75, 0.1)),
        Change(score(0.8, 0.1), score(0.8, 0.1)),
    )
    assert said(up.sentence) == "Accuracy rose from 20.0 % to 80.0 % (+60.0 points); the intervals are apart."
    assert (
        said(near.sentence)
        == "Accuracy fell from 80.0 % to 75.0 % (\u22125.0 points); the intervals overlap, so this may be chance."
    )
    assert said(same.sentence) == "Accuracy stayed at 80.0 %."


@pytest.mark.parametrize(
    ("count", "text"), [(3_276_800, "3.28M"), (491_520, "492k"), (17, "17"), (999, "999"), (999_600, "1M"), (2e9, "2G")]
)
def test_short(count: float, text: str) -> None:
    assert words.short(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (150, "2:30"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str) -> None:
    assert words.clock(seconds) == text
