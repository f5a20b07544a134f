"""A step that went wrong, kept so that it can be done again: its batches and the random state before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from athanor.core import dist, io
from athanor.core.device import TrainPrecision, autocast, set_rng_state
from athanor.core.errors import CheckpointError
from athanor.models.base import LanguageModel
from athanor.train.parallel.base import Objective
from athanor.types import Batch, Source


@dataclass(frozen=True)
class Replayed:
    """What one batch of a step gave when it was done again.

    origin     where its sequences come from
    loss       mean over its targets, nats
    count      targets
    grad_norm  of the gradient of that mean
    """

    origin: str
    loss: float
    count: int
    grad_norm: float


def keep(folder: Path, step: int, micro: Sequence[Batch], rng: Mapping[str, Tensor], why: str) -> Path:
    """Write a step as `bad-step-N.safetensors` and `bad-step-N.json`; returns the path of the latter. The main process writes.

    Args:
        folder: made where it is not there.
        step: its number, from 1.
        micro: its batches.
        rng: `core.device.rng_state()` as it was before them.
        why: what was wrong.
    """
    path = folder / f"bad-step-{step}.json"
    if not dist.is_main():
        return path
    tensors = {f"rng.{name}": value for name, value in rng.items()}
    for i, batch in enumerate(micro):
        named = {"ids": batch.ids, "labels": batch.labels, "lengths": batch.lengths}
        named |= {f"extras.{name}": value for name, value in batch.extras.items()}
        if batch.source is not None:
            named |= {"source.ids": batch.source.ids, "source.lengths": batch.source.lengths}
        # Copies: the format refuses tensors that share memory.
        tensors |= {f"{i}.{name}": value.detach().cpu().clone() for name, value in named.items()}
    io.save_tensors(path.with_suffix(".safetensors"), tensors)
    sizes = [{"origin": b.origin, "tokens": b.tokens, "sequences": b.lengths.numel()} for b in micro]
    io.write_json(path, {"step": step, "why": why, "batches": sizes})
    return path


def kept(path: Path) -> tuple[list[Batch], dict[str, Tensor]]:
    """Batches and random state of a step that `keep` wrote to `path` (the .json). Raises CheckpointError when it is damaged."""
    about = io.read_json(path)
    tensors = io.load_tensors(path.with_suffix(".safetensors"))
    try:
        micro = [_batch(entry["origin"], _under(tensors, f"{i}.")) for i, entry in enumerate(about["batches"])]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no kept step, or lacks {error}: train again until it is met") from error
    return micro, _under(tensors, "rng.")


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _batch(origin: str, tensors: Mapping[str, Tensor]) -> Batch:
    source: Any = Source(tensors["source.ids"], tensors["source.lengths"]) if "source.ids" in tensors else None
    return Batch(tensors["ids"], tensors["labels"], tensors["lengths"], _under(tensors, "extras."), origin, source)


def replay(path: Path, model: LanguageModel, objective: Objective, precision: TrainPrecision = "fp32") -> list[Replayed]:
    """Do a kept step again, batch by batch, with the random state that it had; the weights stay as they are.

    `model` holds the weights of the last checkpoint, or those that a program still had when the step failed. The global random
    state is afterwards that of the step's end.

    Raises CheckpointError when the files are damaged.
    """
    micro, rng = kept(path)
    set_rng_state(rng)
    was, results = model.training, []
    model.train()
    for batch in micro:
        model.zero_grad(set_to_none=True)
        with autocast(model.device, precision):
            loss, count, _ = objective(model, batch.to(model.device))
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        results.append(Replayed(batch.origin, loss.item() / max(count, 1), count, norm.item() / max(count, 1)))
    model.zero_grad(set_to_none=True)
    model.train(was)
    return results
