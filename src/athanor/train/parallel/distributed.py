"""Several processes: copies (ddp), shared weights (fsdp), split products (tp) and experts dealt out (ep), in any product.

`fsdp` and `hsdp` are FSDP2; copies alone sum their gradients after the last micro-batch, in buckets. Every gradient is a
sum over all targets of all processes, divided once (law L3), so that no layout changes what is learnt.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from athanor.core.device import TrainPrecision, autocast
from athanor.core.errors import ConfigError
from athanor.data.pack import fill, share
from athanor.models.base import LanguageModel
from athanor.nn.moe import MixtureOfExperts
from athanor.train.parallel import expert, tensor
from athanor.train.parallel.base import Alone, Objective, Sums, local
from athanor.train.parallel.layout import Layout
from athanor.train.parallel.support import reason
from athanor.train.pieces import Held, Piece
from athanor.types import Batch

_BUCKET = 1 << 23  # numbers summed in one collective
_AXES = ("pp", "ddp", "fsdp", "tp")


class _Unit(nn.Module):
    """A model and an objective as one module, so that FSDP gathers weights outside of blocks for as long as both need them."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, objective: Objective, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        return objective(self.model, batch)


@dataclass(frozen=True)
class _Place:
    """Where a parameter's numbers are.

    shape    of the whole tensor
    ways     processes it is split over by tp or ep, and which of them this one is
    parts    of its rows, each of which is split; () for columns
    shards   processes that share its (remaining) rows by fsdp, and which of them this one is
    copies   processes that hold the same numbers
    writes   whether this process writes them into checkpoints
    """

    shape: tuple[int, ...]
    ways: tuple[int, int] = (1, 0)
    parts: tuple[int, ...] = ()
    shards: tuple[int, int] = (1, 0)
    copies: int = 1
    writes: bool = True

    def held(self) -> Held:
        if not self.shape:
            return Held((), (Piece((), (), ()),), self.writes)
        ways, index = self.ways
        rows, columns = [(0, self.shape[0])], (0, *self.shape[1:2])
        if ways > 1 and self.parts:
            starts = [sum(self.parts[:i]) for i in range(len(self.parts))]
            rows = [(s + n // ways * index, n // ways) for s, n in zip(starts, self.parts, strict=True)]
        elif ways > 1:
            columns = (self.shape[1] // ways * index, self.shape[1] // ways)
        total = sum(n for _, n in rows)
        each = -(-total // self.shards[0])  # as torch.chunk deals them
        low, high = min(total, each * self.shards[1]), min(total, each * (self.shards[1] + 1))
        pieces, before = [], 0
        rest = (*columns[1:], *self.shape[2:])
        for start, n in rows:
            a, b = max(low, before), min(high, before + n)
            if a < b:
                origin = (columns[0],) if len(self.shape) > 1 else ()
                zeros = (0,) * len(self.shape[2:])
                inside = (0,) * len(self.shape[1:])
                pieces.append(Piece((a - low, *inside), (start + a - before, *origin, *zeros), (b - a, *rest)))
            before += n
        return Held(self.shape, tuple(pieces), self.writes)


@dataclass
class Surgery:
    """What was done to the parameters of a model, by name.

    splits   by tp
    partial  gradients that are to be summed over tp
    dealt    experts, whose gradients are whole where they are
    copies   processes of the pipeline that hold the same, where that is more than one
    silent   those that another process of the pipeline writes into checkpoints
    """

    splits: dict[str, tensor.Split] = field(default_factory=dict)
    partial: list[str] = field(default_factory=list)
    dealt: set[str] = field(default_factory=set)
    copies: dict[str, int] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)


@dataclass
class _Model:
    """The model that is trained: where its parameters are, their names by identity, `Surgery.partial` and `.dealt`."""

    model: LanguageModel
    places: dict[str, _Place]
    names: dict[int, str]
    partial: list[nn.Parameter]
    dealt: set[int]


class Distributed(Alone):
    """The strategy of a layout without a pipeline.

    Args:
        layout: of all processes of the group, which exists already.
        device: of this process.
    """

    summed: tuple[str, ...] = ("ddp", "fsdp")  # directions in which losses are added up

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self._device = layout, device
        sizes = tuple(getattr(layout, name) for name in _AXES)
        self.mesh = init_device_mesh(device.type, sizes, mesh_dim_names=_AXES)
        self.at = {name: self.mesh.get_local_rank(name) for name in _AXES}
        self.ranks = layout.data
        self.rank = self.at["ddp"] * layout.fsdp + self.at["fsdp"]
        self.seconds = 0.0
        self._placed: _Model | None = None

    @property
    def device(self) -> torch.device:
        return self._device

    # What is done to the model.

    def place(self, model: LanguageModel) -> LanguageModel:
        why = reason(model, self.layout)
        if why:
            raise ConfigError(f"{why} (layout {self.layout})")
        layout = self.layout
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._unit = _Unit(model)
        done = self.prepare(model)
        if layout.fsdp > 1:
            self._shard(self.units())
        by_name = dict(model.named_parameters())
        places = {}
        for name in by_name:
            cut = done.splits.get(name)
            ways, copies = (1, 0), layout.ddp * layout.tp * done.copies.get(name, 1)
            parts: tuple[int, ...] = ()
            writes = self.at["ddp"] == 0 and (cut is not None or self.at["tp"] == 0) and name not in done.silent
            if cut is not None:
                ways, parts, copies = (layout.tp, self.at["tp"]), cut.parts, layout.ddp
            elif name in done.dealt:
                ways, parts, copies, writes = (layout.ep, self.at["ddp"]), shapes[name][:1], 1, True
            places[name] = _Place(shapes[name], ways, parts, (layout.fsdp, self.at["fsdp"]), copies, writes)
        self._placed = _Model(
            model,
            places,
            {id(p): name for name, p in by_name.items()},
            [by_name[name] for name in done.partial if name in by_name],
            {id(by_name[name]) for name in done.dealt},
        )
        return model

    def prepare(self, model: LanguageModel) -> Surgery:
        """Cut the model; its parameters are shared by fsdp afterwards."""
        done = Surgery()
        if self.layout.tp > 1:
            cut = tensor.apply(model, self.mesh["tp"])
            done.splits, done.partial = cut.splits, cut.partial
        if self.layout.ep > 1:
            done.dealt = expert.apply(model, self.mesh["ddp"].get_group())
        return done

    def units(self) -> Sequence[nn.Module]:
        """What is computed as a whole, each with its own parameters."""
        return [self._unit]

    def _shard(self, units: Sequence[nn.Module]) -> None:
        mesh = self.mesh["ddp", "fsdp"] if self.layout.ddp > 1 else self.mesh["fsdp"]
        for unit in units:
            for name, module in unit.named_modules():
                if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "blocks":
                    for block in module:
                        if next(block.parameters(), None) is not None:
                            fully_shard(block, mesh=mesh, reshard_after_forward=self.layout.zero == 3)
            fully_shard(unit, mesh=mesh, reshard_after_forward=False)
            for module in unit.modules():
                if isinstance(module, FSDPModule):
                    module.set_gradient_divide_factor(1.0)  # sums: the loop divides once
                    module.set_force_sum_reduction_for_comms(True)  # gloo has no other

    # What is computed.

    def share(self, micro: Sequence[Batch]) -> list[Batch]:
        size = 256 * self.layout.tp
        return [fill(share(batch, self.ranks)[self.rank], size) if self.layout.world > 1 else batch for batch in micro]

    def accumulate(
        self, model: LanguageModel, objective: Objective, micro: Sequence[Batch], precision: TrainPrecision, scale: float = 1.0
    ) -> Sums:
        self._of(model)
        sums = Sums(torch.zeros((), dtype=torch.float64, device=self.device))
        for batch in micro:
            with autocast(self.device, precision):
                loss, count, metrics = self._unit(objective, batch.to(self.device))
            # Not looked at here: if it is not finite all processes must learn of it together, in `gradients`.
            (loss if scale == 1.0 else loss * scale).backward()
            sums.add(loss, count, metrics)
        return sums

    @torch.no_grad()
    def evaluate(self, model: LanguageModel, objective: Objective, micro: Sequence[Batch], precision: TrainPrecision) -> Sums:
        self._of(model)
        sums = Sums(torch.zeros((), dtype=torch.float64, device=self.device))
        for batch in self.share(micro):
            with autocast(self.device, precision):
                sums.add(*self._unit(objective, batch.to(self.device)))
        return self.total(sums)

    def reduce(self, model: LanguageModel, sums: Sums) -> Sums:
        placed = self._of(model)
        with self._clock():
            if placed.partial:
                self._sum([p.grad for p in placed.partial], self.mesh["tp"].get_group())
            if self.layout.ddp > 1 and self.layout.fsdp == 1:
                grads = [p.grad for p in model.parameters() if id(p) not in placed.dealt]
                self._sum(grads, self.mesh["ddp"].get_group())
        return self.total(sums)

    def total(self, sums: Sums) -> Sums:
        """The sums of all processes that take different data."""
        names = sorted(sums.metrics)
        values = torch.stack([sums.loss, sums.loss.new_tensor(float(sums.count)), *(sums.metrics[n] for n in names)])
        with self._clock():
            for axis in self.summed:
                if getattr(self.layout, axis) > 1:
                    td.all_reduce(values, group=self.mesh[axis].get_group())
        return Sums(values[0], int(values[1]), dict(zip(names, values[2:].unbind(), strict=True)))

    def norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        assert self._placed is not None
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for p in parameters:
            if p.grad is not None:
                copies = self._placed.places[self._placed.names[id(p)]].copies
                squares += local(p.grad).double().square().sum() / copies
        with self._clock():
            td.all_reduce(squares)
        return squares.sqrt().float()

    def count(self, model: LanguageModel) -> None:
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):  # refused under tp and pp, so all processes take different data
                td.all_reduce(module.load)
                td.all_reduce(module.dropped)

    def held(self, name: str, tensor: Tensor) -> Held:
        assert self._placed is not None
        place = self._placed.places.get(name)
        if place is None:  # a buffer, the same everywhere
            place = _Place(tuple(tensor.shape), writes=self._first())
        return place.held()

    def _first(self) -> bool:
        return not (self.at["ddp"] or self.at["fsdp"] or self.at["tp"])

    def _of(self, model: LanguageModel) -> _Model:
        assert self._placed is not None and self._placed.model is model, "place the model first"
        return self._placed

    def _sum(self, grads: Sequence[Tensor | None], group: td.ProcessGroup) -> None:
        """Sum gradients over a group, in place, several in one collective."""
        for bucket in _buckets([local(g) for g in grads if g is not None]):
            flat = torch.cat([g.flatten() for g in bucket])
            td.all_reduce(flat, group=group)
            for g, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(summed.view_as(g))

    @contextmanager
    def _clock(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for t in tensors:
        if bucket and (bucket[0].dtype != t.dtype or sum(b.numel() for b in bucket) + t.numel() > _BUCKET):
            yield bucket
            bucket = []
        bucket.append(t)
    if bucket:
        yield bucket
