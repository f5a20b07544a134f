"""The laws of the training loop on somebody's own model: accumulated = whole (L3), resumed = uninterrupted (L4), and several
processes = one (L5).

All work on copies; the model itself stays as it is.
"""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException, start_processes

from athanor.core import dist, io
from athanor.data.pack import join
from athanor.models import io as models
from athanor.models.base import CausalLM
from athanor.objectives import next_token
from athanor.optim.build import OptimConfig, build
from athanor.optim.schedules import warmup_cosine
from athanor.train.loop import fit
from athanor.train.parallel.base import ALONE, Alone
from athanor.train.parallel.distributed import Distributed
from athanor.train.parallel.layout import parse
from athanor.train.parallel.pipeline import Pipelined
from athanor.train.parallel.support import reason
from athanor.train.state import Progress, StateStore
from athanor.train.step import train_step
from athanor.train.weights import whole_state
from athanor.types import Batch, Finding

GRADIENT = 1e-4  # float32 gradients of one weight computed in two ways, as a share of its norm
STEPS, CUT = 4, 2
LAYOUTS = ("ddp=2", "fsdp=2", "tp=2", "pp=2")
UPDATE = 1e-4  # what several float32 updates did to all weights, computed in two ways, as a share of its norm; losses in nats
_WAIT = datetime.timedelta(minutes=5)
_CLOCK = ("tokens_per_second", "batch_seconds")


