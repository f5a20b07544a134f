"""Clipped policy gradient (PPO's surrogate, Schulman et al. 2017) with group-relative advantages (GRPO, Shao et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from athanor.core.device import Precision, autocast
from athanor.core.errors import ConfigError, DataError, NoTargetsError
from athanor.models.base import CausalLM
from athanor.nn.context import Packed
from athanor.types import IGNORE, Batch

DATA = "rollouts"


@dataclass(frozen=True)
class PolicyConfig:
    """The surrogate's constants.

    clip_low    the ratio counts no further down than 1 - clip_low
    clip_high   nor further up than 1 + clip_high (above clip_low: "clip higher" of DAPO)
    kl          weight of the k3 estimate of KL(policy || reference); 0 needs no reference
    normalise   token: mean over all tokens of the step (DAPO); sequence: mean of each answer's mean (GRPO as published)
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    kl: float = 0.0
    normalise: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        if not (0 < self.clip_low < 1 and self.clip_high > 0):
            raise ConfigError(f"clip_low ({self.clip_low}) must lie in (0, 1) and clip_high ({self.clip_high}) above 0")
        if not self.kl >= 0:
            raise ConfigError(f"kl ({self.kl}) must not be negative")
        if self.normalise not in ("token", "sequence"):
            raise ConfigError(f"normalise ({self.normalise!r}) must be 'token' or 'sequence'")


Loss = Callable[[CausalLM, Batch], tuple[Tensor, int, dict[str, Tensor]]]


def build(config: PolicyConfig) -> Loss:
    """The objective for these constants. It reads, in `batch.extras`, each (N,):

    old_logprobs   log-probability with which the token was drawn
    advantages     advantage of the answer that the token belongs to
    temperature    temperature at which it was drawn
    ref_logprobs   only when kl > 0: log-probability under the reference
    """
    needed = ("old_logprobs", "advantages", "temperature") + (("ref_logprobs",) if config.kl > 0 else ())

    def loss(model: CausalLM, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Sum of -min(r A, clip(r) A) + kl * k3, with r = exp(logprob - old_logprob).

        Metrics: `ratio_gap` |logprob - old_logprob| (0 on policy, law L6), `clipped`, `entropy`, `kl`; each summed with
        the loss's own weights.

        Raises:
            NoTargetsError: no answer token in the batch.
            DataError: the batch lacks an extra.
        """
        missing = [name for name in needed if name not in batch.extras]
        if missing:
            raise DataError(
                f"batch {batch.origin!r} lacks extras {', '.join(missing)}, which are read when kl is {config.kl}: add them"
            )
        at = (batch.labels != IGNORE).nonzero().squeeze(1)
        if at.numel() == 0:
            raise NoTargetsError(f"batch {batch.origin!r}: no answer token to learn from; the rollouts are empty")
        extras = {name: values[at] for name, values in batch.extras.items()}
        hidden = model.hidden(batch.ids.unsqueeze(0), Packed(batch.lengths)).squeeze(0).index_select(0, at)
        logprobs, entropy = model.token_logprobs(hidden, batch.labels[at], extras["temperature"])
        difference = logprobs - extras["old_logprobs"]
        ratio = difference.exp()
        advantages = extras["advantages"]
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        per_token = -torch.minimum(ratio * advantages, clipped * advantages)
        k3 = torch.zeros_like(per_token)
        if config.kl > 0:
            gap = extras["ref_logprobs"] - logprobs
            k3 = gap.exp() - gap - 1
            per_token = per_token + config.kl * k3
        weights, count = _weights(batch, at, config.normalise)
        with torch.no_grad():
            outside = (ratio * advantages > clipped * advantages).float()
            metrics = {
                "ratio_gap": (difference.abs() * weights).sum(),
                "clipped": (outside * weights).sum(),
                "entropy": (entropy * weights).sum(),
                "kl": (k3 * weights).sum(),
            }
        return (per_token * weights).sum(), count, metrics

    return loss


@torch.no_grad()
def add_reference(reference: CausalLM, batch: Batch, precision: Precision) -> None:
    """Put the reference's log-probabilities into `batch.extras["ref_logprobs"]`, (N,), for the KL term."""
    on = batch.to(reference.device)
    at = (on.labels != IGNORE).nonzero().squeeze(1)
    with autocast(reference.device, precision):
        hidden = reference.hidden(on.ids.unsqueeze(0), Packed(on.lengths)).squeeze(0).index_select(0, at)
        logprobs, _ = reference.token_logprobs(hidden, on.labels[at], on.extras["temperature"][at])
    batch.extras["ref_logprobs"] = torch.zeros_like(on.extras["old_logprobs"]).index_copy_(0, at, logprobs)


def _weights(batch: Batch, at: Tensor, normalise: str) -> tuple[Tensor, int]:
    """Weight of each answer token, and the count that the sum is divided by."""
    if normalise == "token":
        return torch.ones(at.numel(), device=at.device), at.numel()
    sequence = torch.repeat_interleave(torch.arange(len(batch.lengths), device=at.device), batch.lengths)[at]
    tokens = torch.bincount(sequence, minlength=len(batch.lengths))
    return 1.0 / tokens[sequence].float(), int((tokens > 0).sum())
