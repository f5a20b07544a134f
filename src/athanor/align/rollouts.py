"""Rollouts: prompts to the engine, answers to the rewards, and what they teach as a batch for `fit` (law L6).

Tokens go from the engine to the trainer as they are; nothing is decoded and encoded again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from athanor.align.advantages import Scale, dead, group_relative
from athanor.core.errors import ConfigError
from athanor.infer.engine import Engine
from athanor.types import IGNORE, Batch, Completion, Request, Rollout, SamplingParams

Reward = Callable[[int, Completion], Rollout]


@dataclass(frozen=True)
class Group:
    """G answers to one prompt."""

    rollouts: tuple[Rollout, ...]

    @property
    def rewards(self) -> list[float]:
        return [r.reward for r in self.rollouts]


def roll_out(
    engine: Engine, prompts: Sequence[Sequence[int]], group_size: int, params: SamplingParams, reward: Reward
) -> list[Group]:
    """`group_size` answers to each prompt, rewarded.

    Answer g to prompt p is drawn with seed hash(params.seed, p, g): the same seed gives the same rollouts.

    Args:
        engine: over the policy's own model.
        prompts: P lists of ids.
        group_size: G.
        params: of sampling; `seed` is the seed of the whole call.
        reward: (index of the prompt, completion) -> Rollout.
    """
    requests = []
    for p, ids in enumerate(prompts):
        for g in range(group_size):
            seed = (params.seed * 1_000_003 + p) * 1_009 + g
            requests.append(Request(f"{p}/{g}", ids, replace(params, seed=seed)))
    completions = engine.generate(requests)
    groups = []
    for p in range(len(prompts)):
        own_answers = completions[p * group_size : (p + 1) * group_size]
        groups.append(Group(tuple(reward(p, c) for c in own_answers)))
    return groups


def to_batch(groups: Sequence[Group], temperature: float, scale: Scale, origin: str) -> tuple[Batch, int]:
    """The batch that the policy-gradient objective reads, and how many groups are dead.

    Dead groups have advantage 0 everywhere and are left out, so that no time is spent on them (dynamic sampling, Yu et
    al. 2025), unless all are dead: then they stay, and the gradient is zero.

    Raises:
        ConfigError: temperature 0: greedy answers are not drawn from the policy, so they have no ratio to it.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature ({temperature}) must be positive to learn from rollouts: use 0.7 or 1")
    rewards = torch.tensor([g.rewards for g in groups])
    advantages = group_relative(rewards, scale)
    lifeless = dead(rewards)
    keep = [p for p in range(len(groups)) if not lifeless[p]] or list(range(len(groups)))
    ids: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    old: list[float] = []
    spread: list[float] = []
    for p in keep:
        for g, rollout in enumerate(groups[p].rollouts):
            c = rollout.completion
            sequence = [*c.prompt_ids, *c.ids]
            masked = len(c.prompt_ids) - 1
            ids += sequence[:-1]
            labels += [IGNORE] * masked + list(c.ids)
            old += [0.0] * masked + list(c.logprobs)
            spread += [float(advantages[p, g])] * (len(sequence) - 1)
            lengths.append(len(sequence) - 1)
    n = len(ids)
    extras: dict[str, Tensor] = {
        "old_logprobs": torch.tensor(old),
        "advantages": torch.tensor(spread),
        "temperature": torch.full((n,), temperature),
    }
    return Batch(torch.tensor(ids), torch.tensor(labels), torch.tensor(lengths), extras, origin), int(lifeless.sum())


def summarise(groups: Sequence[Group]) -> dict[str, float]:
    """Means over all answers: `reward`, each of its parts, and `length` in tokens."""
    rollouts = [r for g in groups for r in g.rollouts]
    parts = {name: fmean(r.parts[name] for r in rollouts) for name in rollouts[0].parts}
    return {"reward": fmean(r.reward for r in rollouts), **parts, "length": fmean(len(r.completion.ids) for r in rollouts)}
