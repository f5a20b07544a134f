"""Text made uniform: one form of newline, no control characters, no trailing spaces, Unicode NFC; all of it counted."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

# Carriage returns, vertical tab, form feed (page breaks in old sources), next line, Unicode line and paragraph separators.
_NEWLINES = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
# C0 and C1 control characters but tab and newline, delete, and lone surrogates, which UTF-8 cannot hold.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A cleaned text, and what was done to it.

    newlines   line ends of another form that became "\\n"
    control    control characters removed
    trailing   spaces removed at ends of lines
    composed   whether NFC changed it
    """

    text: str
    newlines: int
    control: int
    trailing: int
    composed: bool


def clean(text: str) -> Cleaned:
    """Make `text` uniform. `clean(clean(text).text).text == clean(text).text`.

    Source: NFC is Unicode Standard Annex 15; it never changes what a text says, only which of equal code sequences stands there.
    """
    text, newlines = _NEWLINES.subn("\n", text)
    text, control = _CONTROL.subn("", text)
    # By lines: a pattern for trailing spaces takes quadratic time on long runs of spaces.
    stripped = "\n".join([line.rstrip() for line in text.split("\n")])
    normal = unicodedata.normalize("NFC", stripped)
    return Cleaned(normal, newlines, control, len(text) - len(stripped), normal != stripped)


def split_text(text: str, size: int) -> list[str]:
    """Cut `text` into parts of at most `size` characters, whose concatenation it is.

    Each cut is as late as it can be: after a blank line, or else after a line, a space, or anywhere.
    """
    assert size > 0
    parts = []
    start = 0
    while len(text) - start > size:
        end = start + size
        for border in ("\n\n", "\n", " "):
            found = text.rfind(border, start, end)
            if found >= 0:
                end = found + len(border)
                break
        parts.append(text[start:end])
        start = end
    parts.append(text[start:])
    return parts
