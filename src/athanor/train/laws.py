"""The laws of the training loop on somebody's own model: accumulated = whole (L3) and resumed = uninterrupted (L4).

Both work on copies; the model itself stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from athanor.data.pack import join
from athanor.models.base import CausalLM
from athanor.objectives import next_token
from athanor.optim.build import OptimConfig, build
from athanor.optim.schedules import warmup_cosine
from athanor.train.loop import fit
from athanor.train.state import Progress, StateStore
from athanor.train.step import train_step
from athanor.types import Batch, Finding

GRADIENT = 1e-4  # float32 gradients of one weight computed in two ways, as a share of its norm
STEPS, CUT = 4, 2
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
