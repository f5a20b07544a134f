"""One step on the longest batch that can come, before the first real one: what does not fit is found out at once.

On a CPU nothing says "out of memory": the kernel kills the process. So there the need is rehearsed on tensors without data and
compared with what is free, and refused with figures, before anything is computed.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from athanor.core.device import TrainPrecision, free_memory, rng_state, set_rng_state
from athanor.core.errors import NoTargetsError, TrainingError
from athanor.models.base import LanguageModel
from athanor.nn.moe import MixtureOfExperts
from athanor.optim.master import Masters
from athanor.train.budget_memory import resident
from athanor.train.budget_trace import UNFORESEEN, Live, rehearsing, shadow
from athanor.train.parallel.base import ALONE, Alone, Objective, local
from athanor.types import IGNORE, Batch

_LOWER = "lower batch_tokens or context, raise accumulate, or compute activations again (--checkpointing full)"


@dataclass(frozen=True)
class Dry:
    """What the step took.

    peak       bytes of tensors at its peak: weights, activations, gradients, and the optimiser's state even if yet to come
    resident   what the process is foreseen to grow by until then (CPU), holes of its heap included; the peak on other devices
    available  bytes that were free before; None where that is not known
    seconds    of forward and backward pass, tensors counted meanwhile (on CPUs that takes some milliseconds)
    """

    peak: int
    resident: int
    available: int | None
    seconds: float


def dry_step(
    model: LanguageModel,
    objective: Objective,
    optimizers: Sequence[torch.optim.Optimizer],
    batch: Batch,
    precision: TrainPrecision,
    strategy: Alone = ALONE,
) -> Dry:
    """Forward and backward pass of `batch`; weights, buffers, gradients, optimisers and random numbers stay what they were.

    Args:
        model: placed by the strategy, in the mode that it will be trained in.
        objective: what it is trained for.
        optimizers: of the model; nothing but the size of their state is asked.
        batch: the largest micro-batch that can come, its sequences the longest (`worst`).
        precision: of the matrix products.
        strategy: of processes; all of them call this together.

    Raises:
        TrainingError: it does not fit; says by how much where that is known, and what to lower.
        NoTargetsError: nothing in the batch is supervised.
    """
    if not bool((batch.labels != IGNORE).any()):
        raise NoTargetsError(f"batch {batch.origin!r} has no supervised target: a dry step needs one to have a backward pass")
    device, coming = model.device, state_to_come(optimizers)
    cpu, tokens, width = device.type == "cpu", batch.ids.numel(), model.config.d_model
    available = free_memory() if cpu else None
    what = f"a step of {tokens:,} tokens (longest sequence {int(batch.lengths.max()):,})"
    with _untouched(model):
        if type(strategy) is Alone and available is not None:
            need = resident(_need(model, objective, batch, precision) + coming, tokens, width)
            if need > available:
                raise TrainingError(
                    f"{what} needs about {need / 1e9:.2f} GB more, and {available / 1e9:.2f} GB are free: {_LOWER}"
                )
        start = time.perf_counter()
        try:
            made = _run(model, objective, batch, precision, strategy)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            said = " ".join(str(error).split())[:200]
            raise TrainingError(f"{what} does not fit into the memory of {device} ({said}): {_LOWER}") from None
        seconds = time.perf_counter() - start
    held = sum(x.untyped_storage().nbytes() for x in {id(x): x for x in (*model.parameters(), *model.buffers())}.values())
    grows = resident(made + coming, tokens, width) if cpu else made + coming
    return Dry(held + made + coming, grows, available, seconds)


def worst(batch_tokens: int, context: int, vocab_size: int, device: torch.device | None = None) -> Batch:
    """As many rows of `context` tokens as `batch_tokens` hold (one at least), every position supervised."""
    rows = max(1, batch_tokens // context)
    ids = torch.arange(rows * context, device=device) % vocab_size
    return Batch(ids, ids, torch.full((rows,), context, device=device), origin="dry step")


def _run(model: LanguageModel, objective: Objective, batch: Batch, precision: TrainPrecision, strategy: Alone) -> int:
    """Bytes that the passes made and held at once."""
    if model.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        strategy.accumulate(model, objective, [batch], precision)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with Live() as live:
        strategy.accumulate(model, objective, [batch], precision)
    return live.peak


def _need(model: LanguageModel, objective: Objective, batch: Batch, precision: TrainPrecision) -> int:
    """The same, rehearsed; 0 for an objective whose shapes hang on values."""
    with suppress(*UNFORESEEN), rehearsing() as live:
        twin = shadow(model, live)
        before = live.now
        live.restart()
        ALONE.accumulate(twin, objective, [batch], precision)
        return live.peak - before
    return 0


@contextmanager
def _untouched(model: LanguageModel) -> Iterator[None]:
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    said = [(m, m.last) for m in model.modules() if isinstance(m, MixtureOfExperts)]
    gradients = [(p, p.grad) for p in model.parameters()]
    random = rng_state()
    for p, _ in gradients:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in gradients:
            p.grad = grad
        for m, name, b, value in buffers:  # tables may have grown, counters counted
            m._buffers[name] = b.copy_(value)
        for m, last in said:
            m.last = last
        set_rng_state(random)


def state_to_come(optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Bytes of state that optimisers will have after a step and do not have yet: a step of each on tensors without data."""
    with rehearsing():
        twins = [_twin(optimizer) for optimizer in optimizers]
        for twin in twins:
            twin.step()
        then = sum(t.nbytes for twin in twins for t in _tensors(twin.state))
    return max(0, then - sum(t.nbytes for o in optimizers for t in _tensors(o.state)))


def _twin(optimizer: torch.optim.Optimizer, dtype: torch.dtype | None = None) -> torch.optim.Optimizer:
    """The optimiser before its first step, over new parameters that have gradients."""
    twin: torch.optim.Optimizer = object.__new__(type(optimizer))
    twin.__dict__ = dict(optimizer.__dict__)
    twin.state = defaultdict(dict)
    twin.param_groups = []
    for group in optimizer.param_groups:
        twins = [torch.empty(local(p).shape, dtype=dtype or p.dtype, device="cpu") for p in group["params"]]
        for t in twins:
            t.grad = torch.empty_like(t)
        twin.param_groups.append({**group, "params": twins})
    if isinstance(optimizer, Masters):
        twin.inner = _twin(optimizer.inner)  # type: ignore[attr-defined]  # a Masters has one
        for group in twin.inner.param_groups:  # type: ignore[attr-defined]
            for master in group["params"]:
                master.grad = None
    return twin


def _tensors(state: Any) -> list[Tensor]:
    return [x for x in tree_leaves(dict(state)) if isinstance(x, Tensor)]


def _out_of_memory(error: Exception) -> bool:
    said = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in said or "out of memory" in said
