"""Mixtures of experts: routers, experts, capacity, and what keeps experts equally busy.

`MixtureOfExperts(router, experts, shared=, capacity=)` stands where a feed-forward block stands. A router says for each token
which k experts compute it and with what weights; the experts compute their tokens group by group.

| router                               | scores            | experts of a token                              | used by         |
| ------------------------------------ | ----------------- | ----------------------------------------------- | --------------- |
| SoftmaxRouter(.., k, normalise=)     | softmax of logits | the k best                                      | Mixtral, Qwen 3 |
| SoftmaxRouter(.., 1, exact=, jitter=) | the same, float32 | the best one                                    | Switch          |
| SigmoidRouter                        | sigmoids          | the k best of the best groups, biased to balance | DeepSeek-V3     |

With `capacity` an expert computes at most so many tokens of a sequence, the first to arrive; what is over capacity is counted and
contributes nothing, so that the residual stream carries it past. Without it nothing is dropped.

After a forward pass `aux_losses(model)` gives the losses that balance, with gradients; while training every layer adds up `load`,
the tokens that each expert was chosen for, and `dropped`, until `usage(model)` is read or `balance(model, speed)` starts anew.

Legend: N tokens, D width, E experts, F inner width of an expert, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from athanor.core.errors import ConfigError
from athanor.nn.experts import Experts
from athanor.nn.routing import Router, Routing, SigmoidRouter, SoftmaxRouter, check_groups, within_capacity

__all__ = [
    "Experts",
    "MixtureOfExperts",
    "Router",
    "Routing",
    "SigmoidRouter",
    "SoftmaxRouter",
    "Usage",
    "after_step",
    "aux_losses",
    "balance",
    "check_groups",
    "load_balance_loss",
    "mixtures",
    "router_z_loss",
    "usage",
    "within_capacity",
]


class MixtureOfExperts(nn.Module):
    """sum over the experts e of a token of weight_e expert_e(x), plus shared(x).

    Args:
        router: chooses.
        experts: compute.
        shared: a feed-forward block for all tokens (DeepSeekMoE, Dai et al. 2024).
        capacity: tokens that one expert takes of one sequence; None for all.

    Attributes:
        last: what the router said in the last forward pass; None before.
        load: (E,) int64, how many tokens chose each expert since `reset`, while training.
        dropped: int64, how many choices were over capacity since then.
    """

    load: Tensor
    dropped: Tensor

    def __init__(self, router: Router, experts: Experts, shared: nn.Module | None = None, capacity: int | None = None) -> None:
        super().__init__()
        if capacity is not None and capacity < 1:
            raise ConfigError(f"the capacity of an expert ({capacity}) must be at least 1 token, or None for all")
        self.router, self.experts, self.shared, self.capacity = router, experts, shared, capacity
        self.last: Routing | None = None
        self.register_buffer("load", torch.zeros(router.n_experts, dtype=torch.int64, device="cpu"), persistent=False)
        self.register_buffer("dropped", torch.zeros((), dtype=torch.int64, device="cpu"), persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no forward pass behind it, and tensors with a graph cannot be copied.
        return self.__dict__ | {"last": None}

    def forward(self, x: Tensor, owner: Tensor | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D).

        `owner` (B, T) int64 says which sequence a token is of, for capacities; each row is one by default.
        """
        flat = x.reshape(-1, x.shape[-1])
        routing = self.last = self.router(flat)
        experts = routing.experts
        if self.training:
            self.load.index_add_(0, experts.flatten(), torch.ones_like(experts.flatten()))
        if self.capacity is not None:
            if owner is None:
                owner = torch.arange(x.shape[0], device=x.device).unsqueeze(1).expand(x.shape[:2])
            kept = within_capacity(experts, owner.flatten(), self.capacity, self.router.n_experts)
            if self.training:
                self.dropped.add_((~kept).sum())
            experts = experts.masked_fill(~kept, self.router.n_experts)
        out = self.experts(flat, experts, routing.weights, self.capacity is None)
        if self.shared is not None:
            out = out + self.shared(flat)
        return out.view_as(x)

    def reset(self) -> None:
        """Start counting anew."""
        self.load.zero_()
        self.dropped.zero_()


def load_balance_loss(probabilities: Sequence[Tensor], experts: Sequence[Tensor]) -> Tensor:
    """E times the sum over experts of f_e P_e (Fedus et al. 2021, eq. 4 to 6, for k experts of a token as Mixtral's).

    f_e is the share of tokens that chose e and P_e the mean of its probability, both over the tokens of all layers: k where the
    load is even, up to E where all tokens choose the same. Gradients come from P.

    Args:
        probabilities: of each layer (N, E).
        experts: of each layer (N, k).
    """
    n_experts = probabilities[0].shape[1]
    tokens = max(1, sum(p.shape[0] for p in probabilities))
    chosen = torch.stack([torch.bincount(e.flatten(), minlength=n_experts) for e in experts]).sum(0)
    mean = torch.stack([p.sum(0) for p in probabilities]).sum(0) / tokens
    return n_experts * (chosen / tokens * mean).sum()


