"""From tokens to batches: sequences laid end to end, never padded, labels already shifted.

Every function of a step is pure: the same arguments give the same batch, so a resumed run sees the data it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from athanor.core.errors import ConfigError, DataError
from athanor.data.shards import TokenShard
from athanor.types import IGNORE, Batch, Source


class Tokens(Protocol):
    """What is packed: ids and which of them are learned (`tokenizer.chat.Rendered` is one)."""

    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def loss_mask(self) -> Sequence[bool]: ...


def pack(sequences: Iterable[Tokens], origin: str = "") -> Batch:
    """One batch of whole sequences. Position i predicts token i + 1 of its own sequence where loss_mask[i + 1] is set.

    Raises DataError when there is no sequence, or one with fewer than two tokens.
    """
    ids: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    for n, s in enumerate(sequences):
        if len(s.ids) < 2:
            raise DataError(f"sequence {n} of batch {origin!r} has {len(s.ids)} tokens: it takes 2 to predict one from another")
        ids += s.ids[:-1]
        labels += [token if learned else IGNORE for token, learned in zip(s.ids[1:], s.loss_mask[1:], strict=True)]
        lengths.append(len(s.ids) - 1)
    if not lengths:
        raise DataError(f"batch {origin!r} has no sequences: give at least one")
    return Batch(torch.tensor(ids), torch.tensor(labels), torch.tensor(lengths), origin=origin)


def join(batches: Sequence[Batch]) -> Batch:
    """Several batches as one; extras and sources that not all of them have are refused by assertion."""
    assert all(b.extras.keys() == batches[0].extras.keys() for b in batches)
    sources = [b.source for b in batches if b.source is not None]
    assert len(sources) in (0, len(batches))
    return Batch(
        ids=torch.cat([b.ids for b in batches]),
        labels=torch.cat([b.labels for b in batches]),
        lengths=torch.cat([b.lengths for b in batches]),
        extras={k: torch.cat([b.extras[k] for b in batches]) for k in batches[0].extras},
        origin=" + ".join(b.origin for b in batches),
        source=Source(torch.cat([s.ids for s in sources]), torch.cat([s.lengths for s in sources])) if sources else None,
    )


def fill(batch: Batch, multiple: int = 256) -> Batch:
    """The batch with sequences added that nothing is learned from, so that its tokens are a multiple of `multiple`.

    Batches of ever new sizes make oneDNN prepare code for each, which takes a sixth of a step and is kept (docs/log.md).
    None is longer than the longest that was there. Sources are filled up likewise, by those of the added sequences.
    """
    missing, source = -len(batch.ids) % multiple, batch.source
    lacking = 0 if source is None else -len(source.ids) % multiple
    if missing == 0 and lacking == 0:
        return batch
    count = -(-missing // int(batch.lengths.max()))
    if source is not None:  # a sequence has a source, so neither can be added alone, and each has a token at least
        before = -1
        while before != (before := missing + lacking):
            count = max(-(-missing // int(batch.lengths.max())), -(-lacking // int(source.lengths.max())))
            missing, lacking = (n + max(0, -(-(count - n) // multiple)) * multiple for n in (missing, lacking))
        source = Source(F.pad(source.ids, (0, lacking)), torch.cat([source.lengths, _parts(lacking, count)]))
    extras = {
        k: F.pad(v, (0, missing if len(v) == len(batch.ids) else count), value=1 if k == "temperature" else 0)
        for k, v in batch.extras.items()
    }
    return Batch(
        ids=F.pad(batch.ids, (0, missing)),
        labels=F.pad(batch.labels, (0, missing), value=IGNORE),
        lengths=torch.cat([batch.lengths, _parts(missing, count)]),
        extras=extras,
        origin=batch.origin,
        source=source,
    )


def _parts(tokens: int, count: int) -> torch.Tensor:
    """`tokens` in `count` nearly equal parts."""
    return torch.tensor([tokens // count + (i < tokens % count) for i in range(count)])


def select(batch: Batch, sequences: Sequence[int]) -> Batch:
    """The given sequences of a batch, in the order given, with their extras and sources."""
    chosen = torch.as_tensor(sequences, dtype=torch.int64)
    at = _tokens(batch.lengths, chosen)
    source = batch.source
    return Batch(
        ids=batch.ids[at],
        labels=batch.labels[at],
        lengths=batch.lengths[chosen],
        extras={k: v[at] if len(v) == len(batch.ids) else v[chosen] for k, v in batch.extras.items()},
        origin=batch.origin,
        source=None if source is None else Source(source.ids[_tokens(source.lengths, chosen)], source.lengths[chosen]),
    )


def _tokens(lengths: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Where the tokens of the chosen sequences stand."""
    starts, sizes = (torch.cumsum(lengths, 0) - lengths)[chosen], lengths[chosen]
    inside = torch.arange(int(sizes.sum())) - torch.repeat_interleave(torch.cumsum(sizes, 0) - sizes, sizes)
    return torch.repeat_interleave(starts, sizes) + inside


