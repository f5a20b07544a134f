"""Likelihood of text: bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from athanor.core.device import Precision, autocast
from athanor.core.errors import ConfigError, DataError
from athanor.models.base import CausalLM
from athanor.nn.context import Packed
from athanor.tokenizer.bpe import Tokenizer
from athanor.types import Document

_BATCH_TOKENS = 16_384


@torch.inference_mode()
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
    if not 2 <= window <= model.config.max_positions:
        raise ConfigError(f"window ({window}) must lie between 2 and {model.config.max_positions}, the model's context")
    stride = window // 2
    ids: list[int] = []
    targets: list[int] = []
    keep: list[int] = []
    lengths: list[int] = []
    nats, n_bytes = 0.0, 0

    def flush() -> float:
        with autocast(model.device, precision):
            packed = Packed(torch.tensor(lengths, device=model.device))
            hidden = model.hidden(torch.tensor(ids, device=model.device).unsqueeze(0), packed)[0]
            hidden = hidden.index_select(0, torch.tensor(keep, device=model.device))
            total, _ = model.cross_entropy(hidden, torch.tensor(targets, device=model.device))
        for x in (ids, targets, keep, lengths):
            x.clear()
        return float(total)

    for document in documents:
        tokens = [tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.end_id]
        n_bytes += len(document.text.encode("utf-8"))
        predicted = 0  # tokens[1 .. predicted] are accounted for
        while predicted < len(tokens) - 1:
            start = max(0, predicted - stride)
            end = min(start + window, len(tokens) - 1)
            keep += range(len(ids) + predicted - start, len(ids) + end - start)
            targets += tokens[predicted + 1 : end + 1]
            ids += tokens[start:end]
            lengths.append(end - start)
            predicted = end
            if len(ids) >= _BATCH_TOKENS:
                nats += flush()
    if n_bytes == 0:
        raise DataError("no text to measure bits per byte on: the held-out part is empty")
    if ids:
        nats += flush()
    return nats / math.log(2) / n_bytes
