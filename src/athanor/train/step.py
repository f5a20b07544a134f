"""One update: accumulate, normalise, clip, apply (law L3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from athanor.core import dist
from athanor.core.device import Precision, autocast
from athanor.core.errors import NonFiniteLossError, NoTargetsError
from athanor.models.base import CausalLM
from athanor.types import Batch

Objective = Callable[[CausalLM, Batch], tuple[Tensor, int, dict[str, Tensor]]]


@dataclass(frozen=True)
class StepResult:
    """What one update saw: mean loss, supervised targets, global gradient norm before clipping, metrics per target."""

    loss: float
    count: int
    grad_norm: float
    metrics: dict[str, float]


def train_step(
    model: CausalLM,
    objective: Objective,
    batches: Sequence[Batch],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    lr_factor: float,
    clip: float,
    precision: Precision,
) -> StepResult:
    """One update over all micro-batches together.

    Sums are accumulated and divided once by the count of all of them, on all ranks: the gradient does not depend on how
    targets are spread over micro-batches.

    Raises:
        NoTargetsError: nothing is supervised in the whole step.
        NonFiniteLossError: loss or gradient is inf or nan; the weights are untouched.
    """
    device = model.device
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    sums: dict[str, Tensor] = {}
    for batch in batches:
        with autocast(device, precision):
            loss, targets, metrics = objective(model, batch.to(device))
        if not torch.isfinite(loss):
            raise NonFiniteLossError(f"the loss of batch {batch.origin!r} is {loss.item()}")
        loss.backward()
        total += loss.detach()
        count += targets
        for name, value in metrics.items():
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=device)) + value
    total, counts = dist.all_reduce_sum(total), dist.all_reduce_sum(torch.tensor(count, device=device))
    count = int(counts)
    if count == 0:
        origins = ", ".join(batch.origin for batch in batches)
        raise NoTargetsError(f"no supervised target in the whole step (batches: {origins}): nothing can be learnt from it")
    params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in params if p.grad is not None]
    torch._foreach_mul_(grads, 1.0 / count)
    norm = torch.nn.utils.get_total_norm(grads)
    if not torch.isfinite(norm):
        raise NonFiniteLossError(f"the gradient norm is {norm.item()} over batches {', '.join(b.origin for b in batches)}")
    torch.nn.utils.clip_grads_with_norm_(params, clip, norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
        optimizer.step()
    return StepResult(
        loss=float(total) / count,
        count=count,
        grad_norm=float(norm),
        metrics={name: float(value) / count for name, value in sums.items()},
    )
