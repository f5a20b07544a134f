"""Weights alone, out of any checkpoint: for a new run that begins with them, and for export."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from athanor.core.errors import CheckpointError
from athanor.models import io as models
from athanor.models.base import LanguageModel
from athanor.train import _placed
from athanor.train._placed import of_all
from athanor.train._written import MANIFEST, Checkpoint, listed, step_path, steps_in
from athanor.train.parallel.base import ALONE, Alone


def whole_state(folder: Path, prefix: str = "model.") -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names begin with `prefix`, without it, whole and on the CPU, whatever layout wrote them.

    Args:
        folder: of a checkpoint, or of a `StateStore`, whose newest is taken then.
        prefix: model. or the kind of some extra tensors (ema.).

    Raises:
        CheckpointError: no checkpoint, a damaged one, or no such tensors.
    """
    checkpoint = _opened(folder)
    found = {name.removeprefix(prefix): checkpoint.whole(name) for name in checkpoint.tensors if name.startswith(prefix)}
    if not found:
        kinds = sorted({name.partition(".")[0] + "." for name in checkpoint.tensors})
        raise CheckpointError(f"{checkpoint.path} has no tensors {prefix!r}: it has {', '.join(kinds)}")
    return found


def continue_from(folder: Path, model: LanguageModel, *, strategy: Alone = ALONE) -> None:
    """Load weights alone into `model`, in place: the beginning of a new run, with new optimisers and step 0.

    Floating weights of another precision are converted. Every process of a run calls it.

    Args:
        folder: of a model (config.json), of a checkpoint, or of a `StateStore`, whose newest is taken then.
        model: of the same architecture.
        strategy: says which part of a tensor this process holds.

    Raises:
        CheckpointError: neither, or damaged, or of other tensors (naming them); nothing was changed then.
    """
    wanted = dict(_placed.tensors(model, strategy, {}))
    if (folder / "config.json").is_file():
        _placed.copy_from(models.load(folder), model.model_type, wanted, folder)
        return
    checkpoint = _opened(folder)
    faults = _placed.misfits(checkpoint, wanted, floats=True)
    everyone = {name for names in of_all(sorted(wanted)) for name in names}
    unexpected = sorted(name for name in checkpoint.tensors if name.startswith("model.") and name not in everyone)
    faults += [f"unexpected: {listed(unexpected)}"] if unexpected else []
    if faults:
        raise CheckpointError(
            f"{checkpoint.path} does not fit the model: {'; '.join(faults)}. Use the config that it was saved with"
        )
    for name, (local, held) in wanted.items():
        _placed.read(checkpoint, name, local, held)


def _opened(folder: Path) -> Checkpoint:
    steps = steps_in(folder)
    path = step_path(folder, steps[-1]) if steps else folder
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder} has no checkpoint ({MANIFEST}) and no model (config.json): give the folder of one, or of a run's state"
        )
    checkpoint = Checkpoint(path)
    damage = checkpoint.damage()
    if damage:
        raise CheckpointError(f"{listed(damage)}: copy {path} again, or take another checkpoint")
    return checkpoint
