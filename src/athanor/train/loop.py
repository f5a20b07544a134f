"""`fit`: the one training loop of every stage."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from athanor.core import dist
from athanor.core.device import TrainPrecision, rng_state
from athanor.core.errors import NonFiniteLossError
from athanor.core.track import Tracker
from athanor.models.base import LanguageModel
from athanor.nn.moe import after_step
from athanor.optim.ema import EMA
from athanor.optim.scale import LossScale
from athanor.optim.schedules import Schedule
from athanor.train.guard import EarlyStop, Guard, SpikeConfig
from athanor.train.interrupt import interruptible
from athanor.train.monitor import Monitor
from athanor.train.parallel.base import ALONE, Alone
from athanor.train.replay import keep
from athanor.train.state import Progress, StateStore
from athanor.train.step import Objective, apply, gradients
from athanor.types import Batch

Batches = Callable[[int], Sequence[Batch]]


@dataclass(frozen=True)
class Hook:
    """`fn(step)` is called after every `every`-th update and after the last; what it returns joins the step's record."""

    fn: Callable[[int], dict[str, Any]]
    every: int


@dataclass
class _Kept:
    """What a checkpoint holds besides weights, optimisers and records."""

    guard: Guard
    early: EarlyStop | None
    ema: EMA | None
    scale: LossScale | None

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for kind, part in (("ema", self.ema), ("scale", self.scale)):
            if part is not None:
                found |= {f"{kind}.{name}": value for name, value in part.state().items()}
        return found

    def state(self) -> dict[str, Any]:
        return {"guard": self.guard.state()} | ({} if self.early is None else {"early": self.early.state()})

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any], guard: bool) -> None:
        for kind, part in (("ema", self.ema), ("scale", self.scale)):
            if part is not None:
                own = {name.removeprefix(f"{kind}."): v for name, v in tensors.items() if name.startswith(f"{kind}.")}
                part.load(own)
        if guard and "guard" in state:
            self.guard.load(state["guard"])
        if self.early is not None and "early" in state:
            self.early.load(state["early"])


