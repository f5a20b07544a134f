"""Weights of a model folder: one safetensors file, or shards under an index; strict, and never more in memory than asked for.

A tensor is read with `readinto` straight into its own memory. A memory map would be shorter, but its pages count in the
process's resident memory, and a model would take twice its size while it loads.
Format: https://github.com/huggingface/safetensors#format; the index is transformers' `model.safetensors.index.json`.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from athanor.core import io
from athanor.core.errors import CheckpointError, nearest

SINGLE, PICKLE = "model.safetensors", "pytorch_model.bin"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_MAX_INDEX = 100_000_000  # bytes
_SHOWN = 6  # problems listed in an error before it says how many more there are
_AGAIN = "copy or download the folder again"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies.

    shape   its sizes
    dtype   its element type in the file
    file    the file that holds it
    offset  of its first byte in `file`; None in a pickle, which holds no tensor in one piece
    nbytes  its size in memory
    mapped  in a pickle the tensor itself, mapped from the file; else None
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int | None
    nbytes: int
    mapped: Tensor | None = field(default=None, repr=False, compare=False)


class Weights(Mapping[str, Entry]):
    """The tensors of a folder by name; nothing but headers has been read. Made by `open_weights`.

    Attributes:
        folder: where they lie.
    """

    def __init__(self, folder: Path, entries: Mapping[str, Entry]) -> None:
        self.folder = folder
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self._entries.values())

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """Read one tensor from its file into new memory, or into `out`, and return it.

        Args:
            name: of the tensor.
            out: of the tensor's shape; may be a slice of a larger tensor, on any device. Of another floating dtype than the
                tensor's it gets the rounded values. A contiguous one on the CPU of the tensor's own dtype is filled in
                place; every other one costs memory for one tensor more.

        Raises:
            CheckpointError: no such tensor; `out` of another shape, or of a dtype that is neither the tensor's nor floating
                like it; a file that changed since it was opened; a bool that is neither 0 nor 1.
        """
        if name not in self._entries:
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}{nearest(name, self._entries)}")
        entry = self._entries[name]
        if out is None:
            out = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        _check_fits(name, entry, out)
        target = out.detach()
        if entry.nbytes == 0:
            return out
        if entry.mapped is not None:
            target.copy_(entry.mapped)
        elif target.dtype == entry.dtype and target.device.type == "cpu" and target.is_contiguous():
            _fill(target, name, entry)
        else:
            # Pages of its own, which go back at once: malloc keeps freed tensors between those that stay.
            pages = mmap.mmap(-1, entry.nbytes)
            held = torch.frombuffer(pages, dtype=torch.uint8).view(entry.dtype).view(entry.shape)
            _fill(held, name, entry)
            target.copy_(held)
        return out


def _check_fits(name: str, entry: Entry, out: Tensor) -> None:
    if tuple(out.shape) != entry.shape:
        raise CheckpointError(
            f"tensor {name!r} of {entry.file} has shape {entry.shape} and is to be read into {tuple(out.shape)}:"
            " use the config that was saved with it"
        )
    if out.dtype != entry.dtype and not (out.dtype.is_floating_point and entry.dtype.is_floating_point):
        raise CheckpointError(
            f"tensor {name!r} of {entry.file} is {entry.dtype} and is to be read as {out.dtype}:"
            " only floating dtypes are converted to each other"
        )


def _fill(target: Tensor, name: str, entry: Entry) -> None:
    """Fill the contiguous `target` with the bytes of `entry`, of which there are some."""
    assert entry.offset is not None
    flat = target.view(-1).view(torch.uint8)
    rest = memoryview(flat.numpy())  # type: ignore[arg-type]
    try:
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise CheckpointError(f"{entry.file} ends within tensor {name!r}: it changed while it was read; {_AGAIN}")
                rest = rest[count:]
    except OSError as error:
        raise CheckpointError(f"{entry.file} cannot be read ({error.strerror}): {_AGAIN}") from error
    if entry.dtype == torch.bool and flat.max() > 1:
        raise CheckpointError(f"tensor {name!r} of {entry.file} holds a bool that is neither 0 nor 1: {_AGAIN}")


def open_weights(folder: Path, *, pickled: bool = False) -> Weights:
    """The weights in `folder`: model.safetensors, or the shards that model.safetensors.index.json names.

    Where there are neither and `pickled` is set, pytorch_model.bin or the shards of its index: pickles, read by torch's
    restricted unpickler, which builds tensors and runs nothing. Those are mapped from the file, so their pages count as
    memory of the process; one in the format of torch before 1.6 is read whole.

    Raises:
        CheckpointError: no weights, or pickles only and not `pickled`; a damaged or ambiguous file; an index that does not
            fit its shards (every problem is listed); a file name that leaves the folder. A link may only lead to a file
            inside the folder, or of the same model in the hub's cache.
    """
    folder = Path(folder)
    for single, reader in ((SINGLE, _safetensors), (PICKLE, _pickle)):
        index = f"{single}.index.json"
        names = [name for name in (index, single) if os.path.lexists(folder / name)]
        if not names:
            continue
        if single == PICKLE and not pickled:
            raise CheckpointError(
                f"{folder / names[0]}: the weights are there only as pickles, which can run any program when they are read."
                " Get them as safetensors, or, if you trust their source, convert them with `athanor import --pickled`"
            )
        if names == [single]:
            _raise_all(folder / single, [_fault(folder, single)])
            return Weights(folder, reader(folder / single))
        named = _read_index(folder, index)
        if single in names and single not in named.values():
            raise CheckpointError(f"{folder} holds {single} and {index}, which names other files: remove one of the two")
        _raise_all(folder / index, [_fault(folder, shard, Path(single).suffix) for shard in sorted(set(named.values()))])
        shards = {shard: reader(folder / shard) for shard in sorted(set(named.values()))}
        _raise_all(folder / index, _mismatches(named, shards))
        return Weights(folder, {name: shards[named[name]][name] for name in named})
    raise CheckpointError(f"{folder} holds no weights: it needs {SINGLE}, or {SINGLE}.index.json with its shards")


def _fault(folder: Path, name: str, suffix: str = "") -> str | None:
    """Why the file `name`, chosen by whoever wrote the index, must not be opened; None when it may."""
    if not name.endswith(suffix) or name != os.path.basename(name) or "\\" in name or "\0" in name:
        return f"{name!r:.100} is not the plain name of a {suffix} file"
    path = folder / name
    try:
        if not path.is_file():
            return f"{name!r:.100} is missing, or not a regular file"
        root, target = folder.resolve(), path.resolve()
    except OSError as error:
        return f"{name!r:.100} cannot be opened ({error.strerror})"
    # The hub's cache: models--ORG--NAME/snapshots/REVISION/NAME is a link to models--ORG--NAME/blobs/HASH.
    cached = root.parent.name == "snapshots" and root.parents[1].name.startswith("models--")
    if not target.is_relative_to(root.parents[1] if cached else root):
        return f"{name!r} is a link that leaves the folder, to {target}"
    return None


def _raise_all(path: Path, problems: Sequence[str | None]) -> None:
    found = [problem for problem in problems if problem]
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise CheckpointError(f"{path} cannot be used: {'; '.join(found[:_SHOWN])}{more}. The remedy: {_AGAIN}.")


def _mismatches(named: Mapping[str, str], shards: Mapping[str, Mapping[str, Entry]]) -> list[str]:
    """What the index says (tensor -> shard) and the shards do not, and the other way round."""
    problems = [f"{shard} lacks {name!r:.100}" for name, shard in named.items() if name not in shards[shard]]
    for shard, entries in shards.items():
        for name in entries:
            if name not in named:
                problems.append(f"{shard} holds {name!r:.100}, which the index does not name")
            elif named[name] != shard:
                problems.append(f"{shard} holds {name!r:.100}, which the index places in {named[name]}")
    return problems


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it has the key {twice!r:.100} twice")
    return found


def _parse(path: Path, raw: bytes) -> Any:
    """JSON in which no object has the same key twice: of two entries for a tensor, readers differ in which they take."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not proper JSON ({error}): {_AGAIN}") from error


