"""What objectives of pre-training do to a batch, and how they read one. Legend: N tokens, S sequences, D width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from athanor.core.errors import ConfigError, DataError, NoTargetsError
from athanor.models.base import EncoderDecoder, LanguageModel
from athanor.nn.context import Memory, Packed, WithMemory
from athanor.nn.loss import linear_cross_entropy
from athanor.objectives._vocabulary import Vocabulary
from athanor.types import IGNORE, Batch, Source

Loss = tuple[Tensor, int, dict[str, Tensor]]


def pieces(batch: Batch) -> Sequence[Tensor]:
    """The ids of each sequence."""
    return batch.ids.split(batch.lengths.tolist())


def body(piece: Tensor, vocabulary: Vocabulary) -> Tensor:
    """A piece without what begins a text before it, and without what ends one after it."""
    v = vocabulary
    if len(piece) and int(piece[0]) in (v.bos, v.cls):
        piece = piece[1:]
    return piece[:-1] if len(piece) and int(piece[-1]) in (v.eos, v.sep) else piece


def framed(text: Tensor, vocabulary: Vocabulary) -> Tensor:
    """A text as an encoder reads it: with `cls` before it and `sep` after it, as far as the vocabulary has them."""
    return join([one(vocabulary.cls), text, one(vocabulary.sep)])


def one(id: int | None) -> Tensor:
    """A token as a sequence of one; nothing for None."""
    return torch.tensor([] if id is None else [id], dtype=torch.int64)


def join(parts: Sequence[Tensor]) -> Tensor:
    """Parts one after another."""
    return torch.cat([part.long() for part in parts])


def below(high: int, rng: torch.Generator) -> int:
    """A random whole number in [0, high)."""
    return int(torch.randint(high, (), generator=rng))


def happens(probability: float, rng: torch.Generator) -> bool:
    """Whether something of that probability happens."""
    return float(torch.rand((), generator=rng, dtype=torch.float64)) < probability


def about(number: float, rng: torch.Generator) -> int:
    """One of the two whole numbers beside `number`, which is what it is on average."""
    return int(number + float(torch.rand((), generator=rng, dtype=torch.float64)))


def answers(sources: Sequence[Tensor], targets: Sequence[Tensor], vocabulary: Vocabulary, batch: Batch, lost: int = 0) -> Batch:
    """What an encoder-decoder learns from: sources, and targets that it answers with.

    Args:
        sources, targets: ids of each, at least 1.
        vocabulary: its `start` comes before each target.
        batch: what they were made of, for its origin.
        lost: tokens of sequences that were too short, put into `extras["lost"]` (S,).

    Raises:
        NoTargetsError: there are none.
    """
    if not targets:
        raise NoTargetsError(f"batch {batch.origin!r}: all its {len(batch.lengths)} sequences are too short: use longer rows")
    assert vocabulary.start is not None
    start = one(vocabulary.start)
    counted = torch.zeros(len(targets), dtype=torch.int64)
    counted[0] = lost
    return Batch(
        ids=join([part for target in targets for part in (start, target[:-1])]),
        labels=join(targets),
        lengths=torch.tensor([len(target) for target in targets]),
        extras={"lost": counted},
        origin=batch.origin,
        source=Source(join(sources), torch.tensor([len(source) for source in sources])),
    )


def supervised(batch: Batch, remedy: str) -> Tensor:
    """Where labels are. Raises NoTargetsError, which ends with the remedy, where there is none."""
    at = (batch.labels != IGNORE).nonzero().squeeze(1)
    if at.numel() == 0:
        raise NoTargetsError(
            f"batch {batch.origin!r}: all {batch.labels.numel()} labels are masked, so there is nothing to learn from it;"
            f" {remedy}"
        )
    return at


def extra(batch: Batch, name: str) -> Tensor:
    """`batch.extras[name]`. Raises DataError for a batch that was not prepared."""
    if name not in batch.extras:
        raise DataError(f"batch {batch.origin!r} lacks extras {name}, which `prepare` of the objective adds: prepare it")
    return batch.extras[name]


def cross_entropy(model: LanguageModel, hidden: Tensor, targets: Tensor, smoothing: float | None) -> tuple[Tensor, Tensor]:
    """`model.cross_entropy`, with label smoothing of its own while training where `smoothing` is not None."""
    if smoothing is None:
        return model.cross_entropy(hidden, targets)
    return linear_cross_entropy(
        model.to_output(hidden), model.output_weight, targets, model.output_bias, model.output_softcap,
        smoothing if model.training else 0.0,
    )  # fmt: skip


def with_router(model: LanguageModel, total: Tensor, count: int, metrics: dict[str, Tensor]) -> Loss:
    """The loss with what training adds for experts, `count` times, so that it counts for as much as the mean."""
    added = model.router_loss() if model.training else None
    if added is not None:
        total = total + added * count
        metrics["router_loss"] = added.detach() * count
    return total, count, metrics


def answer_loss(model: EncoderDecoder, batch: Batch, smoothing: float | None = None) -> Loss:
    """Sum over an encoder-decoder's targets of -log p(label | source, what came before it), in nats.

    Metrics: `correct` labels that were the model's first choice; `lost` tokens of sequences that were too short; `router_loss`
    as in `next_token`.

    Raises:
        DataError: a batch without sources. NoTargetsError: nothing in it is supervised.
    """
    at = supervised(batch, "give answers that have at least one token")
    source = batch.source
    if source is None:
        raise DataError(f"batch {batch.origin!r} has no sources, which an encoder-decoder reads: prepare it, or use `pairs`")
    encoded = model.encode(source.ids.unsqueeze(0), Packed(source.lengths, causal=False))
    ctx = WithMemory(Packed(batch.lengths), Memory(encoded, source.lengths))
    hidden = model.hidden(batch.ids.unsqueeze(0), ctx).squeeze(0)
    if at.numel() < batch.labels.numel():
        hidden = hidden.index_select(0, at)
    total, correct = cross_entropy(model, hidden, batch.labels[at], smoothing)
    metrics = {"correct": correct}
    if "lost" in batch.extras:
        metrics["lost"] = batch.extras["lost"].sum()
    return with_router(model, total, at.numel(), metrics)


def check_share(name: str, value: float) -> None:
    """Raise ConfigError unless 0 <= value <= 1."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} ({value}) must lie in [0, 1]")