def router_z_loss(logits: Sequence[Tensor]) -> Tensor:
    """The mean over tokens (of all layers) of log(sum of exp(logits))^2, which keeps logits small (ST-MoE, Zoph et al. 2022).

    Args:
        logits: of each layer (N, E).
    """
    squares = torch.cat([x.logsumexp(-1) for x in logits]).square()
    return squares.sum() / max(1, len(squares))


def mixtures(model: nn.Module) -> list[MixtureOfExperts]:
    """The mixtures of experts of a model, in order. Raises ConfigError when there is none."""
    found = [m for m in model.modules() if isinstance(m, MixtureOfExperts)]
    if not found:
        raise ConfigError(f"{type(model).__module__} has no mixture of experts: ask this of a model that has, such as mixtral")
    return found


def aux_losses(model: nn.Module) -> dict[str, Tensor]:
    """`load_balance` and `router_z` of the last forward pass, with gradients; how much they count for is the caller's.

    All tokens of the pass count, padding among them: lay sequences end to end. Neither loss is a sum over tokens, so accumulated
    is not whole (law L3): each is that of the tokens which went through the model together.

    Raises:
        ConfigError: a model without mixtures, or before a forward pass.
    """
    layers = [m for m in mixtures(model) if m.last is not None]
    said = [m.last for m in layers if m.last is not None]
    if not said:
        raise ConfigError("the router has not seen a token yet: ask for its losses after a forward pass")
    probabilities = [m.router.probabilities(x.logits) for m, x in zip(layers, said, strict=True)]
    return {
        "load_balance": load_balance_loss(probabilities, [x.experts for x in said]),
        "router_z": router_z_loss([x.logits for x in said]),
    }


class Usage(NamedTuple):
    """What experts had to do while training.

    load     (L, E) int64, for each layer with experts how many tokens chose each
    dropped  (L,) int64, how many of these choices were over capacity
    """

    load: Tensor
    dropped: Tensor


def usage(model: nn.Module) -> Usage:
    """What was counted since the last `usage` or `balance`, which then starts anew. Raises ConfigError without mixtures."""
    layers = mixtures(model)
    found = Usage(torch.stack([m.load for m in layers]), torch.stack([m.dropped for m in layers]))
    for m in layers:
        m.reset()
    return found


def after_step(model: nn.Module) -> dict[str, float]:
    """What a training loop does after an update: biases of routers move (`balance`), and what experts did is told.

    Returns:
        {} for a model without mixtures; else, of all its layers, `expert_load_max` and `expert_load_min`, the greatest and the
        smallest load of an expert as a share of the mean load, and `experts_dropped`, the share of choices over capacity.
    """
    layers = [m for m in model.modules() if isinstance(m, MixtureOfExperts)]
    if not layers:
        return {}
    found = balance(model) if any(isinstance(m.router, SigmoidRouter) for m in layers) else usage(model)
    load = found.load.double()
    share = load / load.mean(1, keepdim=True).clamp(min=1)
    dropped = found.dropped.sum() / load.sum().clamp(min=1)
    return {
        "expert_load_max": float(share.max()),
        "expert_load_min": float(share.min()),
        "experts_dropped": float(dropped),
    }


@torch.no_grad()
def balance(model: nn.Module, speed: float = 1e-3) -> Usage:
    """b_e += speed sign(mean load - load_e) for every expert: overloaded ones are chosen less (DeepSeek-V3, 2024, section 2.1.2).

    For the end of a training step; loads are those since the last call. Nothing else moves these biases.

    Raises:
        ConfigError: a speed that is not positive; a model without bias-balanced routers.
    """
    if not speed > 0:
        raise ConfigError(f"the speed of balancing ({speed}) must be positive: 0.001 is usual")
    layers = mixtures(model)
    biased = [m for m in layers if isinstance(m.router, SigmoidRouter)]
    if not biased:
        raise ConfigError("no router of this model has a bias that balances: use aux_losses, or a model such as deepseek_v3")
    for m in biased:
        load = m.load.float()
        bias: Tensor = m.router.e_score_correction_bias  # type: ignore[assignment]  # a SigmoidRouter's
        bias += speed * torch.sign(load.mean() - load)
    return usage(model)
