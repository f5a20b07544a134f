"""From logits to tokens. Legend: R rows, V vocabulary.

The random number of a token is a hash of (seed, index of the token in its answer): the same request gives the same text
whatever else is in the batch, and a resumed run draws the same numbers with no generator state to restore.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from athanor.types import SamplingParams

GREEDY_BELOW = 1e-6  # a temperature so small divides logits into infinities and means greedy anyway


def uniform(seeds: Sequence[int], indices: Sequence[int]) -> Tensor:
    """A number in [0, 1) for each (seed, index), by the SplitMix64 finaliser (Steele et al. 2014); (R,) float64."""
    with np.errstate(over="ignore"):
        x = np.array([s & 0xFFFFFFFFFFFFFFFF for s in seeds], dtype=np.uint64)
        i = np.array(indices, dtype=np.uint64)
        for constant in (np.uint64(0x9E3779B97F4A7C15), i * np.uint64(0xD1B54A32D192ED03) + np.uint64(1)):
            x = x + constant
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def truncate(logprobs: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Set to -inf what lies outside the top_k most probable tokens, then what lies outside the smallest set that reaches top_p.

    The probabilities that are to reach top_p are those that top_k has left, renormalised (as in transformers and vLLM).

    Args:
        logprobs: (R, V).
        top_p: (R,) in (0, 1].
        top_k: (R,) int64, V for all.
    """
    ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
    drop = torch.arange(logprobs.shape[-1], device=logprobs.device) >= top_k[:, None]
    probs = ordered.exp().masked_fill_(drop, 0)
    reached = probs.cumsum(-1)
    # What is more probable than this token has reached top_p without it.
    drop |= (reached - probs >= top_p[:, None] * reached[:, -1:]) & (top_p[:, None] < 1)
    drop[:, 0] = False
    return torch.empty_like(logprobs).scatter_(-1, order, ordered.masked_fill_(drop, -torch.inf))


def sample(logits: Tensor, params: Sequence[SamplingParams], indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One token for each row, and its log-probability under softmax(logits / temperature), untruncated.

    Args:
        logits: (R, V) float32.
        params: one per row; temperature 0 takes the most probable token (its log-probability is at temperature 1).
        indices: how many tokens each row has produced already.

    Returns:
        tokens (R,) int64 and logprobs (R,) float32.
    """
    device, vocab = logits.device, logits.shape[-1]
    greedy = torch.tensor([p.temperature < GREEDY_BELOW for p in params], device=device)
    temperature = torch.tensor([1.0 if p.temperature < GREEDY_BELOW else p.temperature for p in params], device=device)
    logprobs = torch.log_softmax(logits.float() / temperature[:, None], -1)
    if bool(greedy.all()):
        tokens = logprobs.argmax(-1)
    else:
        allowed = logprobs
        if any(p.top_p < 1 or p.top_k for p in params):
            top_p = torch.tensor([p.top_p for p in params], device=device)
            top_k = torch.tensor([p.top_k or vocab for p in params], device=device)
            allowed = truncate(logprobs, top_p, top_k)
        cumulative = allowed.exp().cumsum(-1)
        point = uniform([p.seed for p in params], indices).to(device, torch.float32) * cumulative[:, -1]
        # The first token whose cumulative probability passes the point. Past the last one lies only rounding.
        tokens = torch.searchsorted(cumulative, point[:, None], right=True).squeeze(1).clamp_(max=vocab - 1)
        tokens = torch.where(allowed.gather(1, tokens[:, None]).squeeze(1).isinf() | greedy, logprobs.argmax(-1), tokens)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)
