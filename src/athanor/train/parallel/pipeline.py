"""Pipelines: consecutive blocks on different processes, micro-batches in flight, by PyTorch's own schedules.

Any objective that asks the model for hidden states once fits: every stage learns from it which context a micro-batch has, and the
last one runs it on what came through the pipeline. Micro-batches are dealt out like those of data ranks, whole sequences each,
and filled up to one size, since stages exchange tensors of fixed shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.torch_version import TorchVersion

from athanor.core.device import TrainPrecision, autocast
from athanor.core.errors import ConfigError
from athanor.data.pack import fill, share
from athanor.models.base import LanguageModel
from athanor.models.decoder import Decoder
from athanor.nn.context import Context
from athanor.train.parallel.base import Objective, Sums
from athanor.train.parallel.distributed import Distributed, Surgery
from athanor.types import Batch

_KINDS: dict[str, Any] = {
    "1f1b": pipelining.Schedule1F1B,
    "gpipe": pipelining.ScheduleGPipe,
    "interleaved": pipelining.ScheduleInterleaved1F1B,
    "zero_bubble": pipelining.ScheduleInterleavedZeroBubble,
}
# Zero-bubble computes the gradients of weights after those of inputs. To tell them apart PyTorch cuts the graph at the functions
# where they part, and before 2.13 it loses those written in Python (2.11 would also take what all outputs of one receive for what
# the first does). There both kinds are computed at once and nothing is left for later.
_CUTS_RIGHT = TorchVersion(torch.__version__) >= "2.13"


def _nothing_left() -> Callable[[], None]:
    return lambda: None


class _Caught(Exception):
    """The objective has said what it wants to be computed."""


class _Probe:
    """Stands for a model, to learn the context that an objective asks it for."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self.asked: tuple[Tensor, Context] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def hidden(self, ids: Tensor, ctx: Context) -> Tensor:
        self.asked = ids, ctx
        raise _Caught


class _Tail:
    """Stands for a model whose hidden states are there already."""

    def __init__(self, model: LanguageModel, hidden: Tensor) -> None:
        self._model, self._hidden = model, hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def hidden(self, ids: Tensor, ctx: Context) -> Tensor:
        return self._hidden


class _Flight:
    """The micro-batches of one pass: what they are, what is asked for, what came of them."""

    def __init__(
        self, model: LanguageModel, objective: Objective, batches: Sequence[Batch], precision: TrainPrecision, scale: float
    ):
        self.model, self.objective, self.batches, self.precision, self.scale = model, objective, batches, precision, scale
        self.asked = [self._ask(batch) for batch in batches]
        self.sums = Sums(torch.zeros((), dtype=torch.float64, device=model.device))

    def _ask(self, batch: Batch) -> tuple[Tensor, Context]:
        probe = _Probe(self.model)
        try:
            self.objective(probe, batch)
        except _Caught:
            assert probe.asked is not None
            return probe.asked
        raise ConfigError("the objective asks the model for no hidden states, so a pipeline has nothing to compute: leave pp out")

    def loss(self, output: Tensor, which: Tensor) -> Tensor:
        """Of one micro-batch, by its number (1,), from what came out of the last stage."""
        with autocast(output.device, self.precision):
            loss, count, metrics = self.objective(_Tail(self.model, output), self.batches[int(which)])
        self.sums.add(loss, count, metrics)
        return loss if self.scale == 1.0 else loss * self.scale


class _Stage(nn.Module):
    """Blocks `first` to `last` - 1 of a decoder, the embedding before the first of all, the norm after the last."""

    def __init__(self, model: Decoder, first: int, last: int) -> None:
        super().__init__()
        self.first, self.last, self.ends = first, last, last == len(model.blocks)
        self.blocks = nn.ModuleList(model.blocks[first:last])
        # Named here so that FSDP knows whose weights they are; the model computes with the same ones.
        self.embedding = model.embedding if first == 0 or (self.ends and model.head is None) else None
        self.norm: nn.Module | None = model.norm if self.ends else None
        self.head: nn.Module | None = model.head if self.ends else None
        self._model = (model,)  # hidden from nn.Module
        self.flight: _Flight | None = None

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        """ids (1, N) or what came from the stage before (1, N, D), and the number of the micro-batch (1,)."""
        assert self.flight is not None
        (model,), flight = self._model, self.flight
        _, ctx = flight.asked[int(which)]
        with autocast(x.device, flight.precision):
            if self.first == 0:
                x = model.embed(x)
            turns = model.turns(ctx)
            for layer, block in enumerate(self.blocks, self.first):
                x = block(x, ctx, layer, turns[layer])
            return self.norm(x).to(x.dtype) if self.norm is not None else x


