"""From sources to a corpus on disk: clean, deduplicate, hold out, write, and account for every byte.

sources -> clean -> exact dedup -> held out by file, or given -> train.jsonl, heldout.jsonl, heldout.txt, manifest.json

The same text and options give the same bytes, however often it runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from athanor.core import io
from athanor.core.errors import ConfigError, DataError
from athanor.data import holdout
from athanor.data.clean import clean, split_text
from athanor.data.dedup import ExactDedup
from athanor.data.sources import (
    Skipped,
    SourceFile,
    no_text,
    read_documents,
    read_file,
    standard_library_files,
    summary,
    user_files,
)
from athanor.types import Document

__all__ = ["CorpusReport", "beginning", "build", "read_documents", "sample"]

TRAIN, HELDOUT, HELDOUT_TEXT, MANIFEST = "train.jsonl", "heldout.jsonl", "heldout.txt", "manifest.json"
SMALLEST_CORPUS = 64 << 10
LONGEST_DOCUMENT = 256 << 10  # characters; longer ones are cut so that encoding one takes little memory


@dataclass(slots=True, kw_only=True)
class _Counts:
    """What happened on the way, as `CorpusReport` describes it."""

    files: int = 0
    beyond_limit: int = 0
    documents_read: int = 0
    bytes_read: int = 0
    newlines: int = 0
    control: int = 0
    trailing: int = 0
    composed: int = 0
    empty: int = 0
    cut: int = 0
    train_documents: int = 0
    train_bytes: int = 0
    heldout_documents: int = 0
    heldout_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusReport:
    """What a corpus was made of and what became of it. Bytes are of UTF-8.

    source              where the text comes from
    heldout             where the held-out text comes from; None where it is a share of the text
    seed, heldout_fraction, limit_bytes   the options of `build`; no fraction where held-out text was given
    files               files found
    skipped             files and folders not used, by reason
    beyond_limit        files not read because limit_bytes was reached
    documents_read, bytes_read            what the files held, before cleaning
    newlines, control, trailing, composed what cleaning changed, see `clean.Cleaned`; composed counts documents
    empty               documents of which cleaning left nothing
    duplicates, duplicate_bytes           documents dropped because the same text was there before
    cut                 documents cut into several, because they were long or a part of them is held out
    train_documents, train_bytes, heldout_documents, heldout_bytes   the result
    sha256              of each file written
    """

    source: str
    heldout: str | None
    seed: int
    heldout_fraction: float | None
    limit_bytes: int | None
    files: int
    skipped: dict[str, int]
    beyond_limit: int
    documents_read: int
    bytes_read: int
    newlines: int
    control: int
    trailing: int
    composed: int
    empty: int
    duplicates: int
    duplicate_bytes: int
    cut: int
    train_documents: int
    train_bytes: int
    heldout_documents: int
    heldout_bytes: int
    sha256: dict[str, str]


def build(
    out: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | None = None,
    heldout: str | os.PathLike[str] | None = None,
    heldout_fraction: float = 0.05,
    seed: int = 0,
    limit_bytes: int | None = None,
    exclude: Collection[Path] = (),
) -> CorpusReport:
    """Write a corpus into the folder `out`, replacing a corpus that is there.

    Files are read in an order shuffled by the hash of (seed, name), which is the order of train.jsonl too. What is held out, see
    `holdout`: `heldout_fraction` of the bytes, but at least 64 KiB (or a quarter, when that is less) and at most 2 MiB; or all of
    `heldout`, where that is given. Held-out text is read first, so documents of `text` that are equal to one of it are dropped.

    Args:
        out: folder for train.jsonl, heldout.jsonl ({"text", "source"} a line), heldout.txt (the held-out texts joined by
            newlines) and manifest.json (the report, and the names of what was skipped).
        text: a file or folder; None is Python's standard library.
        heldout: a file or folder that is held out, in place of a share of `text`.
        limit_bytes: read no further documents of `text` once this much of it was kept, cleaned.
        exclude: folders inside `text` that are not to be read; `out` never is.

    Raises:
        ConfigError: an option out of range.
        DataError: text that cannot be read, or less than 64 KiB of it; `out` holds something else than a corpus.
    """
    out = Path(out)
    if not 0.0 < heldout_fraction <= 0.5:
        raise ConfigError(f"heldout_fraction ({heldout_fraction}) must be above 0 and at most 0.5: use 0.05")
    if limit_bytes is not None and limit_bytes < SMALLEST_CORPUS:
        raise ConfigError(f"limit_bytes ({limit_bytes}) must be at least {SMALLEST_CORPUS}: use that or leave it out")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).exists():
        raise DataError(f"{out} is not empty and no corpus (it has no {MANIFEST}), so it is not replaced: choose another folder")

    source = str(text) if text is not None else "Python standard library"
    skipped: Skipped = {}
    files = standard_library_files(skipped) if text is None else user_files(text, skipped, (*exclude, out))
    files.sort(key=lambda file: holdout.order(seed, file.name))
    given = [] if heldout is None else user_files(heldout, skipped, (*exclude, out))
    counts, dedup = _Counts(files=len(files) + len(given)), ExactDedup()
    with io.atomic_dir(out) as folder:
        spool = folder / "spool.jsonl"
        total, names = 0, set[str]()
        with _open(spool) as lines:
            for document in _kept(given, None, skipped, counts, dedup):
                document = Document(document.text, f"heldout/{document.source}")
                names.add(document.source)
                lines.write(_line(document))
            if heldout is not None and not names:
                raise no_text(heldout, skipped)
            read = counts.documents_read
            for document in _kept(files, limit_bytes, skipped, counts, dedup):
                lines.write(_line(document))
                total += len(document.text.encode("utf-8"))
        if text is not None and counts.documents_read == read:
            raise no_text(text, skipped)
        if total < SMALLEST_CORPUS:
            raise DataError(
                f"{source} has {total} bytes of text after cleaning (dropped: {dedup.duplicates} duplicates; not used:"
                f" {summary(skipped) or 'none'}) and must have at least {SMALLEST_CORPUS} to train and to measure: give more text"
            )
        if heldout is None:
            target = holdout.target_bytes(total, heldout_fraction)
            held = holdout.choose(lambda: read_documents(spool), target, seed)
        else:
            held = holdout.Holdout(frozenset(names), None)
        _write(folder, spool, held, counts)
        spool.unlink()
        report = CorpusReport(
            source=source,
            heldout=None if heldout is None else str(heldout),
            seed=seed,
            heldout_fraction=heldout_fraction if heldout is None else None,
            limit_bytes=limit_bytes,
            skipped={reason: len(names) for reason, names in sorted(skipped.items())},
            duplicates=dedup.duplicates,
            duplicate_bytes=dedup.duplicate_bytes,
            sha256={name: io.sha256_file(folder / name) for name in (TRAIN, HELDOUT, HELDOUT_TEXT)},
            **asdict(counts),
        )
        unused = {reason: sorted(found) for reason, found in sorted(skipped.items())}
        io.write_json(folder / MANIFEST, {**asdict(report), "skipped_names": unused})
    return report


def beginning(path: str | os.PathLike[str], size: int | None) -> list[Document]:
    """The first `size` characters of the documents in a JSON Lines file, the last one cut to fit; all of them without `size`."""
    chosen: list[Document] = []
    for document in read_documents(path):
        if size is not None:
            if size <= 0:
                break
            document = Document(document.text[:size], document.source)
            size -= len(document.text)
        chosen.append(document)
    return chosen


def sample(path: str | os.PathLike[str], size: int) -> list[Document]:
    """About `size` characters of a JSON Lines file: the same share of every document, from its beginning."""
    documents = list(read_documents(path))
    share = min(1.0, size / max(1, sum(len(d.text) for d in documents)))
    return [Document(d.text[: max(1, round(share * len(d.text)))], d.source) for d in documents]


def _kept(
    files: list[SourceFile], limit_bytes: int | None, skipped: Skipped, counts: _Counts, dedup: ExactDedup
) -> Iterator[Document]:
    """Cleaned, unique documents of `files`, until `limit_bytes` of them were given out."""
    kept = 0
    for i, file in enumerate(files):
        for document in read_file(file, skipped):
            counts.documents_read += 1
            counts.bytes_read += len(document.text.encode("utf-8", errors="replace"))
            cleaned = clean(document.text)
            counts.newlines += cleaned.newlines
            counts.control += cleaned.control
            counts.trailing += cleaned.trailing
            counts.composed += cleaned.composed
            if not cleaned.text.strip():
                counts.empty += 1
            elif dedup.is_new(cleaned.text):
                kept += len(cleaned.text.encode("utf-8"))
                yield Document(cleaned.text, document.source)
                if limit_bytes is not None and kept >= limit_bytes:
                    counts.beyond_limit = len(files) - i - 1
                    return


def _write(folder: Path, spool: Path, held: holdout.Holdout, counts: _Counts) -> None:
    """Write the documents of `spool` to where they belong."""
    with (
        _open(folder / TRAIN) as train,
        _open(folder / HELDOUT) as heldout,
        _open(folder / HELDOUT_TEXT) as heldout_text,
    ):
        for document in read_documents(spool):
            pieces = [(part, out) for text, out in held.pieces(document) for part in split_text(text, LONGEST_DOCUMENT)]
            counts.cut += len(pieces) > 1
            for i, (text, is_heldout) in enumerate(pieces):
                source = document.source if len(pieces) == 1 else f"{document.source}#{i}"
                size = len(text.encode("utf-8"))
                if is_heldout:
                    heldout_text.write("\n" * (counts.heldout_documents > 0) + text)
                    counts.heldout_documents += 1
                    counts.heldout_bytes += size
                else:
                    counts.train_documents += 1
                    counts.train_bytes += size
                (heldout if is_heldout else train).write(_line(Document(text, source)))


def _open(path: Path) -> TextIO:
    return path.open("w", encoding="utf-8", newline="\n")


def _line(document: Document) -> str:
    return json.dumps({"text": document.text, "source": document.source}, ensure_ascii=False) + "\n"
