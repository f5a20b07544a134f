"""Answers to sources, as in translation: every token of the answer, given the source and the answer before it (Sutskever et al.
2014, Vaswani et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from athanor.core.errors import DataError
from athanor.models.base import EncoderDecoder
from athanor.objectives._sequences import Loss, answer_loss, check_smoothing
from athanor.objectives._vocabulary import Vocabulary
from athanor.types import Batch

KINDS: tuple[str, ...] = ("encoder_decoder",)


@dataclass(frozen=True)
class Config:
    """Options of teacher forcing.

    smoothing  how much of a target's probability is spread over the vocabulary while training; None is what the model says
    """

    smoothing: float | None = None

    def __post_init__(self) -> None:
        check_smoothing(self.smoothing)


def prepare(batch: Batch, config: Config, vocabulary: Vocabulary, rng: torch.Generator) -> Batch:
    """The batch as it is. Raises DataError where it has no sources: a text alone is no pair."""
    if batch.source is None:
        raise DataError(
            f"batch {batch.origin!r} has no sources: seq2seq learns from pairs of texts, such as `data.pairs.pack` makes"
        )
    return batch


def build(config: Config) -> Callable[[EncoderDecoder, Batch], Loss]:
    """`answer_loss` with these options."""
    return partial(answer_loss, smoothing=config.smoothing)
