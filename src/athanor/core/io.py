"""Files that are never half there: atomic writes, JSON, hashes and safetensors.

One writer per path is assumed; `new_place` sees to it where a user may start two. A temporary sibling is named
`.tmp-XXXXXXXX-NAME`, a folder about to be replaced `.old-XXXXXXXX-NAME`; both are left behind only by a killed writer, and
`recover` puts them right.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athanor.core.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

PathLike = str | os.PathLike[str]

# Bits of one element, by the names of the safetensors format (https://github.com/huggingface/safetensors#format).
_DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
}
_MAX_HEADER = 100_000_000  # the safetensors library's own limit, bytes
_DAMAGED = "the file is damaged or not of this kind: copy it again or write it anew"


def _sibling(path: Path, kind: str) -> Path:
    return path.with_name(f".{kind}-{secrets.token_hex(4)}-{path.name}")


def _leftovers(path: Path, kind: str) -> list[Path]:
    pattern = re.compile(rf"\.{kind}-[0-9a-f]{{8}}-{re.escape(path.name)}")
    if not path.parent.is_dir():
        return []
    return [p for p in sorted(path.parent.iterdir()) if pattern.fullmatch(p.name)]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def lasting_name(path: PathLike) -> str:
    """The name that a file written here is to have: while it is made, and while it is locked, it has another."""
    return re.sub(r"(^|/)\.(?:lock|tmp-[0-9a-f]{8})-(?=[^/]+$)", r"\1", str(path))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _retire(old: Path, path: Path) -> None:
    """Delete the folder `old` that `path` replaced. Renamed first: a half-deleted folder must not be restored by `recover`."""
    trash = _sibling(path, "tmp")
    os.rename(old, trash)
    _remove(trash)


def recover(path: PathLike) -> None:
    """Put right what a killed writer of `path` left: restore the old folder if `path` is missing, delete the rest.

    Called by the writer of `path` before it writes or resumes, never while another process writes it.
    """
    path = Path(path)
    for old in _leftovers(path, "old"):
        if path.exists():
            _retire(old, path)
        else:
            os.rename(old, path)
            _sync(path.parent)
    for temporary in _leftovers(path, "tmp"):
        _remove(temporary)


@contextmanager
def new_place(path: PathLike) -> Iterator[None]:
    """Nothing is at `path`, and no other process that asks for the same makes anything there until the block ends.

    The lock is on a file beside it, `.lock-NAME`, which is removed in the end; that of a killed process keeps nobody out.

    Raises ConfigError when something is there, and CheckpointError when another process writes it.
    """
    from filelock import FileLock, Timeout

    path = Path(path)
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".lock-{path.name}"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise CheckpointError(f"another process is writing {path}: wait until it ends, or name another place") from error
    try:
        check_new(path)  # once more: who had the lock may have made it since
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # whoever waits for it sees that it is gone
        lock.release()


def check_new(path: PathLike) -> None:
    """Raises ConfigError when something is at `path`, be it a link to nothing."""
    if os.path.lexists(path):
        raise ConfigError(f"out ({path}) exists already: name another, or remove it")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a file name to write to; it becomes `path`, replacing an old file, when the block ends well, else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path, "tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def atomic_write(path: PathLike, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) so that `path` holds the old content or the new one, whatever happens."""
    with atomic_file(Path(path)) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


