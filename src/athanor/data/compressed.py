"""Files as they are or compressed (.gz, .bz2, .xz), by their names' ends."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from athanor.core.errors import DataError

_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error)  # what reading a file may raise


def suffix(path: Path) -> str:
    """What kind of file it is, compressed or not: `.jsonl` of `train.jsonl.xz`."""
    return path.with_suffix("").suffix if path.suffix in _OPEN else path.suffix


def open_bytes(path: Path) -> IO[bytes]:
    """The file's content for reading. Raises one of DAMAGED, then or while it is read, for a file that cannot be read."""
    opened: IO[bytes] = _OPEN[path.suffix](path, "rb") if path.suffix in _OPEN else path.open("rb")
    return opened


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, a byte order mark left out. Raises DataError naming it where it cannot be read."""
    try:
        with open_bytes(path) as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error
    except DAMAGED as error:
        raise DataError(f"{path} cannot be read ({error}): check the path, or copy the file again") from error
