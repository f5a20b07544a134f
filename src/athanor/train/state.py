"""The whole state of a training run on disk, so that resumed = uninterrupted (law L4).

A checkpoint holds weights and persistent buffers, the state of the optimisers by parameter name, the random generators of every
process, what the loop adds (averaged weights, loss scale, guards), the step and all records. It is written between updates
only, so no gradient is half accumulated and the position in the data is the step. How it lies on disk says `_written.py`.
"""

from __future__ import annotations

import json
import secrets
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from athanor.core import dist, io
from athanor.core.config import differences
from athanor.core.device import rng_state, set_rng_state
from athanor.core.errors import CheckpointError
from athanor.models.base import LanguageModel
from athanor.train import _placed, _written
from athanor.train._boxes import Box
from athanor.train._placed import from_first, of_all
from athanor.train._written import MANIFEST, Checkpoint, Number, Part, listed, step_path, steps_in
from athanor.train.parallel.base import ALONE, Alone
from athanor.train.pieces import Held, whole

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_EARLIER = "state.json"  # what a checkpoint of athanor 0.1 had


@dataclass
class Progress:
    """How far a run is: next step, records logged so far, seconds spent (over all its lives), and the `extra` of `save`."""

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
    stopped: str = ""  # why the run ended before its steps were done


