"""What a recipe does to a model between building and training it, and how it gets it back whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from athanor.core import config as configs
from athanor.core import dist
from athanor.core.device import TrainPrecision, seed_all
from athanor.core.errors import ConfigError
from athanor.models.base import LanguageModel
from athanor.optim.build import OptimConfig, build
from athanor.optim.ema import EMA
from athanor.optim.scale import check_precision
from athanor.optim.schedules import ScheduleConfig
from athanor.train.checkpointing import checkpoint
from athanor.train.compiled import compile_blocks
from athanor.train.dry import dry_step
from athanor.train.guard import EarlyStop, Guard, SpikeConfig, StopConfig
from athanor.train.parallel.base import Alone, Objective
from athanor.train.parallel.layout import Layout, parse
from athanor.train.regularise import dropout
from athanor.train.state import Progress, StateStore
from athanor.train.watch import DEFAULT_SINKS
from athanor.train.weights import whole_state
from athanor.types import Batch

Optimizers = Sequence[torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What recipes that train have in common; a recipe's Config adds what it trains on."""

    steps: int = 400
    """Updates."""
    batch_tokens: int = 8192
    """Tokens of one update, on all processes together."""
    accumulate: int = 1
    """Micro-batches that an update is split into; changes memory, not the result."""
    precision: TrainPrecision = "bf16"
    """fp32, bf16 (products alone), bf16-pure (weights too, float32 copies in the optimiser), fp16 (GPUs)."""
    clip: float = 1.0
    """Largest global gradient norm."""
    dropout: float = 0.0
    """Share of what sub-layers and embeddings give that is dropped in training."""
    ema: float = 0.0
    """Decay of averaged weights, which are then what is saved; 0 averages nothing."""
    parallel: str = ""
    """Processes: ddp=2, fsdp=4, fsdp=4,zero=2, hsdp=2x2, tp=2, pp=2 and products of them; one without."""
    restarts: int = 3
    """How often all processes are started again after one has died."""
    checkpointing: Literal["none", "full", "selective"] = "none"
    """Activations computed again in the backward pass: of whole blocks, or all but products; saves memory, costs time."""
    compile: bool = False
    """Compile the blocks: the first step takes longer, the others less."""
    save_seconds: float = 15.0
    """Time between two saves of the training state."""
    keep: int = 1
    """Newest training states that are kept."""
    sinks: tuple[str, ...] = DEFAULT_SINKS
    """Where records go: console, jsonl, tensorboard, wandb, trackio."""
    detail: int = 0
    """Steps between two records that hold gradients and updates by part; all then hold speed and cost. 0 for none of it."""
    seed: int = 0
    """Of weights and data order."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    stop: StopConfig = field(default_factory=StopConfig)


# Fields that say how it is computed, watched and kept, and change nothing of what is learnt.
_HOW = ("run", "parallel", "restarts", "checkpointing", "compile", "save_seconds", "keep", "sinks", "detail")


def settings(config: TrainConfig) -> dict[str, Any]:
    """What makes a stage what it is: those fields of its config that decide what is learnt."""
    return configs.to_dict(config) | dict.fromkeys(_HOW)


def layout_of(config: TrainConfig) -> Layout:
    """The layout that `parallel` names.

    Raises ConfigError for one that makes no sense or does not go with the rest, naming the pair and why, and for numbers out of
    range.
    """
    for name, least in (("steps", 1), ("accumulate", 1), ("keep", 1), ("restarts", 0), ("detail", 0)):
        if getattr(config, name) < least:
            raise ConfigError(f"{name} ({getattr(config, name)}) must be at least {least}")
    layout, optim = parse(config.parallel), config.optim
    if optim.name == "adafactor" and (layout.tp > 1 or layout.ep > 1):
        raise ConfigError(
            f"optim.name 'adafactor' keeps a row and a column for each matrix, whose parts layout {layout} reorders: use ddp,"
            " fsdp or pp, or another optimiser"
        )
    if config.compile and layout.world > 1:
        raise ConfigError(f"compile does not go with several processes (layout {layout}) yet: leave one of them out")
    if config.dropout and (layout.tp > 1 or layout.pp > 1):
        raise ConfigError(
            f"dropout ({config.dropout}) under tp or pp (layout {layout}) would draw other numbers on every process of one"
            " sequence: use ddp or fsdp, or no dropout"
        )
    if config.precision == "bf16-pure" and layout.world > 1:
        raise ConfigError(f"precision 'bf16-pure' is for one process and the layout is {layout}: use bf16")
    return layout


def keywords(config: TrainConfig, strategy: Alone) -> dict[str, Any]:
    """Arguments of `fit` that stand in the config."""
    return {
        "steps": config.steps,
        "precision": config.precision,
        "clip": config.clip,
        "strategy": strategy,
        "save_seconds": config.save_seconds,
        "guard": Guard(config.spikes),
        "early": EarlyStop(config.stop),
    }


def ready(
    model: LanguageModel, config: TrainConfig, strategy: Alone, objective: Objective, batch: Batch
) -> tuple[LanguageModel, Optimizers]:
    """The model as `fit` trains it, and its optimisers.

    Args:
        model: whole, on its device; changed in place.
        config: precision, dropout, activation checkpointing, compiling, optimiser.
        strategy: of processes.
        objective, batch: what it is trained for and a batch as large as any to come, for the step that is tried before the first
            one; nothing is left of it.

    Raises:
        ConfigError: what does not go together, or not with this device.
        TrainingError: the batch does not fit into memory.
    """
    check_precision(config.precision, model.device)
    if config.precision == "bf16-pure":
        model.to(torch.bfloat16)
    if config.dropout:
        seed_all(config.seed * 1_000_003 + strategy.rank)  # processes with other data drop other numbers
        dropout(model, config.dropout)
    if config.checkpointing != "none":
        checkpoint(model, config.checkpointing)
    model = strategy.place(model).train()
    optimizers = build(model, config.optim, bf16=config.precision != "fp32")
    if config.compile:
        state = torch.get_rng_state()
        seconds = compile_blocks(model, lambda: strategy.accumulate(model, objective, [batch], config.precision))
        torch.set_rng_state(state)
        model.zero_grad(set_to_none=True)
        print(f"compiled: the first pass took {seconds:.0f} s")
    elif dist.world_size() == 1:
        dry_step(model, objective, optimizers, batch, config.precision)
    return model, optimizers


def whole(
    make: Callable[[], LanguageModel], model: LanguageModel, optimizers: Optimizers, progress: Progress, store: StateStore,
    strategy: Alone, ema: EMA | None,
) -> LanguageModel:  # fmt: skip
    """The trained model on one process, with averaged weights where there are some: what a recipe saves.

    Several processes write a last checkpoint, out of which the first reads the whole into a model that `make` makes, of the same
    config; on the others what comes back means nothing.
    """
    if dist.world_size() == 1:
        if ema is not None:
            for name, p in model.named_parameters():
                p.data.copy_(ema.averages[name])
        return model
    averages = {} if ema is None else {f"ema.{name}": value for name, value in ema.state().items()}
    store.save(progress, model, optimizers, strategy=strategy, extra_tensors=averages)
    store.wait()
    dist.barrier()
    fresh = make()
    if dist.is_main():
        fresh.load_state_dict(whole_state(store.folder))
        if ema is not None:
            found = whole_state(store.folder, "ema.")
            fresh.load_state_dict({name: found[name] for name, _ in fresh.named_parameters()}, strict=False)
    return fresh
