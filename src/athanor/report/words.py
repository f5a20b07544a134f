"""Numbers and findings in words: sizes, times, shares, and what can honestly be said of a difference."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from athanor.report.data import Score

_THIN = "\u202f"  # narrow no-break space, between a number and its unit
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f]")
_BIDI = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def number(value: float) -> str:
    """Thousands parted by commas; at most four significant digits of a fraction: 12,345  0.0123  1.6e-07."""
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def share(value: float, digits: int = 1) -> str:
    """0.613 -> 61.3 %"""
    return f"{100 * value:.{digits}f}{_THIN}%"


def points(difference: float) -> str:
    """A difference of two shares in percentage points with its sign; U+2212 is the minus."""
    return signed(100 * difference, 1)


def signed(value: float, digits: int) -> str:
    """+1.2, \u22121.2 or \u00b10.0: the sign is that of the rounded number."""
    rounded = round(value, digits)
    sign = "\u00b1" if rounded == 0 else "+" if rounded > 0 else "\u2212"
    return f"{sign}{abs(rounded):.{digits}f}"


def size(count: float) -> str:
    """Bytes in decimal units: 12.4 MB."""
    units = ["bytes", "kB", "MB", "GB"]
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        del units[0]
    digits = 0 if units[0] == "bytes" or count >= 99.95 else 1
    return f"{count:.{digits}f}{_THIN}{units[0]}"


def parameters(count: int) -> str:
    """3,145,728 -> 3.1 million"""
    for scale, unit in ((1e9, "billion"), (1e6, "million")):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:,}"


def duration(seconds: float) -> str:
    """Rounded to the second from a minute on: 0.4 s, 41 s, 9 min 48 s, 2 h 5 min."""
    if seconds < 9.95:
        return f"{seconds:.1f}{_THIN}s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}{_THIN}h {minutes}{_THIN}min"
    parts = [f"{minutes}{_THIN}min"] * bool(minutes) + [f"{rest}{_THIN}s"] * bool(rest or not minutes)
    return " ".join(parts)


def short(count: float) -> str:
    """A count in three digits: 3.28M, 492k, 17."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * scale:
            return f"{float(f'{count / scale:.3g}'):g}{unit}"
    return number(count)


def clock(seconds: float) -> str:
    """1:02:03 or 2:30"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def visible(text: str) -> str:
    """Text that can be stored and seen: control characters as their pictures (U+2400 ...), lone surrogates as U+FFFD,
    characters that turn the direction of writing by their code, so that no answer rearranges the page."""
    pictured = _CONTROL.sub(lambda m: "\u2421" if m[0] == "\x7f" else chr(0x2400 + ord(m[0])), text)
    return _SURROGATE.sub("\ufffd", _BIDI.sub(lambda m: f"\u27e8U+{ord(m[0]):04X}\u27e9", pictured))


def field(value: Any, key: str) -> str:
    """Any JSON value of a free field for reading; one whose name says that it counts bytes as a size."""
    if (key == "memory" or key.endswith("bytes")) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return size(value)
    if value is None:
        return "\u2013"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{label(str(k))} {field(v, str(k))}" for k, v in value.items()) or "\u2013"
    if isinstance(value, (list, tuple)):
        return ", ".join(field(item, key) for item in value) or "\u2013"
    return visible(str(value))


def label(key: str) -> str:
    """A field's name for reading: tokens_per_second -> tokens per second"""
    return visible(key.replace("_", " "))


@dataclass(frozen=True, slots=True)
class Change:
    """The step from one score to another. `apart`: the two 95 % intervals share no point."""

    before: Score
    after: Score

    @property
    def difference(self) -> float:
        return self.after["value"] - self.before["value"]

    @property
    def apart(self) -> bool:
        return self.after["low"] > self.before["high"] or self.after["high"] < self.before["low"]

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the intervals are apart, else `undecided`."""
        if not self.apart:
            return "undecided"
        return "better" if self.difference > 0 else "worse"

    @property
    def sentence(self) -> str:
        """What happened to the accuracy, and how sure one may be of it."""
        before, after = share(self.before["value"]), share(self.after["value"])
        if points(self.difference) == points(0.0):
            return f"Accuracy stayed at {after}."
        verb = "rose" if self.difference > 0 else "fell"
        sure = "the intervals are apart" if self.apart else "the intervals overlap, so this may be chance"
        return f"Accuracy {verb} from {before} to {after} ({points(self.difference)} points); {sure}."