class StateStore:
    """Checkpoints of one stage's training under `folder`, one folder a step; a folder with a manifest is complete.

    Every process of a run makes one, and all call `save` and `resume` together. `save` copies and returns; a thread writes.
    The thread's errors are raised by the next call of any method.

    Args:
        folder: where they lie; of several processes, on a file system that all see.
        identity: everything that must be the same for a resume to be one (config, data and model hashes). Not the layout.
        keep: how many of the newest are kept.
        best: (name, "min" or "max"): the checkpoint whose step's record is best by this figure is kept besides.
        timeout: seconds that process 0 waits for the others to have written.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        keep: int = 1,
        *,
        best: tuple[str, Literal["min", "max"]] | None = None,
        timeout: float = 600.0,
    ) -> None:
        self.folder, self.identity, self.keep, self.best, self.timeout = folder, identity, keep, best, timeout
        self._thread: threading.Thread | None = None
        self._failed: tuple[int, BaseException] | None = None
        self._buffers: dict[str, Tensor] = {}

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        self.wait()
        return steps_in(self.folder)

    def history(self) -> list[dict[str, Any]]:
        """The records of the newest checkpoint; empty where there is none."""
        steps = self.steps()
        history: list[dict[str, Any]] = Checkpoint(step_path(self.folder, steps[-1])).manifest["history"] if steps else []
        return history

    def improved(self, progress: Progress) -> bool:
        """Whether the last record is better by `best` than all before it: a moment to save."""
        return bool(progress.history) and _best(progress.history, self.best) == progress.history[-1]["step"]

    def wait(self) -> None:
        """Until what was saved is on disk.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failed is not None:
            (step, error), self._failed = self._failed, None
            raise CheckpointError(
                f"the checkpoint of step {step} was not written to {self.folder} ({error or type(error).__name__});"
                " earlier ones are whole: put that right and start again to go on from the last of them"
            ) from error

    def close(self) -> None:
        """`wait`, and let go of the memory that tensors were copied to."""
        try:
            self.wait()
        finally:
            self._buffers.clear()

    def save(
        self,
        progress: Progress,
        model: LanguageModel,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        strategy: Alone = ALONE,
        extra_tensors: Mapping[str, Tensor] = _NOTHING,
        extra: Mapping[str, Any] = _NOTHING,
    ) -> None:
        """Copy everything and begin to write it; then delete what is neither among the newest nor the best.

        The save before is waited for. The copies stay, for the next save, until `close`.

        Args:
            progress: how far the run is.
            model: its weights and persistent buffers.
            optimizers: their state, by parameter name. Groups are not kept: they follow from config and step.
            strategy: says which part of a tensor this process holds.
            extra_tensors: `<kind>.<name>`, such as ema.head.weight. Those of a parameter's name and shape are held like it,
                others are the same on every process.
            extra: JSON that comes back in `Progress.extra`; that of process 0 counts.

        Raises:
            CheckpointError: the save before could not be written; a state that no file can hold.
        """
        self.wait()
        path = step_path(self.folder, progress.step)
        if dist.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            io.recover(path)
        temporary = io.temporary_dir(path, from_first(secrets.token_hex(4)))
        parts, numbers = self._copied(model, optimizers, strategy, extra_tensors)
        record = {
            "identity": self.identity,
            "step": progress.step,
            "seconds": progress.seconds,
            "history": list(progress.history),
            "extra": dict(extra),
        }
        arguments = (path, temporary, dist.rank(), dist.world_size(), parts, numbers, record)
        self._thread = threading.Thread(target=self._write, args=arguments, name=f"save-{progress.step}")
        self._thread.start()

    def resume(
        self,
        model: LanguageModel,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        strategy: Alone = ALONE,
        extra_tensors: Mapping[str, Tensor] = _NOTHING,
    ) -> Progress:
        """Load the newest checkpoint into model, optimisers, `extra_tensors` and random generators, in place; a fresh Progress
        where there is none.

        Any layout reads what any other wrote. Where processes are more than those that wrote, process r takes the generators of
        process r mod theirs. Without optimisers their state is left in the file.

        Raises:
            CheckpointError: damaged, of another run (naming the fields that differ), or of other tensors (naming them);
                nothing was changed then.
        """
        self.wait()
        checkpoint = self._newest()
        if checkpoint is None:
            return Progress()
        manifest, path = checkpoint.manifest, checkpoint.path
        changed = differences(manifest["identity"], json.loads(json.dumps(self.identity)))
        if changed:
            raise CheckpointError(
                f"{path} belongs to a run with other {', '.join(changed)}: start with the same settings to resume it,"
                " or with another --out to begin anew"
            )
        damage = [fault for faults in of_all(checkpoint.damage(dist.rank(), dist.world_size())) for fault in faults]
        if damage:
            raise CheckpointError(f"{listed(damage)}: delete {path}; the checkpoint before it is resumed where there is one")
        wanted = dict(_placed.tensors(model, strategy, extra_tensors))
        params = _placed.parameters(model, optimizers)
        states = _placed.state_plan(checkpoint, params, strategy)
        self._check(checkpoint, wanted, params, bool(optimizers))
        for name, (local, held) in wanted.items():
            _placed.read(checkpoint, name, local, held)
        _placed.read_states(checkpoint, params, states)
        own = f"rng.{dist.rank() % len(manifest['files'])}."
        set_rng_state({name.removeprefix(own): checkpoint.whole(name) for name in checkpoint.tensors if name.startswith(own)})
        return Progress(manifest["step"], manifest["history"], manifest["seconds"], manifest["extra"])

    @staticmethod
    def _check(
        checkpoint: Checkpoint, wanted: Mapping[str, tuple[Tensor, Held]], params: Mapping[str, object], optimizers: bool
    ) -> None:
        """That all processes together want what the checkpoint has, no more and no less, in these shapes and dtypes."""
        told = of_all((sorted(wanted), sorted(params), _placed.misfits(checkpoint, wanted)))
        tensors = {name for names, _, _ in told for name in names}
        parameters = {name for _, names, _ in told for name in names}
        unexpected = []
        for name in sorted(checkpoint.tensors):
            kind = name.partition(".")[0]
            if kind == "optimizer":
                if optimizers and _placed.owner(name)[0] not in parameters:
                    unexpected.append(name)
            elif kind != "rng" and name not in tensors:
                unexpected.append(name)
        faults = sorted({fault for _, _, faults in told for fault in faults})
        faults += [f"unexpected: {listed(unexpected)}"] if unexpected else []
        if faults:
            raise CheckpointError(
                f"{checkpoint.path} does not fit this run: {'; '.join(faults)}. Use the settings that it was saved with"
            )

    def clear(self) -> None:
        """Delete all checkpoints: the stage is over."""
        self.close()
        if dist.is_main():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _copied(
        self, model: LanguageModel, optimizers: Sequence[torch.optim.Optimizer], strategy: Alone, extra: Mapping[str, Tensor]
    ) -> tuple[dict[str, Part], dict[str, Number]]:
        """Copies on the CPU of all that this process writes, in memory that is used again by the next save."""
        parts, numbers = {}, {}
        tensors = dict(_placed.tensors(model, strategy, extra))
        for name, owned in _placed.parameters(model, optimizers).items():
            optimizer, _, p = owned
            for key, value in optimizer.state.get(p, {}).items():
                full = f"optimizer.{name}.{key}"
                if isinstance(value, Tensor):
                    mine = _placed.local(value)
                    tensors[full] = (mine, _placed.state_held(full, mine, owned, strategy.held(name, p)))
                elif value is None or isinstance(value, (bool, int, float)):
                    numbers[full] = value
                else:
                    raise CheckpointError(f"{full} is a {type(value).__name__}: optimisers may keep tensors and numbers only")
        for name, value in rng_state().items():
            tensors[f"rng.{dist.rank()}.{name}"] = (value, whole(value))
        cuda = False
        for name, (local, held) in tensors.items():
            _placed.check_held(name, local, held)
            if held.writes:
                pieces = [(Box(p.whole, p.size), Box(p.local, p.size)) for p in held.pieces if Box(p.local, p.size).volume]
                views = [(box, local[inner.within((0,) * local.ndim)]) for box, inner in pieces]
                parts[name] = Part(held.shape, local.dtype, [(b, self._copy(f"{name}#{i}", v)) for i, (b, v) in enumerate(views)])
                cuda |= local.is_cuda
        if cuda:
            torch.cuda.synchronize()
        return parts, numbers

    def _copy(self, key: str, view: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != view.shape or buffer.dtype != view.dtype:
            buffer = self._buffers[key] = torch.empty(view.shape, dtype=view.dtype, device="cpu", pin_memory=view.is_cuda)
        return buffer.copy_(view.detach(), non_blocking=view.is_cuda)

    def _write(
        self,
        path: Path,
        temporary: Path,
        rank: int,
        ranks: int,
        parts: Mapping[str, Part],
        numbers: Mapping[str, Number],
        record: Mapping[str, Any],
    ) -> None:
        """What the thread does: files and waiting for files, nothing collective."""
        try:
            try:
                temporary.mkdir(exist_ok=True)
                _written.write_rank(temporary, rank, parts, numbers)
            except Exception as error:
                if rank > 0:
                    _written.write_failure(temporary, rank, error)
                raise
            if rank == 0:
                _written.finish(temporary, ranks, self.timeout, record)
                io.place_dir(temporary, path)
                self._prune(record["history"])
        except Exception as error:  # raised by the next call
            self._failed = (record["step"], error)
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    def _prune(self, history: Sequence[Mapping[str, Any]]) -> None:
        steps = steps_in(self.folder)
        kept = {*steps[-self.keep :], _best([r for r in history if r["step"] in steps], self.best)}
        for step in steps:
            if step not in kept:
                io.remove_dir(step_path(self.folder, step))

    def _newest(self) -> Checkpoint | None:
        """The newest checkpoint, after removing what a killed writer left half written or half deleted."""
        newest = -1
        if dist.is_main() and self.folder.is_dir():
            for left in self.folder.glob(".*-step-*"):
                io.recover(self.folder / f"step-{left.name.rpartition('-')[2]}")
            for path in self.folder.glob("step-[0-9]*"):
                if (path / _EARLIER).is_file():
                    raise CheckpointError(f"{path} is of an earlier version of athanor: finish it with that, or delete {path}")
                if not (path / MANIFEST).is_file():
                    io.remove_dir(path)
            newest = max(steps_in(self.folder), default=-1)
        newest = from_first(newest)
        return None if newest < 0 else Checkpoint(step_path(self.folder, newest))


def _best(history: Sequence[Mapping[str, Any]], by: tuple[str, str] | None) -> int | None:
    """The step whose record is best, the earliest of equals; None where no record has the figure."""
    if by is None:
        return None
    name, direction = by
    sign = {"min": 1.0, "max": -1.0}[direction]
    ranked = [(sign * r[name], r["step"]) for r in history if isinstance(r.get(name), (int, float)) and r[name] == r[name]]
    return min(ranked)[1] if ranked else None