@contextmanager
def atomic_dir(path: PathLike) -> Iterator[Path]:
    """Yield an empty folder that becomes `path`, replacing an old one, when the block ends well; else it is removed.

    A reader sees the whole old folder, the whole new one or, for the moment between two renames, none. Everything is on
    disk before `path` appears. Leftovers of a killed writer are put right first, as by `recover`.

    Raises CheckpointError when `path` is a file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file where a folder is to be written: remove it or choose another name")
    temporary = _sibling(path, "tmp")
    temporary.mkdir()
    try:
        yield temporary
        place_dir(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def temporary_dir(path: PathLike, token: str) -> Path:
    """The name under which several processes that agreed on `token` (8 hex digits) write the folder `path` together.

    One of them hands it to `place_dir` in the end. `recover` deletes it when they were killed.
    """
    assert re.fullmatch("[0-9a-f]{8}", token)
    path = Path(path)
    return path.with_name(f".tmp-{token}-{path.name}")


def place_dir(temporary: Path, path: Path) -> None:
    """Make the folder `temporary`, a sibling, the folder `path`, replacing an old one, once everything in it is on disk."""
    old = _sibling(path, "old") if path.exists() else None
    _sync_tree(temporary)
    try:
        if old is not None:
            os.rename(path, old)
        os.rename(temporary, path)
    except BaseException:
        if old is not None and old.exists() and not path.exists():
            os.rename(old, path)
        raise
    _sync(path.parent)
    if old is not None:
        _retire(old, path)


def remove_dir(path: PathLike) -> None:
    """Delete the folder `path` so that it is there whole or not at all, whatever happens; `recover` finishes a killed one."""
    path = Path(path)
    trash = _sibling(path, "tmp")
    os.rename(path, trash)
    _sync(path.parent)  # before anything in it goes: a crash must not bring back the name over half a folder
    shutil.rmtree(trash)


def write_json(path: PathLike, obj: Any) -> None:
    """Write `obj` as JSON, atomically. Raises ValueError for NaN and infinity, which JSON has no words for."""
    atomic_write(path, json.dumps(obj, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_json(path: PathLike) -> Any:
    """Parse the JSON file `path`. Raises CheckpointError when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check the path, or write it anew") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): {_DAMAGED}") from error


def sha256_file(path: PathLike) -> str:
    """SHA-256 of a file's content, 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    """SHA-256 of `text` in UTF-8, 64 hex digits."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def save_tensors(path: PathLike, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as a safetensors file, atomically. Tensors that share memory are refused by the format's library.

    Raises CheckpointError when the library cannot write them, as on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_file(Path(path)) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # the user's own; the library makes files that nobody else may read
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:  # it has no errors of the system
            raise CheckpointError(f"{path} cannot be written ({error}): free some room, or choose another place") from error
        _order_metadata(temporary)
        temporary.chmod(mode)


def _order_metadata(path: Path) -> None:
    """Sort the metadata of a fresh file: the library writes it in random order, and equal content must be equal bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8").ljust(length)
        assert len(ordered) == length, "reordering changed the header's length"
        file.seek(8)
        file.write(ordered)


def read_header(path: PathLike) -> dict[str, Any]:
    """Header of a safetensors file: {name: {"dtype", "shape", "data_offsets"}}, and "__metadata__" where there is one.

    Only the header is read, and only after its stated length was checked against the file's. Raises CheckpointError when
    the file is missing, truncated, longer than stated or not a safetensors file.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(size - 8, _MAX_HEADER):
                raise _damaged(path, f"its first 8 bytes ask for a header of {length} bytes and the file has {size}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check the path, or write it anew") from error
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    _check_entries(path, header, size - 8 - length)
    return header


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a whole safetensors file: {what}; {_DAMAGED}")


def _check_entries(path: Path, header: dict[str, Any], data_bytes: int) -> None:
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            bits, shape, (begin, end) = _DTYPE_BITS[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if (
                type(shape) is not list
                or len(shape) > 64
                or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end))
            ):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise _damaged(path, f"tensor {name!r} has an entry of unknown dtype or form: {entry!r:.300}") from None
        if end - begin != math.prod(shape) * bits // 8:
            raise _damaged(path, f"tensor {name!r} of shape {shape} and dtype {entry['dtype']} takes {end - begin} bytes")
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise _damaged(path, f"its tensors leave a gap or overlap at byte {position} of the data")
        position = end
    if position != data_bytes:
        raise _damaged(path, f"its tensors need {position} bytes of data and it holds {data_bytes}")


def load_tensors(path: PathLike) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, on the CPU. Raises CheckpointError as `read_header` does."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(Path(path), str(error)) from error
