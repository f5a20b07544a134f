"""Runs the model for the engine: parts of many sequences at once, over one paged cache."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from athanor.core.device import Precision, autocast
from athanor.core.errors import ConfigError
from athanor.infer.compiled import EXPERTS, Compiled, refusal
from athanor.models.base import CausalLM, EncoderDecoder
from athanor.nn.context import Memory, Packed
from athanor.nn.moe import MixtureOfExperts
from athanor.nn.paged import Paged, PagedCache, Sources

# In bf16, rows that no sequence owns are read along up to a multiple of this: few shapes, for each of which oneDNN
# prepares code. A deterministic pass has as many.
_ROWS = 16


class Part(NamedTuple):
    """Tokens of one sequence that are to be computed.

    tokens  new ones
    start   how many stand before them in the cache
    table   blocks that hold these and will hold those
    slot    of its recurrent state, and of what cross attention reads
    wanted  of how many of them, the last ones, hidden states are wanted
    source  what an encoder-decoder answers, where this is the first that is computed
    """

    tokens: Sequence[int]
    start: int
    table: Sequence[int]
    slot: int
    wanted: int
    source: Sequence[int] | None = None


def _steady(model: CausalLM | EncoderDecoder, precision: Precision) -> bool:
    """Whether what experts make of a token does not depend on the tokens beside it, to the last bit."""
    mixtures = [m for m in model.modules() if isinstance(m, MixtureOfExperts)]
    dtypes = [torch.bfloat16 if precision == "bf16" else m.experts.down.weight.dtype for m in mixtures]
    return all(m.capacity is None and m.experts.steady(dtype) for m, dtype in zip(mixtures, dtypes, strict=True))


class Runner:
    """A model and its cache.

    Args:
        model: in the state in which it answers; the very module that is trained.
        blocks: of the cache, the one that belongs to nobody included.
        size: tokens of a block.
        slots: sequences at once.
        precision: of the matrix products.
        deterministic: whether every token is computed in shapes that do not depend on what else is computed.

    Raises:
        ConfigError: a deterministic one of a model that cannot be.
    """

    def __init__(
        self,
        model: CausalLM | EncoderDecoder,
        blocks: int,
        size: int,
        slots: int,
        precision: Precision = "fp32",
        deterministic: bool = False,
    ) -> None:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        if deterministic and (why := refusal(model)) and not (why == EXPERTS and _steady(model, precision)):
            raise ConfigError(
                f"a {model.model_type} {why}, so that what is computed beside may change its last bits: leave `deterministic` out"
            )
        self.model, self.precision, self.deterministic = model, precision, deterministic
        self.cache = PagedCache(model.cache_layers(), blocks, size, slots + 1, dtype, model.device)
        self._idle_slot = slots
        self.spoilt: set[int] = set()  # slots of the last run's parts of which something is not finite
        self.compiled: Compiled | None = None
        self.sources = None
        if isinstance(model, EncoderDecoder):
            self.sources = Sources(model.cross_layers(), slots + 1, dtype, model.device)

    @torch.inference_mode()
    def compile(self, max_len: int) -> None:
        """Compile the step of single tokens; see `Compiled` for what it raises."""
        made = Compiled(self.model, self.cache, max_len, self._idle_slot)
        # Once as it is, for what layers make when they are first called.
        self._pass([Part((0,), 0, (0,), self._idle_slot, 1)])
        self.compiled = made
        with autocast(self.model.device, self.precision):
            made.prepare()

    @torch.inference_mode()
    def run(self, parts: Sequence[Part]) -> Tensor:
        """Hidden states (sum of `wanted`, D): single tokens in one pass, parts of prompts in another; equal prompts once."""
        self.spoilt.clear()
        first: dict[Hashable, int] = {}
        same = [i if part.start else first.setdefault(_identity(part), i) for i, part in enumerate(parts)]
        found: list[Tensor] = []
        places: dict[int, range] = {}  # of a part: its rows in what is found
        rows = 0
        for single in (True, False):
            some = [i for i, p in enumerate(parts) if same[i] == i and (len(p.tokens) == 1 and p.source is None) == single]
            if some:
                found.append((self._slabs if self.deterministic else self._pass)([parts[i] for i in some]))
                for i in some:
                    places[i] = range(rows, rows := rows + parts[i].wanted)
        copies = [(parts[a], parts[i]) for i, a in enumerate(same) if a != i]
        if copies:
            self._copy(copies)
            self.spoilt |= {to.slot for part, to in copies if part.slot in self.spoilt}
        hidden = found[0] if len(found) == 1 else torch.cat(found)
        order = [*chain.from_iterable(places[a] for a in same)]
        return hidden if order == [*range(rows)] else hidden[torch.tensor(order, device=hidden.device, dtype=torch.int64)]

    @torch.inference_mode()
    def clear(self, blocks: Sequence[int], slot: int) -> None:
        """Leave nothing of a sequence that is not finite: what it is multiplied with, if only by 0, is not either."""
        self.cache.clear(torch.tensor(blocks, device=self.model.device, dtype=torch.int64))
        if self.sources is not None:
            self.sources.clear(slot)

    def _see(self, hidden: Tensor, parts: Sequence[Part]) -> None:
        """Which parts are spoilt. One sum tells that there is none."""
        if not torch.isfinite(hidden.sum(dtype=torch.float32)):
            rows = hidden.isfinite().all(-1).split([len(part.tokens) for part in parts])
            self.spoilt |= {part.slot for part, fine in zip(parts, rows, strict=True) if not fine.all()}

    def _copy(self, pairs: Sequence[tuple[Part, Part]]) -> None:
        """Give the second of each pair what the first has in the cache."""

        def numbers(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), device=self.model.device)

        def blocks(part: Part) -> Sequence[int]:  # of these tokens: one of two tables may hold room for guesses, too
            return part.table[: -(-len(part.tokens) // self.cache.size)]

        source, target = (numbers(chain.from_iterable(blocks(pair[k]) for pair in pairs)) for k in (0, 1))
        slots = [numbers(pair[k].slot for pair in pairs) for k in (0, 1)]
        self.cache.copy(source, target, *slots)
        if self.sources is not None:
            self.sources.copy(*slots)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V) float32."""
        rows = hidden.shape[0]
        if self.deterministic and rows != _ROWS:
            whole = F.pad(hidden, (0, 0, 0, -rows % _ROWS))
            return torch.cat([self.logits(slab) for slab in whole.split(_ROWS)])[:rows]
        with autocast(self.model.device, self.precision):
            if self.precision == "bf16" and rows > _ROWS and rows % _ROWS:
                hidden = torch.cat((hidden, hidden.new_zeros(-rows % _ROWS, hidden.shape[1])))
            return self.model.logits(hidden)[:rows].float()

    def _slabs(self, parts: Sequence[Part]) -> Tensor:
        """What `_pass` gives, token by token and always as many at a time: every product has the same shape."""
        singles: list[Part] = []
        for part in parts:
            unwanted = len(part.tokens) - part.wanted
            for i, token in enumerate(part.tokens):
                singles.append(Part((token,), part.start + i, part.table, part.slot, int(i >= unwanted)))
        singles += [Part((0,), 0, (0,), self._idle_slot, 0)] * (-len(singles) % _ROWS)
        return torch.cat([self._pass(singles[i : i + _ROWS]) for i in range(0, len(singles), _ROWS)])

    def _pass(self, parts: list[Part]) -> Tensor:
        device, single = self.model.device, len(parts[0].tokens) == 1
        if single and len(parts) > _ROWS and self.precision == "bf16":
            parts = parts + [Part((0,), 0, (0,), self._idle_slot, 0)] * (-len(parts) % _ROWS)
        longest = max(len(part.table) for part in parts)
        tables = torch.tensor([[*part.table, *[0] * (longest - len(part.table))] for part in parts], device=device)
        starts = torch.tensor([part.start for part in parts], device=device)
        lengths = [len(part.tokens) for part in parts]
        slots = torch.tensor([part.slot for part in parts], device=device)
        ids = torch.tensor([[token for part in parts for token in part.tokens]], device=device)
        with autocast(device, self.precision):
            if single and self.compiled is not None:
                hidden = self.compiled(ids, tables, starts)
            else:
                if self.sources is not None:
                    self._read_sources(parts)
                sizes = torch.tensor(lengths, device=device)
                ctx = Paged(self.cache, tables, starts, sizes, slots, self.sources, self.deterministic)
                hidden = self.model.hidden(ids, ctx)[0]
        self._see(hidden, parts)
        ends = accumulate(lengths)
        wanted = [i for part, end in zip(parts, ends, strict=True) for i in range(end - part.wanted, end)]
        if len(wanted) == len(hidden):
            return hidden
        return hidden.index_select(0, torch.tensor(wanted, device=device, dtype=torch.int64))

    def _read_sources(self, parts: Sequence[Part]) -> None:
        """Encode the sources that are new; what cross attention reads of them is kept by their slots."""
        assert self.sources is not None and isinstance(self.model, EncoderDecoder)
        new = [part for part in parts if part.source is not None]
        self.sources.pending = None
        if new:
            device = self.model.device
            lengths = torch.tensor([len(part.source or ()) for part in new], device=device)
            ids = torch.tensor([[token for part in new for token in part.source or ()]], device=device)
            hidden = self.model.encode(ids, Packed(lengths, causal=False))
            self.sources.receive(Memory(hidden, lengths), torch.tensor([part.slot for part in new], device=device))


def _identity(part: Part) -> Hashable:
    """Equal for parts that are the whole beginning of the same text."""
    return tuple(part.tokens), tuple(part.source or ()), part.wanted
