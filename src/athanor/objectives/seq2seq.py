"""Answers to sources, as in translation: every token of the answer, given the source and the answer before it (Sutskever et al.
2014, Vaswani et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from athanor.core.errors import DataError
from athanor.models.base import EncoderDecoder
from athanor.objectives._sequences import Loss, answer_loss, check_smoothing
from athanor.objectives._vocabulary import Vocabulary
from athanor.types import Batch, Source

KINDS: tuple[str, ...] = ("encoder_decoder",)


@dataclass(frozen=True)
class Config:
    """Options of teacher forcing.

    smoothing  how much of a target's probability is spread over the vocabulary while training; None is what the model says
    """

    smoothing: float | None = None

    def __post_init__(self) -> None:
        check_smoothing(self.smoothing)


def pairs(sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], start: int, origin: str = "") -> Batch:
    """A batch of answers to sources, both with what ends a text where the model is to see and to say it.

    Args:
        sources, targets: ids, as many of either.
        start: what an answer begins with: `model.token_ids.decoder_start`.

    Raises:
        DataError: a side has more texts than the other, none, or one without tokens.
    """
    if len(sources) != len(targets) or not targets:
        raise DataError(f"batch {origin!r} has {len(sources)} sources and {len(targets)} answers: give as many, and at least one")
    empty = [i for i, pair in enumerate(zip(sources, targets, strict=True)) if not all(map(len, pair))]
    if empty:
        raise DataError(f"pair {empty[0]} of batch {origin!r} has a side without tokens: leave it out, or give its end of text")
    ids = [id for target in targets for id in (start, *target[:-1])]
    return Batch(
        ids=torch.tensor(ids),
        labels=torch.tensor([id for target in targets for id in target]),
        lengths=torch.tensor(list(map(len, targets))),
        origin=origin,
        source=Source(torch.tensor([id for source in sources for id in source]), torch.tensor(list(map(len, sources)))),
    )


def prepare(batch: Batch, config: Config, vocabulary: Vocabulary, rng: torch.Generator) -> Batch:
    """The batch as it is. Raises DataError where it has no sources: a text alone is no pair."""
    if batch.source is None:
        raise DataError(
            f"batch {batch.origin!r} has no sources: seq2seq learns from pairs of texts, such as `seq2seq.pairs` makes"
        )
    return batch


def build(config: Config) -> Callable[[EncoderDecoder, Batch], Loss]:
    """`answer_loss` with these options."""
    return partial(answer_loss, smoothing=config.smoothing)