def _read_index(folder: Path, name: str) -> dict[str, str]:
    """The `weight_map` of an index: tensor -> shard."""
    path = folder / name
    _raise_all(path, [_fault(folder, name)])
    size = path.stat().st_size
    if size > _MAX_INDEX:
        raise CheckpointError(f"{path} has {size} bytes and an index has at most {_MAX_INDEX}: {_AGAIN}")
    content = _parse(path, path.read_bytes())
    named = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(named, dict) or not named or not all(isinstance(shard, str) for shard in named.values()):
        raise CheckpointError(f"{path} must be an object with a 'weight_map' of tensor names to file names: {_AGAIN}")
    return named


def _safetensors(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file."""
    header = io.read_header(path)
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        _parse(path, file.read(start - 8))  # read_header takes the last of two equal keys
    header.pop("__metadata__", None)
    entries = {}
    for name, entry in header.items():
        shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
        if math.prod(max(n, 1) for n in shape) >= 2**63:  # an empty tensor can still have strides beyond 64 bits
            raise CheckpointError(f"{path}: tensor {name!r:.100} has the shape {shape}, which no tensor can have: {_AGAIN}")
        entries[name] = Entry(shape, _DTYPES[entry["dtype"]], path, start + begin, end - begin)
    return entries


def _pickle(path: Path) -> dict[str, Entry]:
    """The tensors of one file of `torch.save`."""
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ValueError("a member is compressed")  # torch never writes one, and maps it as if it were not
        with torch.sparse.check_sparse_tensor_invariants(), warnings.catch_warnings():  # sparse ones are refused below only
            warnings.simplefilter("ignore")  # of a protocol that torch reads in part; if it does not, that is an error
            content = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own words are how to read the file all the same
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {named[1]!r:.100}" if named else "it is damaged, or holds something else"
        raise CheckpointError(
            f"{path} is not a pickle of tensors alone ({reason}): do not trust it, and get the weights as safetensors"
        ) from error
    except Exception as error:  # whatever a damaged or hostile pickle brings about
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} is not a pickle of tensors alone ({reason:.300}): {_AGAIN}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold tensors by name and holds a {type(content).__name__}: {_AGAIN}")
    entries = {}
    for name, value in content.items():
        if not isinstance(name, str) or type(value) not in (Tensor, torch.nn.Parameter):
            raise CheckpointError(
                f"{path} must hold nothing but tensors by name and holds, under {name!r:.100}, a {type(value).__name__}:"
                " save the model's weights alone (its state_dict)"
            )
        tensor, nbytes = value.detach(), value.numel() * value.element_size()
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: tensor {name!r:.100} of shape {tuple(value.shape)} has not the {nbytes} bytes of data that it needs:"
                f" {_AGAIN}"
            )
        entries[name] = Entry(tuple(tensor.shape), tensor.dtype, path, None, nbytes, tensor)
    return entries


def save_sharded(
    folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, max_bytes: int = 5_000_000_000
) -> None:
    """Write `tensors` as model.safetensors, or, when they take more than `max_bytes`, as shards with an index.

    Shards are filled in the mapping's order; a tensor larger than `max_bytes` gets one for itself. Weights of an earlier
    save into the same folder are removed; a killed save leaves a folder that `open_weights` refuses or the old model.

    Args:
        folder: made when it is missing.
        tensors: no two may share memory.
        metadata: written into every file; `{"format": "pt"}`, which transformers asks for, when None.
        max_bytes: of tensor data in a file, at least 1.
    """
    assert max_bytes > 0
    folder = Path(folder)
    shards: list[dict[str, Tensor]] = [{}]
    room = max_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    one = len(shards) == 1
    files = [SINGLE if one else f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    index = folder / f"{SINGLE}.index.json"
    index.unlink(missing_ok=True)  # first: it must never stand over a mixture of old and new shards
    for file, shard in zip(files, shards, strict=True):
        io.save_tensors(folder / file, shard, {"format": "pt"} if metadata is None else metadata)
    if not one:
        placed = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        io.write_json(index, {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))})
    for path in folder.iterdir():
        if (path.name == SINGLE or _SHARD.fullmatch(path.name)) and path.name not in files:
            path.unlink()
