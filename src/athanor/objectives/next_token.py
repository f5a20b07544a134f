"""Next-token prediction: the negative log-likelihood of every supervised token."""

from __future__ import annotations

from torch import Tensor

from athanor.core.errors import NoTargetsError
from athanor.models.base import CausalLM
from athanor.nn.context import Packed
from athanor.types import IGNORE, Batch


def loss(model: CausalLM, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Sum over supervised positions of -log p(label | what came before it in its own sequence), in nats.

    While a mixture of experts is trained, count times its `router_loss` is added, so that it counts for as much as the mean.
    It is no sum over tokens: accumulated is whole (law L3) but for it.

    Returns:
        (sum, count, metrics): `correct` in metrics is how many labels were the model's first choice, `router_loss` what was
        added.

    Raises:
        NoTargetsError: nothing in the batch is supervised.
    """
    at = (batch.labels != IGNORE).nonzero().squeeze(1)
    if at.numel() == 0:
        raise NoTargetsError(
            f"batch {batch.origin!r}: all {batch.labels.numel()} labels are masked, so there is nothing to learn from it;"
            " check that its conversations have an assistant turn that was not cut off"
        )
    hidden = model.hidden(batch.ids.unsqueeze(0), Packed(batch.lengths)).squeeze(0)
    if at.numel() < batch.labels.numel():
        hidden = hidden.index_select(0, at)
    total, correct = model.cross_entropy(hidden, batch.labels[at])
    metrics = {"correct": correct}
    added = model.router_loss() if model.training else None
    if added is not None:
        total = total + added * at.numel()
        metrics["router_loss"] = added.detach() * at.numel()
    return total, at.numel(), metrics
