"""The form of a checkpoint on disk: safetensors of every process, and a manifest that says where each tensor lies.

    step-00000012/
        rank-00000.safetensors   what process 0 held, piece by piece
        rank-00001.safetensors   ...
        manifest.json            written last: a folder without it is no checkpoint

The manifest gives of each file its SHA-256 and of each tensor the whole shape, the dtype and its pieces: (file, key in the
file, box of the whole). So a checkpoint is read by any number of processes, however they hold their tensors.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from athanor.core import io
from athanor.core.errors import CheckpointError
from athanor.train._boxes import Box, tiling_fault

MANIFEST, FORMAT = "manifest.json", 1
_FIELDS = ("format", "identity", "step", "seconds", "history", "extra", "files", "tensors", "numbers")
_FILE = re.compile(r"rank-\d{5,}\.safetensors")
_POLL = 0.05  # seconds between two looks at the folder
_LAST = 30.0  # seconds that a program which is over still waits for the others
_SHOWN = 6  # names listed in an error before it says how many more there are

Number = bool | int | float | None


@dataclass(frozen=True)
class Part:
    """What one process writes of one tensor: its pieces, each with the box of the whole that it is."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Sequence[tuple[Box, Tensor]]


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: its whole shape, its dtype, and pieces (file, key in the file, box of the whole)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[tuple[str, str, Box], ...]


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def step_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def steps_in(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending."""
    found = (path for path in folder.glob("step-[0-9]*") if (path / MANIFEST).is_file())
    return sorted(int(path.name.removeprefix("step-")) for path in found)


def _stem(rank: int) -> str:
    return f"rank-{rank:05d}"


def write_rank(folder: Path, rank: int, parts: Mapping[str, Part], numbers: Mapping[str, Number]) -> None:
    """Write what process `rank` holds, and last a small JSON file that says that it is there."""
    file = folder / f"{_stem(rank)}.safetensors"
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    for name, part in parts.items():
        pieces = []
        for i, (box, tensor) in enumerate(part.pieces):
            key = name if len(part.pieces) == 1 else f"{name}#{i}"
            tensors[key] = tensor
            pieces.append({"file": file.name, "key": key, "at": box.at, "size": box.size})
        entries[name] = {"shape": part.shape, "dtype": str(part.dtype).removeprefix("torch."), "pieces": pieces}
    io.save_tensors(file, tensors)
    done = {"file": file.name, "sha256": io.sha256_file(file), "tensors": entries, "numbers": dict(numbers)}
    io.write_json(folder / f"{_stem(rank)}.json", done)


def write_failure(folder: Path, rank: int, error: BaseException) -> None:
    """Say that process `rank` could not write, so that nobody waits for it."""
    io.write_json(folder / f"{_stem(rank)}.json", {"error": f"{type(error).__name__}: {error}"})


def gather(folder: Path, ranks: int, timeout: float) -> list[dict[str, Any]]:
    """What every process said when it had written; waits for those that have not.

    Raises:
        CheckpointError: one failed, or said nothing for `timeout` seconds.
    """
    pause, end = threading.Event(), time.monotonic() + timeout
    said: dict[int, dict[str, Any]] = {}
    while True:
        for rank in range(ranks):
            if rank not in said and (folder / f"{_stem(rank)}.json").is_file():
                said[rank] = io.read_json(folder / f"{_stem(rank)}.json")
                if "error" in said[rank]:
                    raise CheckpointError(f"process {rank} could not write its part: {said[rank]['error']}")
        if len(said) == ranks:
            return [said[rank] for rank in range(ranks)]
        if not threading.main_thread().is_alive():  # the program is over, perhaps by an error that the others do not know of
            end = min(end, time.monotonic() + _LAST)
        if time.monotonic() > end:
            missing = listed([str(rank) for rank in range(ranks) if rank not in said])
            raise CheckpointError(
                f"{folder} still lacks the parts of processes {missing} of {ranks} after {timeout:g} s: do all of them save, and"
                " do they see one file system? Raise the store's `timeout` if the disk is slow"
            )
        pause.wait(_POLL)


def merge(said: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The manifest's files, tensors and numbers, of what every process wrote.

    Raises:
        CheckpointError: pieces that are not all of a tensor or overlap, or processes that differ in its shape or dtype.
    """
    tensors: dict[str, Any] = {}
    numbers: dict[str, Number] = {}
    faults = []
    for report in said:
        for name, entry in report["tensors"].items():
            mine = tensors.setdefault(name, {**entry, "pieces": []})
            if (mine["shape"], mine["dtype"]) != (entry["shape"], entry["dtype"]):
                faults.append(f"{name} is {mine['dtype']} {mine['shape']} and {entry['dtype']} {entry['shape']}")
            mine["pieces"] += entry["pieces"]
        numbers |= report["numbers"]
    for name, entry in tensors.items():
        fault = tiling_fault(tuple(entry["shape"]), [Box(tuple(p["at"]), tuple(p["size"])) for p in entry["pieces"]])
        faults += [f"{name}: {fault}"] if fault else []
    if faults:
        raise CheckpointError(f"what the processes hold does not make up whole tensors: {listed(faults)}: is it one layout?")
    files = {report["file"]: report["sha256"] for report in said}
    return {"files": files, "tensors": tensors, "numbers": numbers}


def finish(folder: Path, ranks: int, timeout: float, record: Mapping[str, Any]) -> None:
    """Wait for all processes, then write the manifest: `record`, and where every tensor lies."""
    manifest = {"format": FORMAT, **record, **merge(gather(folder, ranks, timeout))}
    for rank in range(ranks):
        (folder / f"{_stem(rank)}.json").unlink()
    try:
        io.write_json(folder / MANIFEST, manifest)
    except ValueError as error:
        bad = [
            f"{name} is {value} in the record of step {r.get('step')}"
            for r in record["history"]
            for name, value in r.items()
            if isinstance(value, float) and not math.isfinite(value)
        ]
        raise CheckpointError(f"JSON has no word for it: {listed(bad) or error}; keep it as text") from error


class Checkpoint:
    """A complete checkpoint, opened for reading; nothing but the manifest has been read.

    Attributes:
        path: its folder.
        manifest: as it was written.
        tensors: where each lies.

    Raises:
        CheckpointError: there is none, it is of another version, or its manifest was altered.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = io.read_json(path / MANIFEST)
        where = path / MANIFEST
        missing = [f for f in _FIELDS if not isinstance(self.manifest, dict) or f not in self.manifest]
        if missing:
            raise CheckpointError(f"{where} lacks {', '.join(sorted(missing))}: it was altered; delete {path}")
        if self.manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{where} has format {self.manifest['format']!r} and this version of athanor reads format {FORMAT}:"
                " use the version that wrote it"
            )
        try:
            self.tensors = {name: _stored(entry, self.manifest["files"]) for name, entry in self.manifest["tensors"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{where} does not say where tensors lie ({error!r}): it was altered; delete {path}") from error
        faults = []
        for name, stored in self.tensors.items():
            fault = tiling_fault(stored.shape, [box for _, _, box in stored.pieces])
            faults += [f"{name}: {fault}"] if fault else []
        if faults:
            raise CheckpointError(f"{where} describes tensors that are not whole ({listed(faults)}): delete {path}")
        self._open: dict[str, Any] = {}

    def damage(self, first: int = 0, every: int = 1) -> list[str]:
        """What is wrong with the files; of several processes each looks at some, from number `first` on."""
        faults = []
        for name, sha256 in sorted(self.manifest["files"].items())[first::every]:
            path = self.path / name
            if not path.is_file():
                faults.append(f"{path} is missing")
            elif io.sha256_file(path) != sha256:
                faults.append(f"{path} was altered (its sha256 is not the recorded one)")
        return faults

    def read(self, name: str, box: Box, out: Tensor) -> None:
        """Read the elements of `box` of the whole tensor into `out`, of the box's size, from the pieces that have some."""
        stored = self.tensors[name]
        for file, key, piece in stored.pieces:
            common = piece.meet(box)
            if common is None:
                continue
            data = self._slice(file, key, piece, common)
            if data.dtype != stored.dtype:
                raise CheckpointError(f"{self.path / file}: {key} is {data.dtype}, not {stored.dtype}: delete {self.path}")
            out[common.within(box.at)].copy_(data)

    def whole(self, name: str) -> Tensor:
        """All of a tensor, on the CPU."""
        stored = self.tensors[name]
        out = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
        self.read(name, Box((0,) * len(stored.shape), stored.shape), out)
        return out

    def _slice(self, file: str, key: str, piece: Box, common: Box) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            if file not in self._open:
                self._open[file] = safe_open(self.path / file, framework="pt", device="cpu")
            view = self._open[file].get_slice(key)
            if tuple(view.get_shape()) != piece.size:
                raise CheckpointError(f"{self.path / file}: {key} is not of shape {piece.size}: delete {self.path}")
            data: Tensor = view[common.within(piece.at)]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path / file} cannot be read ({error}): delete {self.path}") from error
        return data


def _stored(entry: Mapping[str, Any], files: Mapping[str, str]) -> Stored:
    dtype = getattr(torch, entry["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {entry['dtype']!r}")
    pieces = []
    for piece in entry["pieces"]:
        if piece["file"] not in files or not _FILE.fullmatch(piece["file"]):
            raise ValueError(f"file {piece['file']!r}")
        box = Box(_sizes(piece["at"]), _sizes(piece["size"]))
        if len(box.at) != len(entry["shape"]) or len(box.size) != len(entry["shape"]):
            raise ValueError(f"a piece of {len(box.at)} dimensions of a tensor of {len(entry['shape'])}")
        pieces.append((piece["file"], str(piece["key"]), box))
    return Stored(_sizes(entry["shape"]), dtype, tuple(pieces))


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(n) is int and n >= 0 for n in values):
        raise ValueError(f"sizes {values!r}")
    return tuple(values)
