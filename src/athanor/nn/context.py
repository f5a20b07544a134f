"""Attention contexts: what one call of a model may see, and where its keys and values live.

A model asks its context for positions, for attention and (recurrent ones) for a scan over time; training on packed sequences,
plain forward passes and cached generation differ in the context and in nothing else.

| context                     | what is in a row                  | who sees whom                                       |
| --------------------------- | --------------------------------- | --------------------------------------------------- |
| Causal, Bidirectional       | B whole sequences of one length   | the past; everything                                |
| Padded                      | the same with padding, any side   | either, never the padding                           |
| Packed                      | sequences laid end to end         | their own sequence: the past, everything, or a prefix |
| WithMemory                  | any of these, of a decoder        | and what an encoder made of the sources             |
| WithLandmarks (landmarks.py) | any of these, of an encoder      | some tokens see, and are seen by, their whole sequence |
| Prefill, Decode (cache.py)  | prompts; one new token a sequence | the past, kept in a cache                           |

Legend: B batch, T time, S keys, H query heads, G key/value heads, K key width, V value width, N tokens laid end to end, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from athanor.nn.rectangle import Rectangle
from athanor.nn.sdpa import PLAIN, Scoring

# Of the memory (.., D): its keys (.., G, K) and values (.., G, V) for one layer.
Project = Callable[[Tensor], tuple[Tensor, Tensor]]
# Of x (B, T, D), true lengths (B,) or None, states (B, W) or None: outputs (B, T, ..) and the states after each last step.
Cell = Callable[[Tensor, "Tensor | None", "Tensor | None"], tuple[Tensor, Tensor]]


class Context(Protocol):
    """What a model needs of a context."""

    positions: Tensor  # (B, T) int64: position of each token within its own sequence
    extent: int  # one more than the largest position
    cached: bool  # whether keys and values are kept for later calls

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring = PLAIN) -> Tensor:
        """Attention of one layer: query (B, T, H, K), key (B, T, G, K), value (B, T, G, V) -> (B, T, H, V)."""
        ...

    def cross(self, layer: int, query: Tensor, project: Project, scoring: Scoring = PLAIN) -> Tensor:
        """Attention to the memory: query (B, T, H, K) -> (B, T, H, V). `project` may be called once for many calls."""
        ...

    def scan(self, layer: int, cell: Cell, x: Tensor) -> Tensor:
        """Run a recurrent cell over every sequence from its start, or from where the cache left it: (B, T, D) -> (B, T, ..)."""
        ...


class Sequences(Context, Protocol):
    """A context of whole sequences, which knows where each of them is."""

    def spans(self) -> tuple[Tensor, Tensor]:
        """Of each sequence the first token's place among all B T, and how many tokens it has: (S,), (S,)."""
        ...


class _Rows:
    """B rows of one length."""

    cached = False

    def __init__(self, positions: Tensor, rectangle: Rectangle, lengths: Tensor | None = None) -> None:
        self.positions = positions
        self.extent = positions.shape[1]
        self._rectangle = rectangle
        self._lengths = lengths

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring = PLAIN) -> Tensor:
        return self._rectangle.attend(query, key, value, scoring)

    def cross(self, layer: int, query: Tensor, project: Project, scoring: Scoring = PLAIN) -> Tensor:
        raise AssertionError("this context has no memory: wrap it in WithMemory")

    def scan(self, layer: int, cell: Cell, x: Tensor) -> Tensor:
        return cell(x, self._lengths, None)[0]

    def spans(self) -> tuple[Tensor, Tensor]:
        rows, time = self.positions.shape
        starts = torch.arange(rows, device=self.positions.device) * time
        return starts, torch.full_like(starts, time)


class Causal(_Rows):
    """B whole sequences of one length T: each position sees itself and what came before it."""

    def __init__(self, batch: int, time: int, device: torch.device | None = None) -> None:
        at = torch.arange(time, device=device)
        super().__init__(at.expand(batch, time), Rectangle(at, at, causal=True))


