"""What the training loop asks of a layout, and the simplest answer: one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from athanor.core.device import TrainPrecision, autocast, default_device
from athanor.core.errors import NonFiniteLossError
from athanor.models.base import LanguageModel
from athanor.train.pieces import Held, whole
from athanor.types import Batch

# (model, batch) -> loss sum (scalar, float32), targets it is of, sums of other figures; it says itself what models it takes.
Objective = Callable[[Any, Batch], tuple[Tensor, int, dict[str, Tensor]]]


@dataclass
class Sums:
    """What an objective said of all micro-batches, on all processes once `Strategy.reduce` ran: sums, not means.

    divided  whether the gradients are of the mean already
    """

    loss: Tensor  # float64 scalar
    count: int = 0
    metrics: dict[str, Tensor] = field(default_factory=dict)
    divided: bool = False

    def add(self, loss: Tensor, count: int, metrics: dict[str, Tensor]) -> None:
        """Count what one micro-batch gave."""
        self.loss += loss.detach()
        self.count += count
        for name, value in metrics.items():
            self.metrics[name] = self.metrics.get(name, torch.zeros_like(self.loss)) + value


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is in this process's memory; gradients find their way back."""
    own = getattr(tensor, "to_local", None)  # of a DTensor
    return tensor if own is None else own()


class Alone:
    """One process. Also the base of every other strategy, which says in `place` what it does to the model.

    Attributes:
        ranks: processes that take different data.
        seconds: spent on communication since the start.
        device: where this process computes.
    """

    ranks: int = 1
    rank: int = 0
    seconds: float = 0.0

    @property
    def device(self) -> torch.device:
        return default_device()

    def place(self, model: LanguageModel) -> LanguageModel:
        """The model as this process trains it, changed in place; its tensors keep their names."""
        return model

    def share(self, micro: Sequence[Batch]) -> list[Batch]:
        """What of the micro-batches of a step this process computes; as many on every process."""
        return list(micro)

    def accumulate(
        self, model: LanguageModel, objective: Objective, micro: Sequence[Batch], precision: TrainPrecision, scale: float = 1.0
    ) -> Sums:
        """Add the gradients of the summed loss, times `scale`, to those of the parameters.

        Raises NonFiniteLossError naming the batch.
        """
        device = model.device
        sums = Sums(torch.zeros((), dtype=torch.float64, device=device))
        for batch in micro:
            with autocast(device, precision):
                loss, count, metrics = objective(model, batch.to(device))
            if not torch.isfinite(loss):
                raise NonFiniteLossError(f"the loss of batch {batch.origin!r} is {loss.item()}")
            sums.add(loss, count, metrics)
            # Of the only micro-batch the count is known: one pass over all gradients less.
            sums.divided = len(micro) == 1 and scale == 1.0 and count > 0
            (loss / count if sums.divided else loss if scale == 1.0 else loss * scale).backward()
        return sums

    def reduce(self, model: LanguageModel, sums: Sums) -> Sums:
        """Make gradients and sums those of all processes together."""
        return sums

    @torch.no_grad()
    def evaluate(self, model: LanguageModel, objective: Objective, micro: Sequence[Batch], precision: TrainPrecision) -> Sums:
        """What an objective says of batches, of all processes together; the model is in the mode that it is in."""
        sums = Sums(torch.zeros((), dtype=torch.float64, device=model.device))
        for batch in micro:
            with autocast(model.device, precision):
                sums.add(*objective(model, batch.to(model.device)))
        return sums

    def norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """The norm of all gradients of all processes together, a scalar."""
        norm: Tensor = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return norm

    def count(self, model: LanguageModel) -> None:
        """Make what a model counted since the last update (the load of experts) that of all processes."""

    def held(self, name: str, tensor: Tensor) -> Held:
        """What this process holds of the tensor of a parameter or buffer (or of its optimiser's state) of that name."""
        return whole(tensor)


ALONE = Alone()