def share(batch: Batch, ranks: int) -> list[Batch]:
    """The batch dealt out to `ranks` processes, whole sequences, about as many tokens to each; the same on every process.

    Raises DataError when there are fewer sequences with a target than ranks: a rank would have nothing to learn from.
    """
    if ranks == 1:
        return [batch]
    owner = torch.repeat_interleave(torch.arange(len(batch.lengths)), batch.lengths)
    learned = torch.zeros(len(batch.lengths), dtype=torch.int64).index_add_(0, owner, (batch.labels != IGNORE).long()) > 0
    if int(learned.sum()) < ranks:
        raise DataError(
            f"batch {batch.origin!r} has {int(learned.sum())} sequences with a target and must have one for each of the {ranks}"
            " ranks: take larger batches, or fewer ranks"
        )
    sizes = batch.lengths + (0 if batch.source is None else batch.source.lengths)
    order = sorted(range(len(sizes)), key=lambda i: (not learned[i], -int(sizes[i]), i))
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for place, i in enumerate(order):
        rank = place if place < ranks else loads.index(min(loads))
        dealt[rank].append(i)
        loads[rank] += int(sizes[i])
    return [select(batch, sorted(members)) for members in dealt]


class Rows:
    """A token shard cut into rows of one length, in an order shuffled anew each epoch.

    Documents that meet in a row stay apart: attention does not cross them and no label does.

    Args:
        shard: tokens, each document `<|bos|>` ... `<|end|>`.
        length: tokens of a row.
        seed: of the order.

    Raises:
        ConfigError: the shard is shorter than one row.
    """

    def __init__(self, shard: TokenShard, length: int, seed: int) -> None:
        self.length, self.seed = length, seed
        self._tokens, self._starts = shard.tokens, shard.starts
        self.count = (len(shard.tokens) - 1) // length
        if self.count < 1:
            raise ConfigError(f"row length ({length}) must be below the {len(shard.tokens)} tokens of the shard: lower it")
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def batch(self, first: int, count: int) -> Batch:
        """Rows `first` .. `first` + `count` - 1 of the endless shuffled order."""
        return self._rows([self._at(i) for i in range(first, first + count)], f"rows {first}..{first + count - 1}")

    def _at(self, i: int) -> int:
        epoch, offset = divmod(i, self.count)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            self._epoch = epoch
        return int(self._order[offset])

    def _rows(self, rows: Sequence[int], origin: str) -> Batch:
        ids = np.empty((len(rows), self.length), dtype=np.int64)
        labels = np.empty_like(ids)
        lengths: list[int] = []
        for n, row in enumerate(rows):
            start = row * self.length
            window = self._tokens[start : start + self.length + 1]
            ids[n], labels[n] = window[:-1], window[1:]
            # Document starts inside the row; the position before one has no label, since the next document is unforeseeable.
            low, high = np.searchsorted(self._starts, (start + 1, start + self.length + 1))
            borders = self._starts[low:high] - start
            labels[n, borders - 1] = IGNORE
            edges = [0, *borders[borders < self.length].tolist(), self.length]
            lengths += np.diff(edges).tolist()
        return Batch(
            torch.from_numpy(ids.reshape(-1)), torch.from_numpy(labels.reshape(-1)), torch.tensor(lengths), origin=origin
        )
