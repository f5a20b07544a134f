"""Routers of mixtures of experts (`moe.py`): which experts compute a token, and with what weights.

Legend: N tokens, D width, E experts, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athanor.core.errors import ConfigError


class Routing(NamedTuple):
    """What a router says of N tokens.

    experts  (N, k) int64, the experts of each token, no two the same
    weights  (N, k), what the output of each is multiplied with
    logits   (N, E) float32
    """

    experts: Tensor
    weights: Tensor
    logits: Tensor


class Router(nn.Module):
    """Base of routers: x (N, D) -> Routing.

    Args:
        dim: D.
        n_experts: E.
        k: experts of a token.
        bias: whether logits have one.
    """

    def __init__(self, dim: int, n_experts: int, k: int, bias: bool = False) -> None:
        super().__init__()
        if not 1 <= k <= n_experts:
            raise ConfigError(f"a token cannot have {k} of {n_experts} experts: use 1 to {n_experts}")
        self.n_experts, self.k = n_experts, k
        self.weight = nn.Parameter(torch.empty(n_experts, dim))
        self.bias = nn.Parameter(torch.empty(n_experts)) if bias else None
        nn.init.normal_(self.weight, std=dim**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _logits(self, x: Tensor, exact: bool) -> Tensor:
        if not exact:
            return F.linear(x, self.weight, self.bias).float()
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())

    def probabilities(self, logits: Tensor) -> Tensor:
        """How much of a token each expert would get: (N, E) -> (N, E), rows sum to one."""
        raise NotImplementedError  # every router defines it


class SoftmaxRouter(Router):
    """The k experts of the largest probabilities p = softmax(W x), weighted by these (Shazeer et al. 2017, Jiang et al. 2024).

    Args:
        dim, n_experts, k, bias: see `Router`.
        normalise: whether the k weights are divided by their sum.
        exact: whether logits are computed in float32 whatever the dtype of x (Fedus et al. 2021, section 2.4).
        jitter: while training, what the router reads is multiplied by noise from [1 - jitter, 1 + jitter].
    """

    def __init__(
        self,
        dim: int,
        n_experts: int,
        k: int,
        *,
        normalise: bool = False,
        bias: bool = False,
        exact: bool = False,
        jitter: float = 0.0,
    ) -> None:
        super().__init__(dim, n_experts, k, bias)
        if not 0 <= jitter < 1:
            raise ConfigError(f"jitter ({jitter}) must lie in [0, 1): 0.01 is usual")
        self.normalise, self.exact, self.jitter = normalise, exact, jitter

    def forward(self, x: Tensor) -> Routing:
        read = x
        if self.jitter and self.training:  # in float32: between 0.99 and 1 there are two numbers of bfloat16, and none up to 1.01
            read = x.float() * torch.empty_like(x, dtype=torch.float32).uniform_(1 - self.jitter, 1 + self.jitter)
            read = read if self.exact else read.to(x.dtype)
        logits = self._logits(read, self.exact)
        if self.normalise:
            # softmax over the k best is softmax over all, divided by the sum of these.
            best, experts = logits.topk(self.k, dim=-1)
            return Routing(experts, torch.softmax(best, -1).to(x.dtype), logits)
        weights, experts = torch.softmax(logits, -1).topk(self.k, dim=-1)
        return Routing(experts, weights.to(x.dtype), logits)

    def probabilities(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits, -1)


class SigmoidRouter(Router):
    """Scores s = sigmoid(W x) in float32; the k experts of the largest s + b; weights s, with b a bias that no gradient changes.

    Experts are split into groups of E / n_groups; only the `top_groups` groups whose two largest s + b sum to most are chosen
    from, so that a token visits few machines. `balance` changes b (DeepSeek-V3, 2024, sections 2.1.2 and 3.2.2).

    Args:
        dim, n_experts, k: see `Router`.
        n_groups: divides E.
        top_groups: how many of them a token may choose from.
        normalise: whether the k weights are divided by their sum.
        scale: what weights are multiplied with.
    """

    e_score_correction_bias: Tensor  # b, by its name in files

    def __init__(
        self,
        dim: int,
        n_experts: int,
        k: int,
        *,
        n_groups: int = 1,
        top_groups: int = 1,
        normalise: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__(dim, n_experts, k)
        self.register_buffer("e_score_correction_bias", torch.zeros(n_experts, dtype=torch.float32))
        check_groups(n_experts, k, n_groups, top_groups)
        self.n_groups, self.top_groups, self.normalise, self.scale = n_groups, top_groups, normalise, scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SigmoidRouter:
        # Steps of 0.001 would be lost in bfloat16: the bias follows to another device, never to another dtype.
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype != bias.dtype:
            self.e_score_correction_bias = bias.to(moved.device)
        return self

    def forward(self, x: Tensor) -> Routing:
        logits = self._logits(x, exact=True)
        scores = logits.sigmoid()
        experts = self._choose(scores.detach())
        weights = scores.gather(1, experts)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts, (weights * self.scale).to(x.dtype), logits)

    def _choose(self, scores: Tensor) -> Tensor:  # (N, E) -> (N, k)
        biased = scores + self.e_score_correction_bias
        if self.top_groups < self.n_groups:
            groups = biased.view(-1, self.n_groups, self.n_experts // self.n_groups)
            best = groups.topk(2, dim=-1).values.sum(-1).topk(self.top_groups, dim=-1, sorted=False).indices
            closed = torch.ones(best.shape[0], self.n_groups, dtype=torch.bool, device=best.device).scatter_(1, best, False)
            biased = groups.masked_fill(closed.unsqueeze(-1), -torch.inf).view_as(biased)
        return biased.topk(self.k, dim=-1, sorted=False).indices

    def probabilities(self, logits: Tensor) -> Tensor:
        scores = logits.sigmoid()
        return scores / scores.sum(-1, keepdim=True)


def check_groups(n_experts: int, k: int, n_groups: int, top_groups: int) -> None:
    """Raise ConfigError where groups of experts do not come out even or leave a token too few experts."""
    if n_groups < 1 or n_experts % n_groups or (n_groups > 1 and n_experts // n_groups < 2):
        fits = [g for g in range(1, n_experts + 1) if n_experts % g == 0 and (g == 1 or n_experts // g >= 2)]
        raise ConfigError(
            f"n_groups ({n_groups}) must split n_experts ({n_experts}) into equal groups of at least two:"
            f" use one of {', '.join(map(str, fits))}"
        )
    size = n_experts // n_groups
    if not 1 <= top_groups <= n_groups or top_groups * size < k:
        raise ConfigError(
            f"top_groups ({top_groups}) must be at most n_groups ({n_groups}) and leave a token its {k} experts, with {size} in a"
            f" group: use {max(1, -(-k // size))} to {n_groups}"
        )


def within_capacity(experts: Tensor, owner: Tensor, capacity: int, n_experts: int) -> Tensor:
    """Which choices an expert has room for: of each sequence it takes the first `capacity`, in the order of the tokens.

    Args:
        experts: (N, k) int64.
        owner: (N,) int64, the sequence of each token.
        capacity: tokens that one expert takes of one sequence.
        n_experts: E.

    Returns:
        (N, k) bool.
    """
    group = (owner.unsqueeze(1) * n_experts + experts).flatten()
    ordered, order = torch.sort(group, stable=True)
    # How many of a group came before: places in the order less the place of the group's first.
    before = torch.arange(len(group), device=group.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(group, dtype=torch.bool).scatter_(0, order, before < capacity).view_as(experts)
