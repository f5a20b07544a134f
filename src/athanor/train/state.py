"""The whole state of a training run on disk, so that resumed = uninterrupted (law L4)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from athanor.core import io
from athanor.core.config import differences
from athanor.core.device import rng_state, set_rng_state
from athanor.core.errors import CheckpointError
from athanor.models.base import LanguageModel

_TENSORS, _META = "state.safetensors", "state.json"
_FIELDS = {"identity", "sha256", "step", "seconds", "history"}


@dataclass
class Progress:
    """How far a run is: next step, records logged so far, seconds spent (over all its lives)."""

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


class StateStore:
    """Checkpoints of one stage's training under `folder`, one folder a step; a folder that is there is complete.

    Args:
        folder: where they lie.
        identity: everything that must be the same for a resume to be one (config, data and model hashes).
        keep: how many of the newest are kept.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], keep: int = 1) -> None:
        self.folder, self.identity, self.keep = folder, identity, keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(int(p.name.removeprefix("step-")) for p in self.folder.glob("step-[0-9]*") if (p / _META).is_file())

    def _mend(self) -> None:
        """Remove what a killed writer left half written or half deleted."""
        for path in self.folder.glob(".*-step-*"):
            io.recover(self.folder / f"step-{path.name.rpartition('-')[2]}")
        for path in self.folder.glob("step-[0-9]*"):
            if not (path / _META).is_file():
                shutil.rmtree(path)

    def history(self) -> list[dict[str, Any]]:
        """The records of the newest checkpoint; empty where there is none."""
        steps = self.steps()
        if not steps:
            return []
        history: list[dict[str, Any]] = io.read_json(self.folder / f"step-{steps[-1]:08d}" / "state.json")["history"]
        return history

    def save(self, progress: Progress, model: LanguageModel, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Write everything; then delete what is older than `keep`."""
        tensors: dict[str, Tensor] = {f"model.{k}": v for k, v in model.state_dict().items()}
        for i, optimizer in enumerate(optimizers):
            for p, values in optimizer.state_dict()["state"].items():
                for name, value in values.items():
                    tensors[f"optimizer.{i}.{p}.{name}"] = torch.as_tensor(value)
        tensors |= {f"rng.{k}": v for k, v in rng_state().items()}
        path = self.folder / f"step-{progress.step:08d}"
        with io.atomic_dir(path) as folder:
            io.save_tensors(folder / _TENSORS, {k: v.contiguous() for k, v in tensors.items()})
            meta = {"identity": self.identity, "sha256": io.sha256_file(folder / _TENSORS)}
            progress_fields = {"step": progress.step, "seconds": progress.seconds, "history": progress.history}
            io.write_json(folder / _META, meta | progress_fields)
        for step in self.steps()[: -self.keep]:
            old = self.folder / f"step-{step:08d}"
            (old / _META).unlink()  # first: half deleted, it must not count as complete
            shutil.rmtree(old)

    def resume(self, model: LanguageModel, optimizers: Sequence[torch.optim.Optimizer]) -> Progress:
        """Load the newest checkpoint into model, optimisers and random generators; a fresh Progress where there is none.

        Raises:
            CheckpointError: damaged, or of another run (naming the fields that differ).
        """
        self._mend()
        steps = self.steps()
        if not steps:
            return Progress()
        path = self.folder / f"step-{steps[-1]:08d}"
        meta = io.read_json(path / _META)
        if not isinstance(meta, dict) or not meta.keys() >= _FIELDS:
            raise CheckpointError(f"{path / _META} lacks {', '.join(sorted(_FIELDS - set(meta)))}: it was altered; delete {path}")
        changed = differences(meta["identity"], json.loads(json.dumps(self.identity)))
        if changed:
            raise CheckpointError(
                f"{path} belongs to a run with other {', '.join(changed)}: start with the same settings to resume it,"
                " or with another --out to begin anew"
            )
        if not (path / _TENSORS).is_file() or io.sha256_file(path / _TENSORS) != meta["sha256"]:
            raise CheckpointError(f"{path / _TENSORS} was altered (its sha256 is not the recorded one): delete {path}")
        tensors = io.load_tensors(path / _TENSORS)
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        for i, optimizer in enumerate(optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            prefix = f"optimizer.{i}."
            for key in tensors:
                if key.startswith(prefix):
                    p, name = key.removeprefix(prefix).split(".", 1)
                    state.setdefault(int(p), {})[name] = tensors[key]
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        set_rng_state({k.removeprefix("rng."): v for k, v in tensors.items() if k.startswith("rng.")})
        return Progress(meta["step"], meta["history"], meta["seconds"])

    def clear(self) -> None:
        """Delete all checkpoints: the stage is over."""
        shutil.rmtree(self.folder, ignore_errors=True)
