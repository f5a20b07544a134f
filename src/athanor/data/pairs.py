"""Parallel text: a source and its translation in each pair, read, cleaned with every loss counted, and dealt out to batches.

Order and batches are a pure function of the step (law L4).
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from athanor.core.errors import ConfigError, DataError
from athanor.data import compressed
from athanor.tokenizer.bpe import Tokenizer
from athanor.types import Batch, Source

_POOL = 100  # batches whose pairs are sorted by length together


class TextPair(NamedTuple):
    """A text and what it is translated to."""

    source: str
    target: str


class TokenPair(NamedTuple):
    """Ids of both sides: the source as `Tokenizer.prompt` gives it, the target with the end of a text after it."""

    source: list[int]
    target: list[int]

    @property
    def size(self) -> int:
        """Tokens of both."""
        return len(self.source) + len(self.target)


@dataclass(frozen=True)
class Encoded:
    """Pairs as ids, and how many were left out.

    empty  pairs of which a side has no text
    long   pairs of which a side has more than `max_tokens` tokens
    """

    pairs: list[TokenPair]
    empty: int
    long: int

    @property
    def summary(self) -> str:
        """What was left out, in words."""
        return f"{self.empty} with an empty side, {self.long} with a side that is too long"


def read(source: Path, target: Path | None = None, *, lower: bool = False) -> list[TextPair]:
    """Pairs of two files whose lines belong together; or of one, a .tsv (source, tab, target) or a .jsonl ({"source", "target"}).

    Files may be compressed (.gz, .bz2, .xz). Texts become NFC, their white space single spaces. A line ends with "\\n" or
    "\\r\\n" alone: other signs that Unicode calls ends of lines stand within sentences of such files.

    Args:
        source, target: the files.
        lower: whether letters become small ones.

    Raises:
        DataError: a file that cannot be read, holds no pairs, or other numbers of lines; a malformed line, which is named.
    """
    if target is not None:
        left, right = _lines(source), _lines(target)
        if len(left) != len(right):
            raise DataError(
                f"{source} has {len(left)} lines and {target} {len(right)}, and line by line they must be translations of each"
                " other: use files that were made together"
            )
        pairs = list(zip(left, right, strict=True))
    else:
        kind = compressed.suffix(source)
        if kind not in (".tsv", ".jsonl"):
            raise DataError(f"{source} is one file and no .tsv or .jsonl with both sides: give the file of the other side too")
        of_line = _row if kind == ".tsv" else _record
        pairs = [of_line(line, f"{source}, line {n}") for n, line in enumerate(_lines(source), 1)]
    if not pairs:
        raise DataError(f"{source} has no lines: give parallel text")
    return [TextPair(_tidy(a, lower), _tidy(b, lower)) for a, b in pairs]


def _lines(path: Path) -> list[str]:
    lines = compressed.read_text(path).split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def _row(line: str, where: str) -> tuple[str, str]:
    cells = line.split("\t")
    if len(cells) != 2:
        raise DataError(f"{where} has {len(cells)} columns and must have two, source and target: correct it")
    return cells[0], cells[1]


def _record(line: str, where: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}): correct or remove the line") from error
    source, target = (record.get("source"), record.get("target")) if isinstance(record, dict) else (None, None)
    if not isinstance(source, str) or not isinstance(target, str):
        raise DataError(f'{where} must be an object with string fields "source" and "target": correct it')
    return source, target


def _tidy(text: str, lower: bool) -> str:
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return text.lower() if lower else text


def encode(pairs: Sequence[TextPair], tokenizer: Tokenizer, *, max_tokens: int) -> Encoded:
    """Both sides as ids, without pairs that have nothing to learn from or are too long.

    Raises DataError when none is left.
    """
    there = [pair for pair in pairs if pair.source and pair.target]
    sources = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch([pair.source for pair in there])]
    targets = [[*ids, tokenizer.end_id] for ids in tokenizer.encode_batch([pair.target for pair in there])]
    every = map(TokenPair, sources, targets)
    kept = [pair for pair in every if max(len(pair.source), len(pair.target)) <= max_tokens]
    empty, long = len(pairs) - len(there), len(there) - len(kept)
    if not kept:
        raise DataError(
            f"none of {len(pairs)} pairs is left ({empty} have an empty side, {long} one of more than max_tokens ({max_tokens})):"
            " give other text, or raise max_tokens"
        )
    return Encoded(kept, empty, long)


def pack(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], start: int, origin: str = "") -> Batch:
    """One batch of whole pairs: the decoder reads `start` and the target but its last token, and learns the target.

    Args:
        pairs: ids of source and target, both with what ends a text where the model is to see and to say it.
        start: what a target begins with: `model.token_ids.decoder_start`.
        origin: of the batch, named by errors.

    Raises:
        DataError: no pairs, or one that has a side without tokens.
    """
    if not pairs:
        raise DataError(f"batch {origin!r} has no pairs: give at least one")
    empty = [i for i, pair in enumerate(pairs) if not all(map(len, pair))]
    if empty:
        raise DataError(f"pair {empty[0]} of batch {origin!r} has a side without tokens: leave it out, or give its end of text")
    sources, targets = zip(*pairs, strict=True)
    read = chain.from_iterable((start, *target[:-1]) for target in targets)
    source = Source(torch.tensor(list(chain.from_iterable(sources))), torch.tensor(list(map(len, sources))))
    return Batch(
        ids=torch.tensor(list(read)),
        labels=torch.tensor(list(chain.from_iterable(targets))),
        lengths=torch.tensor(list(map(len, targets))),
        origin=origin,
        source=source,
    )


class PairBatches:
    """Pairs in batches of like lengths, in an order shuffled anew each epoch; every pair comes once an epoch.

    An epoch is shuffled, cut into pools of about 100 batches, and each pool sorted by length, so that a batch wastes little where
    its sequences meet in rectangles; the batches of the epoch are then shuffled. Each epoch has the same number of them.

    Args:
        pairs: as `encode` gives them.
        batch_tokens: of sources and targets together, about: a pair more or less, and a little more where an epoch is short.
        start: what an answer begins with.
        seed: of the order.

    Raises:
        ConfigError: the longest pair is longer than a batch.
    """

    def __init__(self, pairs: Sequence[TokenPair], batch_tokens: int, start: int, seed: int) -> None:
        self._pairs, self._start, self._seed = pairs, start, seed
        self._sizes = np.array([pair.size for pair in pairs])
        self._lengths = np.array([(len(pair.target), len(pair.source)) for pair in pairs])
        longest, self._total = int(self._sizes.max()), int(self._sizes.sum())
        if longest > batch_tokens:
            raise ConfigError(f"batch_tokens ({batch_tokens}) must hold the longest pair, of {longest} tokens: raise it")
        self.per_epoch = max(1, self._total // batch_tokens)
        self._epoch, self._batches = -1, list[NDArray[np.int64]]()

    def batch(self, step: int) -> Batch:
        """Batch number `step` of the endless order."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._plan(epoch)
        return pack([self._pairs[i] for i in self._batches[place]], self._start, f"epoch {epoch + 1}, batch {place + 1}")

    def _plan(self, epoch: int) -> list[NDArray[np.int64]]:
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(len(self._pairs))
        pool = np.cumsum(self._sizes[order]) * self.per_epoch // (self._total * _POOL)
        order = order[np.lexsort((*self._lengths[order].T[::-1], pool))]
        before = np.cumsum(self._sizes[order]) - self._sizes[order]
        number = before * self.per_epoch // self._total  # no pair is longer than the mean of batches, so none is empty
        batches = np.split(order, np.flatnonzero(np.diff(number)) + 1)
        assert len(batches) == self.per_epoch
        return [batches[i] for i in rng.permutation(self.per_epoch)]