def check_rate(name: str, value: float, usual: float) -> None:
    """Raise ConfigError unless 0 < value < 1."""
    if not 0 < value < 1:
        raise ConfigError(f"{name} ({value}) must lie in (0, 1): {usual} is usual")


def check_smoothing(value: float | None) -> None:
    """Raise ConfigError unless it is None or 0 <= value < 1."""
    if value is not None and not 0 <= value < 1:
        raise ConfigError(f"smoothing ({value}) must lie in [0, 1), or be None for what the model says: 0.1 is usual")


def check_has(vocabulary: Vocabulary, objective: str, **needed: Any) -> None:
    """Raise ConfigError where one of the tokens is None, or there are fewer sentinels than needed."""
    sentinels = needed.pop("sentinels", 0)
    missing = [name for name, why in needed.items() if getattr(vocabulary, name) is None and why]
    if missing:
        raise ConfigError(
            f"{objective} needs tokens that the vocabulary lacks: {', '.join(missing)}. Train one that has them"
            f" (athanor tokenizer --noise {max(sentinels, 1)}), or take that of a model of this kind"
        )
    if len(vocabulary.sentinels) < sentinels:
        raise ConfigError(
            f"{objective} needs {sentinels} sentinels and the vocabulary has {len(vocabulary.sentinels)}: train one that has them"
            f" (athanor tokenizer --noise {sentinels})"
        )