class Bidirectional(_Rows):
    """B whole sequences of one length T: each position sees all of its sequence."""

    def __init__(self, batch: int, time: int, device: torch.device | None = None) -> None:
        at = torch.arange(time, device=device)
        super().__init__(at.expand(batch, time), Rectangle(at, at, causal=False))


class Padded(_Rows):
    """B sequences with padding on any side; what comes out at padding means nothing.

    Args:
        mask: (B, T) bool or 0 and 1, true for tokens and false for padding; each row's tokens stand together.
        causal: whether positions see only the past.
    """

    def __init__(self, mask: Tensor, causal: bool) -> None:
        mask = mask.bool()
        positions = (mask.cumsum(1) - 1).clamp_(min=0)
        at = torch.arange(mask.shape[1], device=mask.device)
        # Steps of the row and positions of the sequence differ by a constant of the row, so differences are the same.
        super().__init__(positions, Rectangle(at, at, causal, hidden=~mask), mask.sum(1))
        self._mask = mask

    def scan(self, layer: int, cell: Cell, x: Tensor) -> Tensor:
        # To the left edge and back: a recurrence must not run over padding.
        order = torch.argsort((~self._mask).int(), dim=1, stable=True)
        turn = order.unsqueeze(-1).expand_as(x)
        out = cell(x.gather(1, turn), self._lengths, None)[0]
        return torch.empty_like(out).scatter(1, order.unsqueeze(-1).expand_as(out), out)

    def spans(self) -> tuple[Tensor, Tensor]:
        starts, _ = super().spans()
        # A row of nothing but padding counts as one token.
        return starts + self._mask.int().argmax(1), self._mask.sum(1).clamp(min=1)


class _Gather(torch.autograd.Function):
    """Rows of x by `index`, where `inverse` says where each row of x went: both directions are gathers, never scatters of sums.

    Rows of the result that no row of x owns (padding) receive no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class _Ungather(torch.autograd.Function):
    """The inverse of `_Gather`: takes the rows at `inverse` back out; padding rows get a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.rows = x.shape[0]
        return x.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        grad = grads[0].new_zeros((ctx.rows, *grads[0].shape[1:]))
        return grad.index_copy_(0, inverse, grads[0]), None


def _within(starts: Tensor, lengths: Tensor, step: Tensor) -> Tensor:
    """(S, steps): which token stands at each step of S sequences laid end to end. After its end a sequence's last token stands:
    one of another sequence would be multiplied by probability 0, and carry over what is not finite."""
    own = starts[:, None] + torch.minimum(step, (lengths - 1)[:, None])
    return torch.where(lengths[:, None] > 0, own, 0)


