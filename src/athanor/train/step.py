"""One update: accumulate, normalise, clip, apply (law L3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from athanor.core.device import TrainPrecision
from athanor.core.errors import NonFiniteLossError, NoTargetsError
from athanor.models.base import LanguageModel
from athanor.train.parallel.base import ALONE, Alone, Objective, local
from athanor.types import Batch

__all__ = ["Objective", "StepResult", "apply", "gradients", "train_step"]


@dataclass(frozen=True)
class StepResult:
    """What one update saw: mean loss, supervised targets, global gradient norm before clipping, metrics per target."""

    loss: float
    count: int
    grad_norm: float
    metrics: dict[str, float]


def gradients(
    model: LanguageModel,
    objective: Objective,
    batches: Sequence[Batch],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    precision: TrainPrecision,
    strategy: Alone = ALONE,
    scale: float = 1.0,
) -> StepResult:
    """The gradient of the mean loss over all targets of all micro-batches of all processes, left in the parameters.

    Sums are accumulated and divided once by the count of all of them: the gradient does not depend on how targets are spread
    over micro-batches and processes.

    Args:
        scale: what losses are multiplied by before their gradients are formed, and gradients divided by after (fp16).

    Raises:
        NoTargetsError: nothing is supervised in the whole step.
        NonFiniteLossError: loss or gradient is inf or nan.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    sums = strategy.accumulate(model, objective, strategy.share(batches), precision, scale)
    sums = strategy.reduce(model, sums)
    origins = ", ".join(batch.origin for batch in batches)
    if sums.count == 0:
        raise NoTargetsError(f"no supervised target in the whole step (batches: {origins}): nothing can be learnt from it")
    if not torch.isfinite(sums.loss):
        raise NonFiniteLossError(f"the loss is {sums.loss.item()} over batches {origins}")
    params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    if not sums.divided:
        torch._foreach_mul_([local(p.grad) for p in params if p.grad is not None], 1.0 / (sums.count * scale))
    norm = strategy.norm(params)
    if not torch.isfinite(norm):
        raise NonFiniteLossError(f"the gradient norm is {norm.item()} over batches {origins}")
    metrics = {name: float(value) / sums.count for name, value in sums.metrics.items()}
    return StepResult(float(sums.loss) / sums.count, sums.count, float(norm), metrics)


def apply(optimizers: Sequence[torch.optim.Optimizer], *, grad_norm: float, clip: float, lr_factor: float) -> None:
    """Clip the gradients to the norm `clip`, set each group's rate to `lr_factor` times its `base_lr`, and update."""
    params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    if (factor := clip / (grad_norm + 1e-6)) < 1.0:
        torch._foreach_mul_([local(p.grad) for p in params if p.grad is not None], factor)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
        optimizer.step()


def train_step(
    model: LanguageModel,
    objective: Objective,
    batches: Sequence[Batch],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    lr_factor: float,
    clip: float,
    precision: TrainPrecision,
    strategy: Alone = ALONE,
) -> StepResult:
    """`gradients`, then `apply`. Raises as `gradients` does; the weights are untouched then."""
    result = gradients(model, objective, batches, optimizers, precision=precision, strategy=strategy)
    apply(optimizers, grad_norm=result.grad_norm, clip=clip, lr_factor=lr_factor)
    return result
