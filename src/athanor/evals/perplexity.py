"""Perplexity of a text per word, byte or token, whatever the tokenizer: exp(-log p(text) / units)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from athanor.core.device import Precision
from athanor.core.errors import ConfigError, DataError
from athanor.evals.likelihood import likelihood
from athanor.models.base import CausalLM
from athanor.tokenizer.vocabulary import Vocabulary

Unit = Literal["word", "byte", "token"]
UNITS: tuple[Unit, ...] = get_args(Unit)


@dataclass(frozen=True)
class Perplexity:
    """What a model makes of a text.

    nats     -log p of its predicted tokens: what the whole text costs
    words    what stands between spaces, and one end of line for each line (`count_words`)
    bytes    of UTF-8
    tokens   predicted tokens
    given    tokens that nothing stands before, so that they were not predicted: 1 where the model knows no beginning of a text
    windows  that the text was read in
    context  tokens that stood before each predicted one at least, once the text has as many
    """

    nats: float
    words: int
    bytes: int
    tokens: int
    given: int
    windows: int
    context: int

    def per(self, unit: Unit) -> float:
        """exp(nats / number of units)."""
        return math.exp(self.nats / getattr(self, f"{unit}s"))

    @property
    def bits_per_byte(self) -> float:
        """-log2 p / bytes."""
        return self.nats / math.log(2) / self.bytes


def count_words(text: str) -> int:
    """Words between spaces, and an end of line for each line, as word-level models are measured on WikiText (Merity et al. 2016).

    The test part of WikiText-2 has 245,569.
    """
    lines = text.count("\n") + (not text.endswith("\n") and text != "")
    return len(text.split()) + lines


def perplexity(
    model: CausalLM, vocabulary: Vocabulary, text: str, *, window: int, stride: int, precision: Precision = "fp32"
) -> Perplexity:
    """Measure `model` on one text, read in windows that each predict `stride` new tokens.

    The text is split into the vocabulary's tokens, whose nats are summed; units are counted on the text, so models with different
    vocabularies can be compared. That sum is at least -log p of the text, which other ways of splitting it would add to.

    Args:
        vocabulary: the model's; what begins a text stands before it, where there is such a token.
        window: tokens seen at once.
        stride: at least 1; with `window` itself windows do not overlap.

    Raises:
        ConfigError: window or stride out of range. DataError: a text without two tokens.
    """
    if not 1 <= stride <= window:
        raise ConfigError(f"stride ({stride}) must lie between 1 and window ({window}): half of it is usual")
    begins = vocabulary.bos_id if model.token_ids.bos is None else model.token_ids.bos
    ids = [*([] if begins is None else [begins]), *vocabulary.encode(text)]
    if len(ids) < 2:
        raise DataError(f"the text's {len(ids) - (begins is not None)} tokens hold none that can be predicted: give a longer one")
    found = likelihood(model, [ids], window=window, overlap=window - stride, precision=precision)
    return Perplexity(
        nats=found.nats,
        words=count_words(text),
        bytes=len(text.encode("utf-8")),
        tokens=found.tokens,
        given=int(begins is None),
        windows=found.windows,
        context=window - stride + 1,
    )
