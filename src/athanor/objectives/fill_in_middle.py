"""Fill in the middle (Bavarian et al. 2022, arXiv 2207.14255): some texts have their middle moved to their end, so that a decoder
learns to write what belongs between two texts.

    PSM  <prefix> prefix <suffix> suffix <middle> middle <end>
    SPM  <prefix> <suffix> suffix <middle> prefix middle <end>     (appendix D)

The three marks are the vocabulary's first three sentinels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from athanor.objectives import next_token
from athanor.objectives._sequences import below, body, check_has, check_share, happens, join, one, pieces
from athanor.objectives._vocabulary import Vocabulary
from athanor.types import IGNORE, Batch

KINDS: tuple[str, ...] = ("decoder",)

loss = next_token.loss
"""Of every token, moved or not, as in the paper."""


@dataclass(frozen=True)
class Config:
    """Options of filling in the middle.

    rate  share of the pieces whose middle is moved
    spm   share of these that have the suffix first
    """

    rate: float = 0.5
    spm: float = 0.5

    def __post_init__(self) -> None:
        check_share("rate", self.rate)
        check_share("spm", self.spm)


def check(config: Config, vocabulary: Vocabulary, context: int) -> int:
    """Tokens of the longest sequence made of `context`. Raises ConfigError where the vocabulary lacks what is needed."""
    check_has(vocabulary, "fill_in_middle", eos=True, sentinels=3)
    return context + 3


def prepare(batch: Batch, config: Config, vocabulary: Vocabulary, rng: torch.Generator) -> Batch:
    """Some pieces, cut at two places that are drawn anew (the cuts of a piece fall on any of its tokens), in another order.

    What begins a text stays first; an end of text comes after the middle, whether the piece had one or not, and is learned. The
    other pieces stay as they are, and so do those with masked labels within and those of fewer than two tokens.
    """
    ids, labels = [], []
    for piece, target in zip(pieces(batch), batch.labels.split(batch.lengths.tolist()), strict=True):
        text = body(piece, vocabulary)
        if len(text) < 2 or bool((target[:-1] == IGNORE).any()) or not happens(config.rate, rng):
            ids.append(piece)
            labels.append(target)
            continue
        begins = len(text) < len(piece) and int(piece[0]) in (vocabulary.bos, vocabulary.cls)
        moved = join([piece[:1] if begins else one(None), _moved(text, config, vocabulary, rng)])
        ids.append(moved)
        labels.append(join([moved[1:], one(vocabulary.eos)]))
    return Batch(join(ids), join(labels), torch.tensor([len(x) for x in ids]), origin=batch.origin)


def _moved(text: Tensor, config: Config, vocabulary: Vocabulary, rng: torch.Generator) -> Tensor:
    first, last = sorted(below(len(text) + 1, rng) for _ in range(2))
    prefix, middle, suffix = text[:first], text[first:last], text[last:]
    marks = [one(id) for id in vocabulary.sentinels[:3]]
    if happens(config.spm, rng):
        return join([marks[0], marks[1], suffix, marks[2], prefix, middle])
    return join([marks[0], prefix, marks[1], suffix, marks[2], middle])
