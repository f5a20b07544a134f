"""Likelihood of text: nats of tokens in overlapping windows, and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from athanor.core.device import Precision, autocast
from athanor.core.errors import ConfigError, DataError
from athanor.models.base import CausalLM
from athanor.nn.context import Packed
from athanor.tokenizer.bpe import Tokenizer
from athanor.types import Document

_BATCH_TOKENS = 16_384


@dataclass
class Likelihood:
    """-log p of tokens.

    nats     the sum over all predicted tokens
    tokens   predicted tokens
    windows  that the sequences were read in
    """

    nats: float = 0.0
    tokens: int = 0
    windows: int = 0


@torch.inference_mode()
def likelihood(
    model: CausalLM, sequences: Iterable[Sequence[int]], *, window: int, overlap: int, precision: Precision = "fp32"
) -> Likelihood:
    """-log p of every token of each sequence but its first, given at most `window` tokens before it.

    A sequence is read in windows; the next begins `overlap` tokens before the last one's end. Every token is predicted once, from
    at least `overlap` + 1 tokens before it (fewer only at the sequence's start).

    Args:
        sequences: ids, each on its own.
        window: tokens seen at once; not longer than the model was trained on.
        overlap: tokens that a window reads again.

    Raises:
        ConfigError: window or overlap out of range.
    """
    if not 2 <= window <= model.config.max_positions:
        raise ConfigError(f"window ({window}) must lie between 2 and {model.config.max_positions}, the model's context")
    if not 0 <= overlap < window:
        raise ConfigError(f"overlap ({overlap}) must be at least 0 and below window ({window}): half of it is usual")
    ids: list[int] = []
    targets: list[int] = []
    keep: list[int] = []
    lengths: list[int] = []
    found = Likelihood()

    def flush() -> None:
        with autocast(model.device, precision):
            packed = Packed(torch.tensor(lengths, device=model.device))
            hidden = model.hidden(torch.tensor(ids, device=model.device).unsqueeze(0), packed)[0]
            hidden = hidden.index_select(0, torch.tensor(keep, device=model.device))
            total, _ = model.cross_entropy(hidden, torch.tensor(targets, device=model.device))
        found.nats += float(total)
        found.tokens += len(targets)
        found.windows += len(lengths)
        for x in (ids, targets, keep, lengths):
            x.clear()

    for tokens in sequences:
        predicted = 0  # tokens[1 .. predicted] are accounted for
        while predicted < len(tokens) - 1:
            start = max(0, predicted - overlap)
            end = min(start + window, len(tokens) - 1)
            keep += range(len(ids) + predicted - start, len(ids) + end - start)
            targets += tokens[predicted + 1 : end + 1]
            ids += tokens[start:end]
            lengths.append(end - start)
            predicted = end
            if len(ids) >= _BATCH_TOKENS:
                flush()
    if ids:
        flush()
    return found


def bits_per_byte(
    model: CausalLM, tokenizer: Tokenizer, documents: Iterable[Document], *, window: int, precision: Precision = "fp32"
) -> float:
    """-log2 p(documents) / bytes: what an arithmetic coder driven by the model would need, ends of documents included.

    Each document is read in windows that overlap by half: every token is predicted once, from at least window / 2 tokens
    before it (fewer only at the document's start). The compressors it stands beside see the documents in one piece.

    Args:
        documents: each coded on its own.
        window: tokens seen at once; not longer than the model was trained on.

    Raises:
        ConfigError: window out of range. DataError: no documents.
    """
    n_bytes = 0

    def sequences() -> Iterable[list[int]]:
        nonlocal n_bytes
        for document in documents:
            n_bytes += len(document.text.encode("utf-8"))
            yield [tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.end_id]

    found = likelihood(model, sequences(), window=window, overlap=window // 2, precision=precision)
    if n_bytes == 0:
        raise DataError("no text to measure bits per byte on: the held-out part is empty")
    return found.nats / math.log(2) / n_bytes
