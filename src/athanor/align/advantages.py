"""Advantages. Legend: P prompts, G answers to each (a group)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from athanor.core.errors import ConfigError

Scale = Literal["std", "none"]


def group_relative(rewards: Tensor, scale: Scale = "std") -> Tensor:
    """How much better an answer is than its group: (r - mean) / (std + 1e-4), or r - mean with scale "none".

    Shao et al. 2024 (GRPO, std with G - 1 in the denominator); Liu et al. 2025 (Dr. GRPO, no scale).

    Args:
        rewards: (P, G), G >= 2.
        scale: "std" or "none".

    Returns:
        (P, G); all zero in a dead group (equal rewards).

    Raises:
        ConfigError: fewer than two answers a group.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ConfigError(f"rewards of shape {tuple(rewards.shape)} must be (prompts, group) with a group of 2 or more")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    centred = centred.masked_fill(dead(rewards)[:, None], 0)  # rounding of the mean, which a std of nearly 0 would blow up
    if scale == "none":
        return centred
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-4)


def dead(rewards: Tensor) -> Tensor:
    """Which groups teach nothing, all their answers having earned the same: (P, G) -> (P,) bool."""
    return (rewards == rewards[:, :1]).all(dim=1)
