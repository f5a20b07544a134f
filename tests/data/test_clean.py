"""Cleaning: against Python's own idea of a character, and quick on what makes patterns slow."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from athanor.data.clean import Cleaned, clean, split_text

ODD = st.text(st.sampled_from("ab \t\n\r\v\f\0\x1b\x7f\x85\xa0\u2028\u2029\u3000e\u0301\ud800\ufeff你🎉") | st.characters())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Cleaned("", 0, 0, 0, False)),
        ("plain\n  indented\n\n", Cleaned("plain\n  indented\n\n", 0, 0, 0, False)),
        ("a\r\nb\rc\n", Cleaned("a\nb\nc\n", 2, 0, 0, False)),
        ("a\vb\fc\x85d\u2028e\u2029f", Cleaned("a\nb\nc\nd\ne\nf", 5, 0, 0, False)),
        ("a\0b\x1b[0mc\x7fd\x9fe", Cleaned("ab[0mcde", 0, 4, 0, False)),
        ("tab\tkept\t \nb  \n \xa0\n", Cleaned("tab\tkept\nb\n\n", 0, 0, 6, False)),
        ("cafe\u0301", Cleaned("café", 0, 0, 0, True)),
        ("lone \ud83d surrogate", Cleaned("lone  surrogate", 0, 1, 0, False)),
        ("你好\u3000世界 🎉", Cleaned("你好\u3000世界 🎉", 0, 0, 0, False)),
    ],
)
def test_what_is_changed_is_counted(text: str, expected: Cleaned) -> None:
    assert clean(text) == expected


@given(text=ODD)
def test_cleaned_text_is_clean(text: str) -> None:
    cleaned = clean(text).text
    assert clean(cleaned) == Cleaned(cleaned, 0, 0, 0, False)
    assert unicodedata.is_normalized("NFC", cleaned)
    assert {c for c in cleaned if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")} <= {"\t", "\n"}
    assert cleaned.splitlines() == [line.rstrip() for line in cleaned.splitlines()]
    cleaned.encode("utf-8")


@given(text=ODD)
def test_every_character_is_accounted_for(text: str) -> None:
    result = clean(text)
    if not result.composed:
        assert len(result.text) == len(text) - text.count("\r\n") - result.control - result.trailing


def test_long_runs_of_spaces_take_linear_time() -> None:
    text = " " * 3_000_000 + "x"
    assert clean(text).text == text


@given(text=st.text(st.sampled_from("ab \n你🎉")), size=st.integers(1, 12))
def test_parts_are_the_text(text: str, size: int) -> None:
    parts = split_text(text, size)
    assert "".join(parts) == text
    assert all(len(part) <= size for part in parts)
    assert all(parts[1:]) or len(parts) == 1


def test_cuts_are_at_the_best_border_there_is() -> None:
    assert split_text("aa\n\nbb\ncc", 8) == ["aa\n\n", "bb\ncc"]
    assert split_text("aa\nbb cc", 7) == ["aa\n", "bb cc"]
    assert split_text("aa bb", 4) == ["aa ", "bb"]
    assert split_text("aabb", 3) == ["aab", "b"]
    assert split_text("", 3) == [""]
    assert split_text("abc", 3) == ["abc"]
