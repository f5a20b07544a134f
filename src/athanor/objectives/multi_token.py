"""Multi-token prediction (DeepSeek-AI 2024, section 2.2): the next token, and by further heads the tokens after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from athanor.core.errors import ConfigError
from athanor.nn.context import Packed
from athanor.objectives._sequences import Loss, supervised, with_router
from athanor.types import IGNORE, Batch

KINDS: tuple[str, ...] = ("decoder",)
NEEDS = ("mtp_hidden",)


@dataclass(frozen=True)
class Config:
    """Options of multi-token prediction.

    weight  what the mean loss of the further heads counts for: lambda of the paper, which began with 0.3 and ended with 0.1
    """

    weight: float = 0.3

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(f"weight ({self.weight}) must be above 0: 0.3 is usual, and next_token is without")


def ready(model: Any, config: Config, generator: torch.Generator) -> None:
    """Raises ConfigError for a model that was built or saved without further heads."""
    if model.ahead is None:
        raise ConfigError(
            f"multi_token needs heads for the tokens after the next and this {model.model_type} has none: build it with n_ahead"
            " above 0, or use next_token"
        )


def build(config: Config) -> Callable[[Any, Batch], Loss]:
    """The objective with these options."""

    def loss(model: Any, batch: Batch) -> Loss:
        """Sum over supervised positions i of -log p(label i), and weight / n_ahead of the sum over heads k and positions of
        -log p_k(label i + k), as far as there is one in the same sequence (equations 24 and 25).

        Every sum is divided by the number of next tokens, as in the paper. Metrics: `correct` next tokens that were the first
        choice, `ahead` the heads' sum over n_ahead, `ahead_correct` the same of their first choices; `router_loss` as in
        `next_token`.

        Raises:
            NoTargetsError: nothing in the batch is supervised. ConfigError: the model has no such heads.
        """
        at = supervised(batch, "give texts of two tokens or more")
        ctx = Packed(batch.lengths)
        ids = batch.ids.unsqueeze(0)
        hidden = model.hidden(ids, ctx)
        total, correct = model.cross_entropy(hidden[0].index_select(0, at), batch.labels[at])
        states = model.mtp_hidden(ids, hidden, ctx)
        ahead, right = total.new_zeros(()), correct.new_zeros(())
        for k, state in enumerate(states, 1):
            labels = _later(batch, k)
            known = (labels != IGNORE).nonzero().squeeze(1)
            if known.numel():
                part, first = model.cross_entropy(state[0].index_select(0, known), labels[known])
                ahead, right = ahead + part / len(states), right + first
            else:  # its gradient is zero, and there all the same: processes that share the work sum what each of them has
                ahead = ahead + 0.0 * state.float().sum()
        metrics = {"correct": correct, "ahead": ahead.detach(), "ahead_correct": right / len(states)}
        return with_router(model, total + config.weight * ahead, at.numel(), metrics)

    return loss


def _later(batch: Batch, k: int) -> Tensor:
    """labels[i + k] at position i, IGNORE where the sequence has ended by then: (N,)."""
    ends = torch.repeat_interleave(torch.cumsum(batch.lengths, 0), batch.lengths)
    inside = torch.arange(k, len(ends) + k, device=ends.device) < ends
    return torch.where(inside, batch.labels.roll(-k), IGNORE)
