"""Prefix language model (Raffel et al. 2020, section 3.2.1; Liu et al. 2018): a text's beginning is read both ways, and what
follows it is learned.

A decoder's attention is open within the prefix (`Packed(lengths, prefix=...)`); an encoder-decoder has it as source. A recurrent
decoder reads its prefix from left to right all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from athanor.core.errors import ConfigError
from athanor.nn.context import Packed
from athanor.objectives._sequences import (
    Loss,
    answer_loss,
    answers,
    below,
    check_share,
    cross_entropy,
    extra,
    join,
    pieces,
    supervised,
    with_router,
)
from athanor.objectives._vocabulary import Vocabulary
from athanor.types import IGNORE, Batch

KINDS: tuple[str, ...] = ("decoder", "encoder_decoder")


@dataclass(frozen=True)
class Config:
    """Options of a prefix language model.

    low, high  share of a piece that its prefix has at least and at most; any length between is as likely
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check_share("low", self.low)
        check_share("high", self.high)
        if self.low > self.high:
            raise ConfigError(f"low ({self.low}) must not be above high ({self.high})")


def prepare(batch: Batch, config: Config, vocabulary: Vocabulary, rng: torch.Generator) -> Batch:
    """Cut every piece in two.

    Of a decoder ids stay, labels within the prefix go and `extras["prefix"]` (S,) says how long it is; one or more tokens are
    left to learn where there are any. Of an encoder-decoder (`vocabulary.start`) sources are the prefixes and answers what
    follows, the last label with it; pieces of fewer than two tokens are left out and counted in `extras["lost"]`.
    """
    prefixes, sources, targets, lost = [], [], [], 0
    labels = batch.labels.clone()
    first = 0
    for piece in pieces(batch):
        last = first + len(piece)
        whole = join([piece, batch.labels[last - 1 : last][batch.labels[last - 1 : last] != IGNORE]])
        # A prefix has one token or more, and one or more follow it.
        room = len(whole) - 1
        prefix = 1
        if room > 1:
            low = min(max(round(config.low * len(whole)), 1), room)
            high = max(min(round(config.high * len(whole)), room), low)
            prefix = low + below(high - low + 1, rng)
        prefixes.append(prefix)
        labels[first : first + prefix - 1] = IGNORE
        if room < 1:
            lost += len(whole)
        else:
            sources.append(whole[:prefix])
            targets.append(whole[prefix:])
        first = last
    if vocabulary.start is not None:
        return answers(sources, targets, vocabulary, batch, lost)
    return Batch(batch.ids, labels, batch.lengths, batch.extras | {"prefix": torch.tensor(prefixes)}, batch.origin)


def loss(model: Any, batch: Batch) -> Loss:
    """Sum of -log p(label | prefix, what came before it) over what follows the prefixes, in nats.

    Metrics: `correct`, and `router_loss` as in `next_token`; of encoder-decoders as `answer_loss` says.

    Raises:
        NoTargetsError: nothing in the batch is supervised. DataError: it was not prepared.
    """
    if model.kind == "encoder_decoder":
        return answer_loss(model, batch)
    at = supervised(batch, "give texts of two tokens or more")
    ctx = Packed(batch.lengths, prefix=extra(batch, "prefix"))
    hidden = model.hidden(batch.ids.unsqueeze(0), ctx).squeeze(0).index_select(0, at)
    total, correct = cross_entropy(model, hidden, batch.labels[at], None)
    return with_router(model, total, at.numel(), {"correct": correct})