class _Still(torch.optim.Optimizer):
    """Leaves the weights as they are, so that the gradients can be looked at."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # no overloads needed
        return None


def accumulated_is_whole(model: CausalLM, batches: Sequence[Batch]) -> Finding:
    """L3: micro-batches one after another give the gradient that they give as one batch."""
    whole, parts = _gradients(model, [join(batches)]), _gradients(model, batches)
    distances = [float((a - b).norm() / a.norm()) for a, b in zip(whole, parts, strict=True) if a.any() or b.any()]
    compared = f"accumulated over {len(batches)} micro-batches and whole: gradients of {len(whole)} tensors"
    return Finding("L3", compared, max(distances), GRADIENT)


def _gradients(model: CausalLM, batches: Sequence[Batch]) -> list[Tensor]:
    own = copy.deepcopy(model).requires_grad_()
    still = _Still(own.parameters(), {"base_lr": 0.0})
    train_step(own, next_token.loss, batches, [still], lr_factor=1.0, clip=float("inf"), precision="fp32")
    return [p.grad for p in own.parameters() if p.grad is not None]


def resumed_is_uninterrupted(model: CausalLM, batches: Sequence[Batch], folder: Path) -> Finding:
    """L4: a few steps, saved under `folder` and resumed by new objects, end in the same bits as without the break."""
    whole, history = _trained(model, batches, STEPS)
    store = StateStore(folder, {"law": "L4"})
    _trained(model, batches, CUT, store)
    resumed, again = _trained(model, batches, STEPS, store)
    different = sum(not torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    different += sum(a != b for a, b in zip(_timeless(history), _timeless(again), strict=True))
    compared = (
        f"{STEPS} steps and {CUT} + {STEPS - CUT} with a resume: of {len(whole)} weights and {STEPS} records, how many differ"
    )
    return Finding("L4", compared, different)


def _trained(
    model: CausalLM, batches: Sequence[Batch], steps: int, store: StateStore | None = None
) -> tuple[list[Tensor], Progress]:
    own = copy.deepcopy(model).requires_grad_()
    optimizers = build(own, OptimConfig())
    schedule = warmup_cosine(STEPS, 1)
    progress = fit(
        own, next_token.loss, lambda step: [batches[step % len(batches)]], optimizers, schedule, steps=steps, store=store
    )
    if store is not None and steps < STEPS:
        store.save(progress, own, optimizers)
    return list(own.state_dict().values()), progress


def _timeless(progress: Progress) -> list[dict[str, object]]:
    return [{name: value for name, value in record.items() if name not in _CLOCK} for record in progress.history]


def parallel_is_single(model: CausalLM, batch: Batch, folder: Path) -> list[Finding]:
    """L5: two processes, in each layout of LAYOUTS, lose and learn in a few steps what one does; layouts that the model does not
    train under are skipped with the reason.

    Plain momentum, in which a small error of a gradient stays small, where Adam would divide it by itself.

    Args:
        model: a decoder of float32.
        batch: what every step learns from; two sequences with a target or more.
        folder: an empty one, for the copies that processes read and what they write.
    """
    refused = {text: reason(model, parse(text)) for text in LAYOUTS}
    possible = [text for text in LAYOUTS if not refused[text]]
    models.save(model, folder / "model")
    begun = _steps(ALONE, folder, batch, "one process")
    failed = _processes(possible, folder, batch)
    findings = []
    for text in LAYOUTS:
        compared = f"{text} and one process: losses and weights of {STEPS} steps"
        if refused[text]:
            findings.append(Finding("L5", compared, skipped=refused[text]))
        elif text in failed or not (folder / text / "losses.json").is_file():
            findings.append(Finding("L5", f"{compared}: {failed.get(text, 'not reached')}", torch.inf))
        else:
            findings.append(Finding("L5", compared, _apart(folder, begun, text), UPDATE))
    return findings


def _apart(folder: Path, begun: dict[str, Tensor], text: str) -> float:
    """How far the losses (in nats) or the weights (as a share of what changed) of a layout are from those of one process."""
    one, other = (io.read_json(folder / name / "losses.json") for name in ("one process", text))
    alone, spread = (whole_state(folder / name) for name in ("one process", text))
    changed = sum(float((alone[name] - begun[name]).double().square().sum()) for name in begun)
    wrong = sum(float((alone[name] - spread[name]).double().square().sum()) for name in begun)
    return max([abs(a - b) for a, b in zip(one, other, strict=True)] + [(wrong / changed) ** 0.5])


def _processes(layouts: Sequence[str], folder: Path, batch: Batch) -> dict[str, str]:
    """Run the steps under each layout, in two processes that take one after another; what went wrong, by layout."""
    try:
        start_processes(_process, (tuple(layouts), folder, batch), nprocs=2, start_method="spawn")
    except ProcessException as error:
        broken = next((text for text in layouts if not (folder / text / "losses.json").is_file()), layouts[-1])
        return {broken: str(error).strip().splitlines()[-1]}
    return {}


def _process(rank: int, layouts: Sequence[str], folder: Path, batch: Batch) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    for text in layouts:
        layout = parse(text)
        meeting = (folder / f"meeting {text}").as_uri()
        td.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=_WAIT)
        try:
            strategy = (Pipelined if layout.pp > 1 else Distributed)(layout, torch.device("cpu"))
            _steps(strategy, folder, batch, text)
            td.barrier()
        finally:
            td.destroy_process_group()


def _steps(strategy: Alone, folder: Path, batch: Batch, name: str) -> dict[str, Tensor]:
    """Train the saved model for some steps, write its losses and a checkpoint to a folder of that name; the weights before."""
    model: Any = models.load(folder / "model")
    before = {key: value.clone() for key, value in model.state_dict().items() if key in dict(model.named_parameters())}
    model = strategy.place(model)
    optimizers = build(model, OptimConfig(name="sgd", lr=0.03))
    losses = [
        train_step(
            model, next_token.loss, [batch], optimizers, lr_factor=1.0, clip=1.0, precision="fp32", strategy=strategy
        ).loss
        for _ in range(STEPS)
    ]  # fmt: skip
    store = StateStore(folder / name, {"law": "L5"})
    store.save(Progress(STEPS), model, optimizers, strategy=strategy)
    store.close()
    if dist.is_main():
        io.write_json(folder / name / "losses.json", losses)
    return before
