"""Which text is held out: never trained on, so that what a model makes of it says what it learned.

Whole files are held out, chosen by hash, so that no text stands on both sides. Where files are too large for that (one big
file, say), runs of paragraphs are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from athanor.data.clean import split_text
from athanor.types import Document

SMALLEST, LARGEST = 64 << 10, 2 << 20
_TOLERANCE = 1.25


def order(seed: int, name: str) -> bytes:
    """A sort key that shuffles names: SHA-256 of seed and name."""
    return hashlib.sha256(f"{seed}\0{name}".encode()).digest()


def target_bytes(total: int, fraction: float) -> int:
    """`fraction` of `total` bytes, but at least 64 KiB (a quarter of `total` when that is less) and at most 2 MiB."""
    return min(LARGEST, max(int(fraction * total), min(SMALLEST, total // 4)))


@dataclass(frozen=True, slots=True)
class Holdout:
    """What is held out.

    names  of documents, or of parts `<document>#<part>` when `part` is set
    part   characters of a part at most; None when whole documents are held out
    """

    names: frozenset[str]
    part: int | None

    def pieces(self, document: Document) -> Iterator[tuple[str, bool]]:
        """`document` cut where what is held out begins and ends: texts, and whether each is held out."""
        if self.part is None:
            yield document.text, document.source in self.names
            return
        for heldout, group in groupby(_parts(document, self.part), key=lambda part: part.source in self.names):
            yield "".join(part.text for part in group), heldout


def choose(documents: Callable[[], Iterable[Document]], target: int, seed: int) -> Holdout:
    """Hold out between `target` and 1.25 x `target` bytes of `documents()`, the first by `order`.

    More than 2 MiB never are; close to that, it may be a quarter less than `target`. `documents` is called for each pass over
    them, at most twice. Their bytes together must be at least `target`.
    """
    names = _greedy(documents(), target, seed)
    if names is not None:
        return Holdout(names, None)
    # A character has 4 bytes at most, so a part has target / 4 at most and fits for as long as the target is not met.
    part = max(target // 16, 1)
    names = _greedy((p for document in documents() for p in _parts(document, part)), target, seed)
    assert names is not None
    return Holdout(names, part)


def _greedy(documents: Iterable[Document], target: int, seed: int) -> frozenset[str] | None:
    """Names whose bytes come to `target`, or None when what is too large leaves a gap."""
    most = min(LARGEST, int(target * _TOLERANCE))
    sizes = sorted((order(seed, d.source), d.source, len(d.text.encode("utf-8"))) for d in documents)
    names, held = set(), 0
    for _, name, size in sizes:
        if held + size <= most:
            names.add(name)
            held += size
        if held >= target:
            break
    # Close to the upper limit documents may not fill it to the last byte.
    return frozenset(names) if held >= min(target, 0.75 * LARGEST) else None


def _parts(document: Document, size: int) -> Iterator[Document]:
    for i, text in enumerate(split_text(document.text, size)):
        yield Document(text, f"{document.source}#{i}")
