"""From logits to tokens. Legend: R rows, V vocabulary.

The random number of a token is a hash of (seed, index of the token in its answer): the same request gives the same text
whatever else is in the batch, and a resumed run draws the same numbers with no generator state to restore.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from athanor.types import SamplingParams, TokenLogprob

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


class Row(NamedTuple):
    """What the next token of one sequence depends on beside its logits.

    params   of its request
    banned   tokens that may not come (ends before min_tokens, last tokens of bad words)
    allowed  (V,) bool: tokens that may; None for all
    prompt   tokens of its prompt; `repetition_penalty` alone reads them
    ids      tokens that it has made
    """

    params: SamplingParams
    banned: Sequence[int] = ()
    allowed: Tensor | None = None
    prompt: Sequence[int] = ()
    ids: Sequence[int] = ()

    @property
    def changed(self) -> bool:
        """Whether its logits are changed before anything is chosen."""
        p = self.params
        penalised = p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty
        return bool(penalised or p.logit_bias or p.allowed_ids is not None or self.banned or self.allowed is not None)


def change(logits: Tensor, row: Row) -> Tensor:
    """The logits (V,) that are sampled from: biased, without forbidden tokens, penalised (see `SamplingParams`)."""
    p, z = row.params, logits.clone()

    def ids(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=z.device)

    if p.logit_bias:
        z.index_add_(0, ids([i for i, _ in p.logit_bias]), torch.tensor([b for _, b in p.logit_bias], device=z.device))
    if p.allowed_ids is not None:
        kept = torch.full_like(z, -torch.inf)
        z = kept.index_copy_(0, ids(p.allowed_ids), z[ids(p.allowed_ids)])
    if row.banned:
        z[ids(row.banned)] = -torch.inf
    if row.allowed is not None:
        z.masked_fill_(~row.allowed.to(z.device), -torch.inf)
    if p.repetition_penalty != 1:
        seen = ids(sorted({*row.prompt, *row.ids}))
        values = z[seen]
        z[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if (p.presence_penalty or p.frequency_penalty) and row.ids:
        seen, counts = torch.unique(ids(row.ids), return_counts=True)
        z[seen] -= p.presence_penalty + p.frequency_penalty * counts
    return z


def sample(logits: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """One token for each row, and its log-probability under softmax(logits / temperature), unchanged and untruncated.

    Args:
        logits: (R, V) float32.
        rows: one for each; temperature 0 takes the most probable token (its log-probability is at temperature 1).

    Returns:
        tokens (R,) int64 and logprobs (R,) float32.
    """
    device, vocab = logits.device, logits.shape[-1]
    params = [row.params for row in rows]
    greedy = torch.tensor([p.temperature < GREEDY_BELOW for p in params], device=device)
    temperature = torch.tensor([1.0 if p.temperature < GREEDY_BELOW else p.temperature for p in params], device=device)
    logprobs = torch.log_softmax(logits.float() / temperature[:, None], -1)
    shown = logprobs
    touched = [i for i, row in enumerate(rows) if row.changed]
    if touched:
        shown = logprobs.clone()
        for i in touched:
            shown[i] = torch.log_softmax(change(logits[i].float(), rows[i]) / temperature[i], -1)
    best = shown.argmax(-1)
    if bool(greedy.all()):
        tokens = best
    else:
        kept = shown
        if any(p.top_p < 1 or p.top_k for p in params):
            top_p = torch.tensor([p.top_p for p in params], device=device)
            top_k = torch.tensor([p.top_k or vocab for p in params], device=device)
            kept = truncate(shown, top_p, top_k)
        if any(p.min_p for p in params):
            least = torch.tensor([math.log(p.min_p) if p.min_p else -math.inf for p in params], device=device)
            kept = kept.masked_fill(kept < shown.amax(-1, keepdim=True) + least[:, None], -torch.inf)
        cumulative = kept.exp().cumsum(-1)
        point = uniform([p.seed for p in params], [len(row.ids) for row in rows]).to(device, torch.float32) * cumulative[:, -1]
        # The first token whose cumulative probability passes the point. Past the last one lies only rounding.
        tokens = torch.searchsorted(cumulative, point[:, None], right=True).squeeze(1).clamp_(max=vocab - 1)
        tokens = torch.where(kept.gather(1, tokens[:, None]).squeeze(1).isinf() | greedy, best, tokens)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def top_logprobs(logits: Tensor, ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob]:
    """Of each row its token and the most probable ones, under softmax(logits): (R, V) float32, R tokens, R numbers of others."""
    logprobs = torch.log_softmax(logits, -1)
    own = logprobs.gather(1, torch.tensor(ids, device=logits.device)[:, None]).squeeze(1).tolist()
    values, tokens = logprobs.topk(min(max(counts), logits.shape[-1]), -1)
    return [
        TokenLogprob(id, mine, tuple(zip(t[:n], v[:n], strict=True)))
        for id, mine, t, v, n in zip(ids, own, tokens.tolist(), values.tolist(), counts, strict=True)
    ]