class Packed:
    """S sequences of any lengths laid end to end as (1, N): no token sees another sequence (law L3).

    Attention gathers sequences of similar length into small rectangles and runs plain attention on each, which on CPUs is
    several times as fast as a document mask over the whole row. Everything else in the model runs on the N tokens, without
    padding.

    Args:
        lengths: (S,) tokens of each sequence, in order; they sum to N.
        causal: whether positions see only the past.
        prefix: (S,), tokens at the start of each sequence that see each other and are seen by all (prefix-LM); causal only.
    """

    cached = False
    _WASTE = 1.5  # within a rectangle the longest sequence is at most this many times the shortest
    # Rectangles come in few sizes, since oneDNN prepares (and keeps) code for each: these are what sides are rounded up to.
    _LONG, _MANY = 16, 8

    def __init__(self, lengths: Tensor, causal: bool = True, prefix: Tensor | None = None) -> None:
        device = lengths.device
        sizes = lengths.tolist()
        starts = torch.cumsum(lengths, 0) - lengths
        n = sum(sizes)
        self.lengths = lengths
        self.extent = max(sizes)
        self.positions = (torch.arange(n, device=device) - torch.repeat_interleave(starts, lengths)).unsqueeze(0)
        self._shape: tuple[int, int] | None = None
        self._landmarks: dict[int, tuple[Tensor, list[Tensor]]] = {}
        # first row of the gathered tensor, sequences, padded length, true lengths, who sees whom
        self._groups: list[tuple[int, int, int, Tensor, Rectangle]] = []
        if len(set(sizes)) == 1:
            self._shape = (len(sizes), sizes[0])
            at = torch.arange(sizes[0], device=device)
            self._whole = Rectangle(at, at, causal, prefix=prefix)
            return
        order = sorted(range(len(sizes)), key=sizes.__getitem__)
        index: list[Tensor] = []
        inverse = torch.empty(n, dtype=torch.int64, device=device)
        first = row = 0
        while first < len(order):
            last = first
            while last < len(order) and sizes[order[last]] <= self._WASTE * sizes[order[first]]:
                last += 1
            members = torch.tensor(order[first:last], device=device)
            longest = -(-sizes[order[last - 1]] // self._LONG) * self._LONG
            step = torch.arange(longest, device=device)
            inside = step < lengths[members, None]  # (members, longest)
            where = _within(starts[members], lengths[members], step)
            slots = row + torch.arange(where.numel(), device=device).view_as(where)
            inverse[where[inside]] = slots[inside]
            count = last - first if last - first < self._MANY else -(-(last - first) // self._MANY) * self._MANY
            fill = (0, count - (last - first))
            index.append(F.pad(where, (0, 0, *fill)).flatten())
            true = F.pad(lengths[members], fill, value=1)
            # Causal rows never see the padding after them.
            hidden = None if causal else step >= true[:, None]
            before = None if prefix is None else F.pad(prefix[members], fill)
            self._groups.append((row, count, longest, true, Rectangle(step, step, causal, hidden, before)))
            row += count * longest
            first = last
        self._index, self._inverse = torch.cat(index), inverse

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring = PLAIN) -> Tensor:
        if self._shape is not None:
            q, k, v = (x.reshape(*self._shape, *x.shape[2:]) for x in (query, key, value))
            out = self._whole.attend(q, k, v, self._of_groups(scoring)[0])
            return out.reshape(*query.shape[:3], out.shape[3])
        return self.by_groups(query, key, value, scoring)

    def by_groups(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """`attend` for sequences of several lengths."""
        q, k, v = (_Gather.apply(x[0], self._index, self._inverse) for x in (query, key, value))
        pieces = []
        for (row, count, longest, _, rectangle), own in zip(self._groups, self._of_groups(scoring), strict=True):
            end = row + count * longest
            a, b, c = (x[row:end].view(count, longest, *x.shape[1:]) for x in (q, k, v))
            pieces.append(rectangle.attend(a, b, c, own).reshape(count * longest, q.shape[1], v.shape[2]))
        out = _Ungather.apply(torch.cat(pieces), self._inverse)
        return out.unsqueeze(0)

    def _of_groups(self, scoring: Scoring) -> list[Scoring]:
        """The scoring of each group. Its landmarks are made once, so that a rectangle's mask serves all layers."""
        marks, groups = scoring.landmarks, self._groups
        if marks is None:
            return [scoring] * max(len(groups), 1)
        if id(marks) not in self._landmarks:
            if self._shape is not None:
                pieces = [marks.view(self._shape)]
            else:
                spread = marks[0].index_select(0, self._index)
                pieces = [spread[row : row + n * longest].view(n, longest) for row, n, longest, *_ in groups]
            self._landmarks[id(marks)] = marks, pieces  # an id is only good while its object lives
        return [replace(scoring, landmarks=piece) for piece in self._landmarks[id(marks)][1]]

    def cross(self, layer: int, query: Tensor, project: Project, scoring: Scoring = PLAIN) -> Tensor:
        raise AssertionError("this context has no memory: wrap it in WithMemory")

    def scan(self, layer: int, cell: Cell, x: Tensor) -> Tensor:
        return self._scan(cell, x)[0]

    def spans(self) -> tuple[Tensor, Tensor]:
        return torch.cumsum(self.lengths, 0) - self.lengths, self.lengths

    def _scan(self, cell: Cell, x: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (1, N, ..) and states (S, W). All sequences stand in one rectangle: it is steps that cost."""
        out, state = cell(to_rows(x[0], self.lengths), self.lengths, None)
        return from_rows(out, self.lengths).unsqueeze(0), state


class Memory:
    """What an encoder made of the sources, as the decoder sees it.

    Args:
        hidden: (B, S, D), or (1, M, D) laid end to end.
        lengths: tokens of each source, needed when they are laid end to end.
        mask: (B, S) bool, true for tokens, for sources with padding.
    """

    def __init__(self, hidden: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None) -> None:
        self.hidden = hidden
        self.lengths = lengths
        self.mask = None if mask is None else mask.bool()

    def rows(self, x: Tensor) -> Tensor:
        """What was computed of `hidden` (1, M, ..) or (B, S, ..), as (B, S, ..)."""
        return x if self.lengths is None else to_rows(x[0], self.lengths)

    def hidden_keys(self) -> Tensor | None:
        """(B, S) bool: keys that are padding."""
        if self.lengths is not None:
            longest = int(self.lengths.max())
            return torch.arange(longest, device=self.lengths.device) >= self.lengths[:, None]
        return None if self.mask is None else ~self.mask


def to_rows(x: Tensor, lengths: Tensor) -> Tensor:
    """Sequences laid end to end (N, ..) as rows (S, longest, ..); what stands after a sequence's end is arbitrary."""
    longest = int(lengths.max())
    step = torch.arange(longest, device=x.device)
    inside = step < lengths[:, None]
    starts = torch.cumsum(lengths, 0) - lengths
    index = _within(starts, lengths, step).flatten()
    rows: Tensor = _Gather.apply(x, index, inside.flatten().nonzero().squeeze(1))
    return rows.view(len(lengths), longest, *x.shape[1:])


def from_rows(rows: Tensor, lengths: Tensor) -> Tensor:
    """The inverse of `to_rows`."""
    inside = torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]
    flat: Tensor = _Ungather.apply(rows.flatten(0, 1), inside.flatten().nonzero().squeeze(1))
    return flat


class WithMemory:
    """A context of a decoder that also reads a memory: sequence i reads source i.

    Args:
        inner: Causal, Padded or Packed.
        memory: of as many sources as `inner` has sequences.
    """

    cached = False

    def __init__(self, inner: _Rows | Packed, memory: Memory) -> None:
        self._inner, self._memory = inner, memory
        self.positions, self.extent = inner.positions, inner.extent
        self._lengths = inner.lengths if isinstance(inner, Packed) else None
        longest = inner.extent
        size = int(memory.lengths.max()) if memory.lengths is not None else memory.hidden.shape[1]
        at = torch.arange(max(longest, size), device=self.positions.device)
        self._rectangle = Rectangle(at[:longest], at[:size], causal=False, hidden=memory.hidden_keys())

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring = PLAIN) -> Tensor:
        return self._inner.attend(layer, query, key, value, scoring)

    def cross(self, layer: int, query: Tensor, project: Project, scoring: Scoring = PLAIN) -> Tensor:
        key, value = (self._memory.rows(x) for x in project(self._memory.hidden))
        if self._lengths is None:
            return self._rectangle.attend(query, key, value, scoring)
        rows = to_rows(query[0], self._lengths)
        return from_rows(self._rectangle.attend(rows, key, value, scoring), self._lengths).unsqueeze(0)

    def scan(self, layer: int, cell: Cell, x: Tensor) -> Tensor:
        return self._inner.scan(layer, cell, x)

    def spans(self) -> tuple[Tensor, Tensor]:
        return self._inner.spans()
