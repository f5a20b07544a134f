"""Say what training will need before anything starts: memory, operations, time, cost; or plan a life of some minutes.

`athanor plan llama:llama-3-8b --device h100 --parallel fsdp=8` plans a model, `athanor plan --hours 24 --device h100` a budget.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from athanor.compress import formats
from athanor.core import io
from athanor.core.device import default_device, tune_allocator
from athanor.core.errors import ConfigError
from athanor.core.runs import resolve
from athanor.models import io as models
from athanor.models.base import LanguageModel
from athanor.optim.build import Name
from athanor.report import budget as printed
from athanor.train import budget, devices
from athanor.train import plan as planning
from athanor.train.budget_memory import Checkpointing, Numbers, Setup, Tuning
from athanor.train.parallel.layout import parse

POSITIONAL = ("model",)
show = printed.life


@dataclass(frozen=True)
class Shape:
    """Fields of an architecture's config, in place of the preset's."""

    vocab_size: int | None = None
    d_model: int | None = None
    n_layers: int | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    d_ff: int | None = None
    max_positions: int | None = None


@dataclass(frozen=True)
class Config:
    model: str | None = None
    """`family:preset`, a checkpoint or run folder, or a family with --shape; without one, a life, or a budget's best model."""
    minutes: float = 10.0
    """Length of the life, where there is neither a model nor a budget."""
    json: bool = False
    """Print JSON for programs."""
    out: Path | None = None
    """File to write the plan to; `athanor run --plan FILE` then follows that of a life to the letter."""
    checkpoint: str | None = None
    """Which checkpoint of a run folder."""
    batch_tokens: int = 8192
    """Tokens of one update, on all processes together."""
    accumulate: int = 1
    """Micro-batches that an update is split into."""
    context: int | None = None
    """Tokens of a row; the model's longest by default, 2048 at most."""
    precision: Numbers = "bf16"
    """fp32, bf16 (products; weights stay float32), or bf16-pure (weights too, with float32 masters)."""
    checkpointing: Checkpointing = "none"
    """Activations that are computed again instead of kept: none, selective or full."""
    optimizer: Name = "adamw"
    """adamw, muon, sgd or adafactor."""
    tune: Tuning = "full"
    """full, or small matrices beside frozen layers: lora, qlora (of 4 bits)."""
    rank: int = 16
    """Of lora's matrices."""
    targets: tuple[str, ...] = ("*",)
    """Layers that have them, by patterns."""
    parallel: str = ""
    """Layout of processes, as ddp=2, fsdp=8,zero=2, hsdp=2x4, tp=2, pp=2 or a product of them; one device each."""
    device: str = "this"
    """A device of the catalogue, or this machine, measured."""
    mfu: float = 0.4
    """Share of the device's peak that useful operations reach (assumed)."""
    price: float | None = None
    """Dollars an hour of a device; the catalogue's assumption by default."""
    memory: str | None = None
    """Budget: memory of one device, as 80GB; the device's own by default."""
    hours: float | None = None
    """Budget: hours of all devices."""
    tokens: str | None = None
    """Tokens to train on, as 20B; 20 for each parameter by default."""
    flops: str | None = None
    """Budget to find a model for: floating-point operations, as 1e21."""
    picture: Path | None = None
    """File for the picture of the memory: .svg, .png or .pdf."""
    shape: Shape = field(default_factory=Shape)


def main(config: Config) -> int:
    c = config
    if c.model is None and not any((c.memory, c.hours is not None, c.tokens, c.flops)):
        return _life(c)
    if c.minutes != Config.minutes:
        raise ConfigError(f"minutes ({c.minutes:g}) is of a life, which has neither a model nor a budget: leave it out")
    name, model = ("", None) if c.model is None else _model(c)
    context = c.context or (2048 if model is None else min(model.config.max_positions, 2048))
    numbers = (c.batch_tokens, c.accumulate, context, c.precision, c.checkpointing, c.optimizer)
    setup = Setup(*numbers, c.tune, c.rank, c.targets, parse(c.parallel))
    terms = budget.Terms.of(devices.get(c.device), c.mfu, c.price, c.hours, c.memory, c.tokens, c.flops)
    if model is None:
        if c.checkpoint is not None or c.shape != Shape(vocab_size=c.shape.vocab_size):
            raise ConfigError("checkpoint and shape (but vocab_size) are of a model, and none is named: name one")
        found = budget.best(terms, setup, c.shape.vocab_size or 32_000)
    else:
        found = budget.of(name, model, terms, setup, others=c.picture is not None)
    if c.out:
        io.write_json(c.out, budget.plain(found))
    if c.picture:
        printed.draw(found, c.picture)
    if c.json:
        print(json.dumps(budget.plain(found), indent=1))
    else:
        printed.show(found)
    return 0


def _model(config: Config) -> tuple[str, LanguageModel]:
    """A skeleton, with the fields of --shape changed."""
    name, changed = str(config.model), {k: v for k, v in asdict(config.shape).items() if v is not None}
    if not Path(name).exists() and (":" in name or changed):
        if config.checkpoint is not None:
            raise ConfigError(f"checkpoint ({config.checkpoint!r}) is of a run folder, and {name} is none: leave it out")
        return name + ", changed" * bool(changed and ":" in name), budget.skeleton(name, changed)
    if changed:
        raise ConfigError(f"shape ({', '.join(changed)}) is of a model to be, and {name} is there already: leave it out")
    return name, models.skeleton(resolve(Path(name), config.checkpoint), formats.prepare)


def _life(config: Config) -> int:
    for name in (f.name for f in fields(config) if f.name not in ("minutes", "json", "out")):
        if getattr(config, name) != getattr(Config(), name):
            raise ConfigError(
                f"{name} ({getattr(config, name)}) says nothing about a life: name a model, as llama:llama-3-8b, or a budget"
                " (memory, hours, tokens, flops)"
            )
    tune_allocator()
    plan = planning.make(config.minutes, default_device())
    if config.out:
        io.write_json(config.out, asdict(plan))
    if config.json:
        print(json.dumps(asdict(plan), indent=1))
    else:
        show(plan)
    return 0