class Pipelined(Distributed):
    """The strategy of a layout with a pipeline. Every process keeps those blocks alone that its stages hold."""

    summed = ("ddp", "fsdp", "pp")
    _stages: list[_Stage]
    _pair: td.ProcessGroup | None = None  # of the processes that hold a tied embedding

    def prepare(self, model: LanguageModel) -> Surgery:
        layout = self.layout
        assert isinstance(model, Decoder)
        n, stages = len(model.blocks), layout.stages
        done = super().prepare(model)
        borders = [n * i // stages for i in range(stages + 1)]
        mine = range(self.at["pp"], stages, layout.pp)
        self._stages = [_Stage(model, borders[i], borders[i + 1]) for i in mine]
        kept = {layer for stage in self._stages for layer in range(stage.first, stage.last)}
        for layer in range(n):
            if layer not in kept:
                model.blocks[layer] = nn.Identity()
        starts, ends = mine[0] == 0, mine[-1] == stages - 1
        twice = model.head is None and layout.pp > 1
        if not (starts or (ends and twice)):
            del model.embedding
        if not ends:
            del model.norm
            model.head = None
        if twice:  # the output embedding of the last stage is the input embedding of the first
            ranks = self.mesh.mesh.flatten(1)
            pairs = [[int(ranks[0, i]), int(ranks[-1, i])] for i in range(ranks.shape[1])]
            self._pair, _ = td.new_subgroups_by_enumeration(pairs)
            done.copies["embedding.weight"] = 2
            if ends and not starts:
                done.silent.add("embedding.weight")
        return done

    def units(self) -> Sequence[nn.Module]:
        return self._stages

    def share(self, micro: Sequence[Batch]) -> list[Batch]:
        parts = [part for batch in micro for part in self._part(batch)]
        size = 256 * self.layout.tp
        longest = max(-(-len(part.ids) // size) * size for part in parts)
        return [fill(part, longest) for part in parts]

    def _part(self, batch: Batch) -> list[Batch]:
        parts = share(batch, self.ranks * self.layout.in_flight)
        return parts[self.rank * self.layout.in_flight : (self.rank + 1) * self.layout.in_flight]

    def accumulate(
        self, model: LanguageModel, objective: Objective, micro: Sequence[Batch], precision: TrainPrecision, scale: float = 1.0
    ) -> Sums:
        return self._fly(model, objective, micro, precision, scale, learn=True)

    @torch.no_grad()
    def evaluate(self, model: LanguageModel, objective: Objective, micro: Sequence[Batch], precision: TrainPrecision) -> Sums:
        return self.total(self._fly(model, objective, self.share(micro), precision, 1.0, learn=False))

    def reduce(self, model: LanguageModel, sums: Sums) -> Sums:
        tied = getattr(model, "embedding", None)
        if self._pair is not None and tied is not None:
            with self._clock():
                self._sum([tied.weight.grad], self._pair)
        return super().reduce(model, sums)

    def total(self, sums: Sums) -> Sums:
        """Known on the last stage, and then everywhere."""
        group = self.mesh["pp"].get_group()
        told = [sorted(sums.metrics)]
        last = td.get_global_rank(group, self.layout.pp - 1)
        td.broadcast_object_list(told, src=last, group=group)
        values = sums.metrics or dict.fromkeys(told[0], torch.zeros_like(sums.loss))
        return super().total(Sums(sums.loss, sums.count, values))

    def _fly(
        self,
        model: LanguageModel,
        objective: Objective,
        micro: Sequence[Batch],
        precision: TrainPrecision,
        scale: float,
        learn: bool,
    ) -> Sums:
        batches = [batch.to(self.device) for batch in micro]
        flight = _Flight(model, objective, batches, precision, scale)
        ids = torch.cat([asked for asked, _ in flight.asked])
        count, size = ids.shape
        width: int = model.config.d_model
        stages = []
        for index, stage in zip(range(self.at["pp"], self.layout.stages, self.layout.pp), self._stages, strict=True):
            stage.flight = flight
            first = torch.empty(1, size, dtype=torch.int64, device="meta")
            # Between blocks tp splits tokens.
            passed = torch.empty(1, size // self.layout.tp, width, device="meta", requires_grad=True)
            final = torch.empty(1, size, width, device="meta", requires_grad=True)
            stages.append(
                pipelining.PipelineStage(
                    stage,
                    index,
                    self.layout.stages,
                    self.device,
                    input_args=(first if index == 0 else passed,),
                    output_args=(final if stage.ends else passed,),
                    group=self.mesh["pp"].get_group(),
                    dw_builder=None if _CUTS_RIGHT else _nothing_left,
                )
            )
        kind = _KINDS[self.layout.schedule]
        many = self.layout.stages > self.layout.pp
        schedule = kind(stages if many else stages[0], count, loss_fn=flight.loss, scale_grads=False)
        which = torch.arange(count, device=self.device)
        given = (ids,) if self.at["pp"] == 0 else ()
        if learn:
            schedule.step(*given, which=which, target=which, return_outputs=False)
        else:
            schedule.eval(*given, which=which, target=which)
        return flight.sums
