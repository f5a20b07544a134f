"""Masked language model (BERT; Devlin et al. 2019, section 3.1): some tokens are hidden, and what they were is learned.

With it, as an option, whether a second segment follows the first (next sentence, Devlin et al.) or whether the two stand in their
order (sentence order, Lan et al. 2020). Legend: N tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athanor.core.errors import ConfigError
from athanor.nn.context import Packed
from athanor.objectives._sequences import (
    Loss,
    below,
    body,
    check_has,
    check_rate,
    check_share,
    extra,
    framed,
    happens,
    join,
    one,
    pieces,
    supervised,
    with_router,
)
from athanor.objectives._vocabulary import Vocabulary
from athanor.types import IGNORE, Batch

KINDS: tuple[str, ...] = ("encoder",)
_PAIRS = ("none", "next", "order")


@dataclass(frozen=True)
class Config:
    """Options of the masked language model.

    rate         share of the tokens that are chosen
    mask         share of the chosen that become the mask
    random       share of the chosen that become a random token; the others stay as they are
    whole_words  whether words are chosen rather than tokens
    pairs        none: a text is one segment. next: it is two, and the second may be another text's. order: two, perhaps swapped
    pair_weight  how many tokens an answer about a pair counts as; that of 0.15 x 128 makes it BERT's sum of two means
    """

    rate: float = 0.15
    mask: float = 0.8
    random: float = 0.1
    whole_words: bool = False
    pairs: Literal["none", "next", "order"] = "none"
    pair_weight: float = 20.0

    def __post_init__(self) -> None:
        check_rate("rate", self.rate, 0.15)
        check_share("mask", self.mask)
        check_share("random", self.random)
        if self.mask + self.random > 1:
            raise ConfigError(
                f"mask ({self.mask}) and random ({self.random}) are shares of the same and must not sum to more than 1"
            )
        if self.pairs not in _PAIRS:
            raise ConfigError(f"pairs ({self.pairs!r}) must be one of {', '.join(_PAIRS)}")
        if not self.pair_weight > 0:
            raise ConfigError(f"pair_weight ({self.pair_weight}) must be above 0: leave pairs 'none' to learn nothing of them")


def check(config: Config, vocabulary: Vocabulary, context: int) -> int:
    """Tokens of the longest sequence made of `context`. Raises ConfigError where the vocabulary lacks what is needed."""
    pairs = config.pairs != "none"
    check_has(vocabulary, "masked_lm", mask=config.mask > 0, cls=pairs, sep=pairs)
    return context + (3 if pairs else 2)


def ready(model: Any, config: Config, generator: torch.Generator) -> None:
    """Give a model whose files had none the head of next sentences and its pooler, where pairs are learned.

    Raises ConfigError for a family that has no such head, and for a model of one segment.
    """
    if config.pairs == "none":
        return
    if "following" not in model.head_keys() or model.config.n_segments < 2:
        raise ConfigError(
            f"pairs ({config.pairs!r}) needs a family with a head of next sentences and two segments, and this {model.model_type}"
            f" has {model.config.n_segments} of these: leave pairs 'none', or take a bert"
        )
    d = model.config.d_model
    for name, width in (("pooler", d), ("following", 2)):
        if getattr(model, name) is None:
            layer = nn.Linear(d, width)
            with torch.no_grad():
                layer.weight.normal_(std=0.02, generator=generator)
                layer.bias.zero_()
            setattr(model, name, layer.to(model.device, next(model.parameters()).dtype))


def prepare(batch: Batch, config: Config, vocabulary: Vocabulary, rng: torch.Generator) -> Batch:
    """Texts between `cls` and `sep`, some of whose tokens are hidden; labels[i] is what stood at i where it was chosen.

    With pairs there are `extras`: "segments" (N,) 0 and 1, and "next" (S,): 1 for a second segment that follows the first, 2 for
    one that does not, 0 where nothing is asked (texts of fewer than two tokens; with "next" one text may have no partner).
    No token is left out. Special tokens are never chosen.
    """
    v = vocabulary
    texts = [body(piece, v) for piece in pieces(batch)]
    extras = {}
    if config.pairs == "none":
        sequences = [framed(text, v) for text in texts]
        sequences = [s for s in sequences if len(s)]
    else:
        cut, following = (_next if config.pairs == "next" else _order)(texts, rng)
        sequences, segments = [], []
        for first, second in cut:
            parts = [framed(first, v), join([second, one(v.sep)]) if len(second) else second]
            sequences.append(join(parts))
            segments += [torch.full((len(part),), kind) for kind, part in enumerate(parts)]
        extras = {"segments": torch.cat(segments), "next": torch.tensor(following)}
    ids = join(sequences)
    lengths = torch.tensor([len(s) for s in sequences])
    chosen = _chosen(ids, lengths, config, v, rng)
    labels = torch.where(chosen, ids, IGNORE)
    lot = torch.rand(len(ids), generator=rng)
    random = v.ordinary[torch.randint(len(v.ordinary), (len(ids),), generator=rng)]
    hidden = ids if v.mask is None else torch.where(chosen & (lot < config.mask), v.mask, ids)
    hidden = torch.where(chosen & (lot >= config.mask) & (lot < config.mask + config.random), random, hidden)
    return Batch(hidden, labels, lengths, extras, batch.origin)


def _chosen(ids: Tensor, lengths: Tensor, config: Config, v: Vocabulary, rng: torch.Generator) -> Tensor:
    """Which tokens are chosen: each by itself, or each word by itself. A word ends where another begins, or a special token."""
    special = v.is_special[ids]
    begins = torch.ones_like(special)
    if config.whole_words:
        begins = v.word_starts[ids] | special
        begins[1:] |= special[:-1]
        begins[torch.cumsum(lengths, 0) - lengths] = True
    word = torch.cumsum(begins, 0) - 1
    lot = torch.rand(int(word[-1]) + 1, generator=rng)
    return (lot < config.rate)[word] & ~special


Cut = list[tuple[Tensor, Tensor]]


def _next(texts: Sequence[Tensor], rng: torch.Generator) -> tuple[Cut, list[int]]:
    """Texts in two segments, of which about half have exchanged the second with a text of about their length.

    Both of two partners have second segments of one length whether they exchange them or not: lengths give nothing away, no text
    is lost and none grows longer.
    """
    cut: Cut = [(text, text[:0]) for text in texts]
    following = [0] * len(texts)
    order = torch.randperm(len(texts), generator=rng).tolist()
    order = sorted((i for i in order if len(texts[i]) > 1), key=lambda i: len(texts[i]))
    for i, j in zip(order[::2], order[1::2], strict=False):
        a, b = texts[i], texts[j]
        size = 1 + below(min(len(a), len(b)) - 1, rng)
        swap = happens(0.5, rng)
        tails = (b[-size:], a[-size:]) if swap else (a[-size:], b[-size:])
        cut[i], cut[j] = (a[:-size], tails[0]), (b[:-size], tails[1])
        following[i] = following[j] = 2 if swap else 1
    return cut, following


def _order(texts: Sequence[Tensor], rng: torch.Generator) -> tuple[Cut, list[int]]:
    """Texts in two segments, about half of them with the second first."""
    cut: Cut = []
    following = []
    for text in texts:
        at = 1 + below(len(text) - 1, rng) if len(text) > 1 else len(text)
        swap = len(text) > 1 and happens(0.5, rng)
        cut.append((text[at:], text[:at]) if swap else (text[:at], text[at:]))
        following.append(0 if len(text) < 2 else 2 if swap else 1)
    return cut, following


def build(config: Config) -> Callable[[Any, Batch], Loss]:
    """The objective with these options."""

    def loss(model: Any, batch: Batch) -> Loss:
        """Sum over chosen tokens of -log p(what it was | the hidden text), and pair_weight times the sum over pairs of
        -log p(whether the second segment follows), in nats. The count is that of chosen tokens.

        Metrics: `correct` chosen tokens; with pairs how many there are (`pairs`), the sum of their losses unweighted
        (`pairs_loss`) and how many were right (`pairs_correct`).

        Raises:
            NoTargetsError: no token was chosen. DataError: the batch has no pairs and they are asked for.
        """
        at = supervised(batch, "take more tokens at a time, or a higher rate")
        segments = extra(batch, "segments").unsqueeze(0) if config.pairs != "none" else None
        hidden = model.hidden(batch.ids.unsqueeze(0), Packed(batch.lengths, causal=False), segments).squeeze(0)
        total, correct = model.cross_entropy(hidden.index_select(0, at), batch.labels[at])
        metrics = {"correct": correct}
        if config.pairs != "none":
            following = extra(batch, "next")
            asked = (following > 0).nonzero().squeeze(1)
            answer = following[asked] - 1
            firsts = (torch.cumsum(batch.lengths, 0) - batch.lengths)[asked]
            logits = model.next_sentence(hidden.index_select(0, firsts)).float()
            pairs_loss = F.cross_entropy(logits, answer, reduction="sum")
            total = total + config.pair_weight * pairs_loss
            metrics["pairs"] = torch.tensor(len(asked), device=total.device)
            metrics["pairs_loss"] = pairs_loss.detach()
            metrics["pairs_correct"] = (logits.argmax(1) == answer).sum()
        return with_router(model, total, at.numel(), metrics)

    return loss
