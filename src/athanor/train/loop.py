"""`fit`: the one training loop of every stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from athanor.core import io
from athanor.core.device import Precision
from athanor.core.errors import NonFiniteLossError
from athanor.core.track import Tracker
from athanor.models.base import LanguageModel
from athanor.nn.moe import after_step
from athanor.optim.schedules import Schedule
from athanor.train.state import Progress, StateStore
from athanor.train.step import Objective, train_step
from athanor.types import Batch

Batches = Callable[[int], Sequence[Batch]]


@dataclass(frozen=True)
class Hook:
    """`fn(step)` is called after every `every`-th update and after the last; what it returns joins the step's record."""

    fn: Callable[[int], dict[str, Any]]
    every: int


def fit(
    model: LanguageModel,
    objective: Objective,
    batches: Batches,
    optimizers: Sequence[torch.optim.Optimizer],
    schedule: Schedule,
    *,
    steps: int,
    precision: Precision = "fp32",
    clip: float = 1.0,
    store: StateStore | None = None,
    save_seconds: float = 15.0,
    hooks: Sequence[Hook] = (),
    tracker: Tracker | None = None,
) -> Progress:
    """Train `model` for `steps` updates.

    Args:
        model: trained in place.
        objective: (model, batch) -> (sum, count, metrics).
        batches: step -> the micro-batches of that step. A pure function of the step and the current weights: that is
            what makes a resume exact, with no reader position to restore. Reinforcement learning is such a function too.
        optimizers: from `optim.build`; each group's rate is its `base_lr` times the schedule's factor.
        schedule: step -> factor of the learning rate.
        steps: updates in all, those before a resume included.
        precision: of the matrix products.
        clip: largest global gradient norm.
        store: where the state is kept; a run is resumed from it when it holds one.
        save_seconds: time between two saves.
        hooks: see `Hook`.
        tracker: gets one record per step.

    Returns:
        Progress with the record of every step.

    Raises:
        NonFiniteLossError: before the update that would have spoilt the weights; the batches are saved beside the state.
        NoTargetsError: a step without a supervised target.
    """
    progress = store.resume(model, optimizers) if store is not None else Progress()
    model.train()
    began = saved = time.perf_counter()
    before = progress.seconds
    while progress.step < steps:
        step = progress.step
        start = time.perf_counter()
        micro = batches(step)
        ready = time.perf_counter()
        factor = schedule(step)
        try:
            result = train_step(model, objective, micro, optimizers, lr_factor=factor, clip=clip, precision=precision)
        except NonFiniteLossError as error:
            raise NonFiniteLossError(f"step {step + 1}: {error}; {_keep(store, step + 1, micro)}") from error
        now = time.perf_counter()
        tokens = sum(batch.ids.numel() for batch in micro)
        record: dict[str, Any] = {"step": step + 1, "loss": result.loss}
        for hook in hooks:
            if (step + 1) % hook.every == 0 or step + 1 == steps:
                record |= hook.fn(step + 1)
        record |= {
            **result.metrics,
            **after_step(model),
            "grad_norm": result.grad_norm,
            "lr": factor * optimizers[0].param_groups[0]["base_lr"],
            "targets": result.count,
            "tokens": tokens,
            "tokens_per_second": tokens / (now - ready),
            "batch_seconds": ready - start,
        }
        progress.step = step + 1
        progress.seconds = before + time.perf_counter() - began
        progress.history.append(record)
        if tracker is not None:
            tracker.log(record)
        if store is not None and time.perf_counter() - saved > save_seconds and progress.step < steps:
            store.save(progress, model, optimizers)
            saved = time.perf_counter()
    model.eval()
    return progress


def _keep(store: StateStore | None, step: int, micro: Sequence[Batch]) -> str:
    """Write the ids of a bad step's batches where the user can look at them."""
    if store is None:
        return "lower the learning rate, or look at the batches named above"
    path = Path(store.folder) / f"bad-step-{step}.json"
    io.write_json(path, [{"origin": b.origin, "ids": b.ids.tolist(), "lengths": b.lengths.tolist()} for b in micro])
    return f"the batches are in {path}: lower the learning rate, or look at that data"
