"""Where text comes from: Python's own standard library, or a file or folder of the user's.

Files that are no text are skipped and named with the reason; a file that cannot be read at all is an error.
"""

from __future__ import annotations

import io
import json
import os
import stat
import sysconfig
import tokenize
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from athanor.core.errors import DataError
from athanor.data import compressed
from athanor.types import Document

Skipped = dict[str, list[str]]
"""Names of what was not used, by the reason."""

DEFAULT_SUFFIXES = (".py", ".txt", ".rst", ".md", ".html")
_NOT_STANDARD_LIBRARY = ("site-packages", "dist-packages", "__pycache__")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read; `name` is its path relative to the folder that was searched, with slashes."""

    path: Path
    name: str


def standard_library_files(skipped: Skipped) -> list[SourceFile]:
    """Sources and documentation in the standard library's folder, installed packages excluded, sorted by name.

    Raises DataError when there is no such folder with Python files in it.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    remedy = "give your own text with --text PATH"
    if not root.is_dir():
        raise DataError(f"the standard library's folder {root} does not exist, so there is no default corpus: {remedy}")
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STANDARD_LIBRARY]
        for path in (Path(folder, name) for name in names if name.endswith(DEFAULT_SUFFIXES)):
            name = _text_name(path.relative_to(root).as_posix())
            if path.is_file():
                files.append(SourceFile(path, name))
            else:  # some distributions ship links into packages that are not installed
                _skip(skipped, "link to nothing", name)
    if not files:
        raise DataError(f"the standard library's folder {root} has no source files, so there is no default corpus: {remedy}")
    return sorted(files, key=_name)


def user_files(path: str | os.PathLike[str], skipped: Skipped, exclude: Collection[Path] = ()) -> list[SourceFile]:
    """The file `path`, or all files below the folder `path`, sorted by name; links to folders are followed.

    Names that begin with a dot and the folders in `exclude` are put down in `skipped`. Raises DataError for a path that does not
    exist, an unreadable folder, a link to nothing or a link to a folder that it lies in.
    """
    root = Path(path)
    if not os.path.lexists(root):
        raise DataError(f"text {str(root)!r} does not exist: give a file or a folder")
    if stat.S_ISDIR(_stat(root).st_mode):
        return sorted(_walk(root, skipped, exclude), key=_name)
    return [SourceFile(root, _text_name(root.name))]


def read_file(file: SourceFile, skipped: Skipped) -> Iterator[Document]:
    """The documents of one file, compressed (.gz, .bz2, .xz) or not: one for each record of a .jsonl file, else one.

    A .py file that declares another encoding (PEP 263) is decoded by it; anything else must be UTF-8. Files that are not are put
    down in `skipped`. Raises DataError when the file cannot be read or a record has no text.
    """
    if not stat.S_ISREG(_stat(file.path).st_mode):  # opening a pipe would wait for ever
        _skip(skipped, "not a regular file", file.name)
        return
    if compressed.suffix(file.path) == ".jsonl":
        yield from read_documents(file.path, name=file.name)
        return
    try:
        with compressed.open_bytes(file.path) as opened:
            data = opened.read()
    except compressed.DAMAGED as error:
        raise _unreadable(file.path, error) from error
    if not data:
        _skip(skipped, "empty", file.name)
    elif b"\0" in data:
        _skip(skipped, "binary", file.name)
    else:
        try:
            python = compressed.suffix(file.path) == ".py"
            encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0] if python else "utf-8-sig"
            text = data.decode(encoding)
        except (UnicodeError, SyntaxError, LookupError):
            _skip(skipped, "not UTF-8", file.name)
        else:
            yield Document(text, file.name)


def default_corpus(skipped: Skipped | None = None) -> Iterator[Document]:
    """Documents of `standard_library_files`; what was skipped is put down in `skipped`."""
    skipped = {} if skipped is None else skipped
    for file in standard_library_files(skipped):
        yield from read_file(file, skipped)


def read_texts(path: str | os.PathLike[str], skipped: Skipped | None = None) -> Iterator[Document]:
    """Documents of `user_files(path)`; what was skipped is put down in `skipped`. Raises DataError when there are none."""
    skipped = {} if skipped is None else skipped
    found = False
    for file in user_files(path, skipped):
        for document in read_file(file, skipped):
            found = True
            yield document
    if not found:
        raise no_text(path, skipped)


def no_text(path: str | os.PathLike[str], skipped: Skipped) -> DataError:
    """The error for a path in which nothing is text, with what was skipped."""
    return DataError(f"no text in {str(path)!r} ({summary(skipped) or 'the folder is empty'}): give files of UTF-8 text")


def summary(skipped: Skipped) -> str:
    """How many were skipped for which reason, `2 binary, 1 empty`; empty when none were."""
    return ", ".join(f"{len(names)} {reason}" for reason, names in sorted(skipped.items()))


def read_documents(path: str | os.PathLike[str], name: str | None = None) -> Iterator[Document]:
    """Records of a JSON Lines file, `{"text": ..., "source": ...}` one a line; other fields and blank lines are not read.

    The source is `<name>:<line>` where `name` is given or the record has none. Raises DataError naming file and line for a record
    that is not JSON or has no text.
    """
    path = Path(path)
    try:
        with compressed.open_bytes(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    document = _record(line, f"{path}, line {number}", f"{name or path.name}:{number}")
                    yield document if name is None else Document(document.text, f"{name}:{number}")
    except compressed.DAMAGED as error:
        raise _unreadable(path, error) from error


def _record(line: bytes, where: str, source: str) -> Document:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}): correct or remove the line") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise DataError(f'{where} must be an object with a string field "text": correct it, or give the text as a .txt file')
    given = record.get("source", source)
    if not isinstance(given, str):
        raise DataError(f'{where}: field "source" ({given!r}) must be a string: correct it or leave it out')
    return Document(record["text"], given.encode("utf-8", errors="replace").decode("utf-8"))


def _walk(root: Path, skipped: Skipped, exclude: Collection[Path]) -> Iterator[SourceFile]:
    """Files below `root`, in no order."""
    excluded = {Path(os.path.realpath(path)) for path in exclude}
    waiting: list[tuple[Path, str, tuple[Path, ...]]] = [(root, "", ())]
    while waiting:
        folder, prefix, above = waiting.pop()
        real = Path(os.path.realpath(folder))
        if real in excluded:
            _skip(skipped, "output of athanor", prefix or str(folder))
            continue
        if real in above:
            raise DataError(f"{folder} is a link to a folder that it lies in, so reading would never end: remove the link")
        try:
            entries = os.listdir(folder)
        except OSError as error:
            raise _unreadable(folder, error) from error
        for entry in entries:
            path, name = folder / entry, prefix + _text_name(entry)
            if entry.startswith("."):
                _skip(skipped, "hidden", name)
            elif stat.S_ISDIR(_stat(path).st_mode):
                waiting.append((path, name + "/", (*above, real)))
            else:
                yield SourceFile(path, name)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    what = "is a link to nothing" if path.is_symlink() and isinstance(error, FileNotFoundError) else "cannot be read"
    why = getattr(error, "strerror", None) or str(error)
    return DataError(f"{path} {what} ({why}), and every file must be readable: correct its permissions or remove it")


def _name(file: SourceFile) -> str:
    return file.name


def _text_name(name: str) -> str:
    """A file name as text that UTF-8 can hold; file systems allow any bytes."""
    return os.fsencode(name).decode("utf-8", errors="replace")


def _skip(skipped: Skipped, reason: str, name: str) -> None:
    skipped.setdefault(reason, []).append(name)
