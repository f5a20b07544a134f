"""Span corruption (T5; Raffel et al. 2020, section 3.1.4): spans are taken out of a text and written down after their marks.

    source  Thank you <0> me to your party <1> week <end>
    target  <0> for inviting <1> last <end>

Sentinel k stands for span k, as in the authors' code; there the target ends with the end of text, where the figures of the paper
have one more sentinel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from athanor.core.errors import ConfigError, DataError
from athanor.objectives._sequences import (
    answer_loss,
    answers,
    body,
    check_has,
    check_rate,
    framed,
    join,
    one,
    pieces,
)
from athanor.objectives._vocabulary import Vocabulary
from athanor.types import Batch

KINDS: tuple[str, ...] = ("encoder_decoder",)

loss = answer_loss


@dataclass(frozen=True)
class Config:
    """Options of span corruption.

    rate  share of the tokens that is taken out
    span  mean length of a span, in tokens
    """

    rate: float = 0.15
    span: float = 3.0

    def __post_init__(self) -> None:
        check_rate("rate", self.rate, 0.15)
        if not self.span >= 1:
            raise ConfigError(f"span ({self.span}) must be at least 1 token: 3 is usual")


def sizes(n: int, config: Config) -> tuple[int, int]:
    """Of n tokens, 2 or more, how many are taken out and in how many spans."""
    noise = min(max(round(n * config.rate), 1), n - 1)
    return noise, min(max(round(noise / config.span), 1), noise, n - noise)


def check(config: Config, vocabulary: Vocabulary, context: int) -> int:
    """Tokens of the longest sequence made of `context`. Raises ConfigError where the vocabulary lacks what is needed."""
    noise, spans = sizes(max(context, 2), config)
    check_has(vocabulary, "span_corruption", eos=True, sentinels=spans)
    frame = sum(id is not None for id in (vocabulary.cls, vocabulary.sep))
    return max(context - noise + spans + frame, noise + spans + 1)


def noise_mask(n: int, config: Config, rng: torch.Generator) -> Tensor:
    """Which of n tokens, 2 or more, are taken out: (n,) bool.

    Kept and taken spans in turn, the first of them kept and the last taken, both cut at places of which any choice is as likely.
    """
    noise, spans = sizes(n, config)
    lengths = torch.stack([_cut(n - noise, spans, rng), _cut(noise, spans, rng)], 1).flatten()
    turns = torch.zeros(n, dtype=torch.int64)
    turns[torch.cumsum(lengths, 0)[:-1]] = 1
    return torch.cumsum(turns, 0) % 2 == 1


def _cut(n: int, parts: int, rng: torch.Generator) -> Tensor:
    """n as the sum of `parts` numbers above 0."""
    borders = torch.randperm(n - 1, generator=rng)[: parts - 1].sort().values + 1
    return torch.diff(borders, prepend=torch.tensor([0]), append=torch.tensor([n]))


def corrupt(text: Tensor, taken: Tensor, sentinels: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The text with each span replaced by its sentinel, and the spans after theirs.

    Args:
        text: (n,) ids.
        taken: (n,) bool.
        sentinels: one for each span, or more.

    Raises:
        DataError: there are more spans.
    """
    begins = taken.clone()
    begins[1:] &= ~taken[:-1]
    spans = int(begins.sum())
    if spans > len(sentinels):
        raise DataError(
            f"{spans} spans are taken out of a text and the vocabulary has {len(sentinels)} sentinels: use shorter rows, or train"
            f" one that has them (athanor tokenizer --noise {spans})"
        )
    marks = torch.tensor(sentinels[:spans], dtype=torch.int64)
    source = text.clone()
    source[begins] = marks
    inside = text[taken]
    places = begins[taken].nonzero().squeeze(1) + torch.arange(spans)
    target = torch.empty(len(inside) + spans, dtype=torch.int64)
    of_text = torch.ones(len(target), dtype=torch.bool)
    of_text[places] = False
    target[places], target[of_text] = marks, inside
    return source[~taken | begins], target


def prepare(batch: Batch, config: Config, vocabulary: Vocabulary, rng: torch.Generator) -> Batch:
    """Sources with spans taken out, and these as answers. Special tokens within a text are kept.

    Texts of fewer than two tokens that may be taken are left out and counted in `extras["lost"]`.
    """
    sources, targets, lost = [], [], 0
    for piece in pieces(batch):
        text = body(piece, vocabulary)
        free = ~vocabulary.is_special[text]
        n = int(free.sum())
        if n < 2:
            lost += len(text)
            continue
        taken = torch.zeros(len(text), dtype=torch.bool)
        taken[free] = noise_mask(n, config, rng)
        source, target = corrupt(text, taken, vocabulary.sentinels)
        sources.append(framed(source, vocabulary))
        targets.append(join([target, one(vocabulary.eos)]))
    return answers(sources, targets, vocabulary, batch, lost)
