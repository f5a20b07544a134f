"""Which folder of a run, or of several, holds the checkpoint that is meant."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from athanor.core.errors import CheckpointError, ConfigError, nearest

_PREFERRED = ("rl", "sft", "base")  # which checkpoint of a run answers when none is named


def resolve(path: str | Path, checkpoint: str | None = None) -> Path:
    """The checkpoint folder that `path` means: itself, or the last of the life in a run folder, or the one named."""
    if path == "":
        raise CheckpointError("path ('') is empty: give a checkpoint folder or a run folder such as runs/first")
    if not isinstance(path, (str, PathLike)):
        raise ConfigError(f"path is {path!r} and must be a checkpoint folder or a run folder: give its name, such as runs/first")
    path = Path(path)
    if checkpoint is None and (path / "config.json").is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: give a checkpoint folder or a run folder such as runs/first")
    found = sorted(p.parent.name for p in path.glob("*/config.json"))
    if checkpoint is not None:
        if checkpoint not in found:
            raise CheckpointError(
                f"{path} has no checkpoint {checkpoint!r}{nearest(checkpoint, found)}; it has {', '.join(found) or 'none'}"
            )
        return path / checkpoint
    for name in _PREFERRED:
        if name in found:
            return path / name
    raise CheckpointError(_none_in(path, found))


def _none_in(path: Path, found: Sequence[str]) -> str:
    """What a folder holds instead of a checkpoint, and what to give; `found` are the folders in it that hold models."""
    if found:
        more = f" and {len(found) - 6} more" if len(found) > 6 else ""
        return f"{path} holds no checkpoint itself but {', '.join(found[:6])}{more}: give one of them, such as {path / found[0]}"
    if (path / "run.json").is_file():
        return (
            f"{path} has no checkpoint yet (no */config.json): let `{shlex.join(['athanor', 'run', '--out', str(path)])}` finish"
        )
    if any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return f"{path} holds weights and no config.json: copy or download the whole folder again"
    what = "holds neither config.json nor folders with one" if any(path.iterdir()) else "is empty"
    return f"{path} {what}: give a checkpoint folder or a run folder such as runs/first, or make one with `athanor run`"
