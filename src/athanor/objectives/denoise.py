"""Denoising (BART; Lewis et al. 2020, section 2.2): a text is spoiled in up to five ways and written down as it was.

In this order: sentences are permuted, the text is rotated, spans are replaced by one mask each, tokens by masks, tokens deleted.
Published BARTs had sentences permuted and 30 % of the tokens in spans.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from athanor.core.errors import ConfigError
from athanor.objectives._sequences import (
    about,
    answer_loss,
    answers,
    below,
    body,
    check_has,
    check_share,
    framed,
    happens,
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
    """Options of denoising; 0 leaves a way out.

    permute  share of the texts whose sentences are permuted; a token with a full stop, its like or a newline ends one
    rotate   share of the texts that begin at a token drawn at random, what was before it coming last
    infill   share of the tokens that stand in spans, each of which becomes one mask
    span     mean length of these (Poisson); those of length 0 insert a mask
    mask     share of the tokens that become masks
    delete   share of the tokens that are taken out
    """

    permute: float = 1.0
    rotate: float = 0.0
    infill: float = 0.3
    span: float = 3.0
    mask: float = 0.0
    delete: float = 0.0

    def __post_init__(self) -> None:
        ways = ("permute", "rotate", "infill", "mask", "delete")
        for name in ways:
            check_share(name, getattr(self, name))
        if not self.span >= 1:
            raise ConfigError(f"span ({self.span}) must be at least 1 token: 3 is usual")
        if not any(getattr(self, name) for name in ways):
            raise ConfigError(f"all of {', '.join(ways)} are 0, so no text is spoiled: infill 0.3 and permute 1 are usual")


def check(config: Config, vocabulary: Vocabulary, context: int) -> int:
    """Tokens of the longest sequence made of `context`. Raises ConfigError where the vocabulary lacks what is needed."""
    check_has(vocabulary, "denoise", eos=True, mask=config.infill or config.mask)
    return context + 2


def permute(text: Tensor, vocabulary: Vocabulary, rng: torch.Generator) -> Tensor:
    """The sentences of a text in random order."""
    ends = vocabulary.sentence_ends[text].nonzero().squeeze(1).tolist()
    edges = sorted({0, *(end + 1 for end in ends), len(text)})
    sentences = [text[a:b] for a, b in pairwise(edges)]
    return join([sentences[i] for i in torch.randperm(len(sentences), generator=rng).tolist()])


def infill(text: Tensor, config: Config, mask: int, rng: torch.Generator) -> Tensor:
    """Spans of a text, replaced by one mask each; any arrangement of spans and of tokens that are kept is as likely.

    Lengths are drawn until they are a share `infill` of the text together, and the last is cut to that. Those of length 0 insert
    a mask, as long as the text grows no longer than it was.
    """
    taken = min(about(config.infill * len(text), rng), len(text))
    lengths, left = [], taken
    while left > 0:
        lengths.append(min(int(torch.poisson(torch.tensor(config.span), generator=rng)), left))
        left -= lengths[-1]
    spans = [length for length in lengths if length]
    inserted = min(len(lengths) - len(spans), taken - len(spans))
    masks = len(spans) + inserted
    # Units of the new text, and how many tokens of the old one each stands for.
    order = torch.randperm(masks + len(text) - taken, generator=rng)
    stands_for = torch.tensor([*spans, *[0] * inserted, *[1] * (len(text) - taken)], dtype=torch.int64)[order]
    at = (torch.cumsum(stands_for, 0) - stands_for).clamp(max=max(len(text) - 1, 0))
    return torch.where(order < masks, mask, text[at]) if len(text) else text


def spoil(text: Tensor, config: Config, vocabulary: Vocabulary, rng: torch.Generator) -> Tensor:
    """The text, spoiled. Special tokens within it may be moved, but are never masked or deleted."""
    v = vocabulary
    if config.permute and happens(config.permute, rng):
        text = permute(text, v, rng)
    if config.rotate and happens(config.rotate, rng):
        text = text.roll(-below(len(text), rng))
    if config.infill:
        assert v.mask is not None
        special = v.is_special[text].nonzero().squeeze(1).tolist()
        edges = sorted({0, *special, *(i + 1 for i in special), len(text)})
        runs = [text[a:b] for a, b in pairwise(edges)]
        text = join([run if int(run[0]) in v.special else infill(run, config, v.mask, rng) for run in runs])
    if config.mask:
        assert v.mask is not None
        text = torch.where(_some(text, config.mask, v, rng), v.mask, text)
    return text[~_some(text, config.delete, v, rng)] if config.delete else text


def _some(text: Tensor, share: float, vocabulary: Vocabulary, rng: torch.Generator) -> Tensor:
    return (torch.rand(len(text), generator=rng) < share) & ~vocabulary.is_special[text]


def prepare(batch: Batch, config: Config, vocabulary: Vocabulary, rng: torch.Generator) -> Batch:
    """Spoiled texts as sources, and the texts as answers, with what begins a text unless that is how every answer starts.

    Pieces without any token of text are left out.
    """
    v = vocabulary
    begin = one(None if v.bos == v.start else v.bos)
    sources, targets = [], []
    for piece in pieces(batch):
        text = body(piece, v)
        if len(text):
            sources.append(framed(spoil(text, config, v, rng), v))
            targets.append(join([begin, text, one(v.eos)]))
    return answers(sources, targets, v, batch)
