"""Next-token prediction: the negative log-likelihood of every supervised token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from athanor.models.base import CausalLM
from athanor.nn.context import Packed
from athanor.objectives._sequences import Loss, check_smoothing, cross_entropy, supervised, with_router
from athanor.types import Batch

KINDS: tuple[str, ...] = ("decoder",)


@dataclass(frozen=True)
class Config:
    """Options of next-token prediction.

    smoothing  how much of a target's probability is spread over the vocabulary while training; None is what the model says
    """

    smoothing: float | None = None

    def __post_init__(self) -> None:
        check_smoothing(self.smoothing)


def loss(model: CausalLM, batch: Batch, smoothing: float | None = None) -> Loss:
    """Sum over supervised positions of -log p(label | what came before it in its own sequence), in nats.

    While a mixture of experts is trained, count times its `router_loss` is added, so that it counts for as much as the mean.
    It is no sum over tokens: accumulated is whole (law L3) but for it.

    Returns:
        (sum, count, metrics): `correct` in metrics is how many labels were the model's first choice, `router_loss` what was
        added.

    Raises:
        NoTargetsError: nothing in the batch is supervised.
    """
    at = supervised(batch, "check that its conversations have an assistant turn that was not cut off")
    hidden = model.hidden(batch.ids.unsqueeze(0), Packed(batch.lengths)).squeeze(0)
    if at.numel() < batch.labels.numel():
        hidden = hidden.index_select(0, at)
    total, correct = cross_entropy(model, hidden, batch.labels[at], smoothing)
    return with_router(model, total, at.numel(), {"correct": correct})


def build(config: Config) -> Callable[[CausalLM, Batch], Loss]:
    """`loss` with these options."""
    return partial(loss, smoothing=config.smoothing)