def fit(
    model: LanguageModel,
    objective: Objective,
    batches: Batches,
    optimizers: Sequence[torch.optim.Optimizer],
    schedule: Schedule,
    *,
    steps: int,
    precision: TrainPrecision = "fp32",
    clip: float = 1.0,
    strategy: Alone = ALONE,
    store: StateStore | None = None,
    save_seconds: float = 15.0,
    hooks: Sequence[Hook] = (),
    tracker: Tracker | None = None,
    monitor: Monitor | None = None,
    guard: Guard | None = None,
    early: EarlyStop | None = None,
    ema: EMA | None = None,
) -> Progress:
    """Train `model` for `steps` updates.

    Args:
        model: as `strategy.place` gave it; trained in place.
        objective: (model, batch) -> (sum, count, metrics).
        batches: step -> the micro-batches of that step, of all processes. A pure function of the step and the current weights:
            that is what makes a resume exact, with no reader position to restore. Reinforcement learning is such a function too.
        optimizers: from `optim.build`; each group's rate is its `base_lr` times the schedule's factor.
        schedule: step -> factor of the learning rate.
        steps: updates in all, those before a resume included.
        precision: of the matrix products.
        clip: largest global gradient norm.
        strategy: how the work is spread over processes.
        store: where the state is kept; a run is resumed from it when it holds one. SIGTERM and SIGINT then save and leave.
        save_seconds: time between two saves.
        hooks: see `Hook`.
        tracker: gets one record per step.
        monitor: what else the records hold.
        guard: skips steps that jump, or rolls back.
        early: ends a run that no longer improves.
        ema: averages the weights.

    Returns:
        Progress with the record of every step.

    Raises:
        NonFiniteLossError: before the update that would have spoilt the weights; the batches are saved beside the state.
        NoTargetsError: a step without a supervised target.
        SystemExit: a signal asked to stop; the state is saved.
    """
    parts = _Kept(guard or Guard(SpikeConfig()), early, ema, LossScale() if precision == "fp16" else None)

    def restore(with_guard: bool) -> Progress:
        assert store is not None
        tensors = parts.tensors()
        found = store.resume(model, optimizers, strategy=strategy, extra_tensors=tensors)
        if found.step:
            parts.load(tensors, found.extra, with_guard)
        return found

    def save() -> None:
        assert store is not None
        store.save(progress, model, optimizers, strategy=strategy, extra_tensors=parts.tensors(), extra=parts.state())

    def learn(step: int) -> dict[str, Any] | None:
        """One step; its record, or None where the run went back to a checkpoint."""
        start = time.perf_counter()
        rng = rng_state() if store is not None else {}
        micro = batches(step + parts.guard.shift)
        ready = time.perf_counter()
        scale = 1.0 if parts.scale is None else parts.scale.scale
        try:
            result = gradients(model, objective, micro, optimizers, precision=precision, strategy=strategy, scale=scale)
        except NonFiniteLossError as error:
            if parts.scale is None:
                where = _keep(store, step + 1, micro, rng, str(error))
                raise NonFiniteLossError(f"step {step + 1}: {error}; {where}") from error
            parts.scale.update(False)  # the step is lost, and counted: schedule and data go on
            return {"step": step + 1, "overflow": True, "loss_scale": parts.scale.scale}
        verdict = parts.guard.judge(step, result.loss, result.grad_norm, saved_step)
        if verdict == "rollback":
            return None
        factor = schedule(step)
        if monitor is not None:
            monitor.before_update(step + 1)
        if verdict == "none":
            apply(optimizers, grad_norm=result.grad_norm, clip=clip, lr_factor=factor)
            if ema is not None:
                ema.update(model)
            if monitor is not None:
                monitor.after_update(step + 1)
        now = time.perf_counter()
        tokens = sum(batch.tokens for batch in micro)
        record: dict[str, Any] = {"step": step + 1, "loss": result.loss}
        for hook in hooks:
            if (step + 1) % hook.every == 0 or step + 1 == steps:
                record |= hook.fn(step + 1)
        strategy.count(model)
        record |= {
            **result.metrics,
            **after_step(model),
            "grad_norm": result.grad_norm,
            "lr": factor * optimizers[0].param_groups[0]["base_lr"],
            "targets": result.count,
            "tokens": tokens,
            "tokens_per_second": tokens / (now - ready),
            "batch_seconds": ready - start,
            **parts.guard.record(),
        }
        if parts.scale is not None:
            parts.scale.update(True)
            record["loss_scale"] = parts.scale.scale
        if monitor is not None:
            record |= monitor.record(result.loss, micro, seconds=now - start, waited=ready - start)
        return record

    progress = Progress() if store is None else restore(True)
    saved_step = progress.step or None
    if monitor is not None:
        monitor.begin(model, strategy)
    model.train()
    began = saved = time.perf_counter()
    before, why = progress.seconds, ""
    with interruptible() if store is not None else nullcontext() as interrupt, closing(store) if store else nullcontext():
        while progress.step < steps and not why:
            record = learn(progress.step)
            if record is None:
                progress = restore(False)
                continue
            progress.step = record["step"]
            progress.seconds = before + time.perf_counter() - began
            progress.history.append(record)
            if tracker is not None:
                tracker.log(record)
            why = "" if early is None else early.see(record)
            if store is None or progress.step == steps or why:
                continue
            assert interrupt is not None
            leaving = interrupt.anywhere(model.device)
            due = dist.of_main(time.perf_counter() - saved > save_seconds)
            if leaving or due or (store.best is not None and store.improved(progress)):
                save()
                saved, saved_step = time.perf_counter(), progress.step
            if leaving:
                store.wait()
                if dist.is_main():
                    print(interrupt.message(progress.step, steps), file=sys.stderr)
                raise SystemExit(interrupt.exit_code)
    if early is not None:
        early.finish()
    progress.stopped = why
    model.eval()
    return progress


def _keep(store: StateStore | None, step: int, micro: Sequence[Batch], rng: dict[str, Any], why: str) -> str:
    """Write a bad step where the user can look at it and do it again (`train/replay.py`)."""
    if store is None:
        return "lower the learning rate, or look at the batches named above"
    path = keep(Path(store.folder), step, micro, rng, why)
    return f"the batches are in {path}: lower the learning rate, or look at that data"
