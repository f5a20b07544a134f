"""Supervised tuning on skills: conversations with written reasoning, some corpus text replayed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from athanor.core import config as configs
from athanor.core.device import Precision, default_device
from athanor.core.errors import ConfigError
from athanor.core.stage import Stage, require
from athanor.data.pack import Rows, fill, join
from athanor.data.shards import TokenShard
from athanor.evals import lessons, skill
from athanor.lm import load
from athanor.objectives import next_token
from athanor.optim.build import OptimConfig, build
from athanor.optim.schedules import warmup_cosine
from athanor.tokenizer.chat import ours
from athanor.train.loop import fit
from athanor.train.state import StateStore
from athanor.train.watch import watching
from athanor.types import Batch

POSITIONAL = ("run",)


@dataclass(frozen=True)
class Config:
    run: Path
    """Run folder with a `base/`; the model goes to its `sft/`."""
    steps: int = 250
    """Updates."""
    batch_tokens: int = 8192
    """Tokens of one update."""
    accumulate: int = 1
    """Micro-batches that an update is split into; changes memory, not the result."""
    skills: tuple[str, ...] | None = None
    """Skills to teach; all by default. `reasoning_gym:<task>` names tasks of reasoning-gym."""
    terse: float = 0.65
    """Share of the conversations that answer at once, without reasoning, as much of what people write does."""
    replay: float = 0.1
    """Share of the tokens that are corpus text, against forgetting."""
    context: int = 256
    """Tokens of a replayed row."""
    precision: Precision = "bf16"
    """Of the matrix products: bf16 or fp32."""
    clip: float = 1.0
    """Largest global gradient norm."""
    save_seconds: float = 15.0
    """Time between two saves of the training state; changes nothing else."""
    seed: int = 0
    """Of the examples."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-3))


def main(config: Config) -> int:
    if config.steps < 1 or config.accumulate < 1:
        raise ConfigError(f"steps ({config.steps}) and accumulate ({config.accumulate}) must be at least 1")
    if not (0 <= config.replay < 1 and 0 <= config.terse <= 1):
        raise ConfigError(f"replay ({config.replay}) must lie in [0, 1) and terse ({config.terse}) in [0, 1]: they are shares")
    stage = Stage(config.run, "sft", configs.to_dict(config) | {"run": "", "save_seconds": None, "skills": _names(config)})
    if stage.record is None:
        _train(config, stage)
    r = stage.record or {}
    print(f"sft: {r['tokens']:,} tokens, {r['targets']:,} supervised, last loss {r['curve'][-1]['loss']:.3f}")
    return 0


def _train(config: Config, stage: Stage) -> None:
    run = config.run
    require(run, "pretrain")
    lm = load(run, "base")
    model, tokenizer = lm.decoder.to(default_device()), ours(lm.tokenizer)
    names = _names(config)
    rows = round(config.batch_tokens * config.replay / config.accumulate / config.context)
    order = Rows(TokenShard(run / "corpus" / "train.bin", tokenizer), config.context, config.seed + 1)
    budget = config.batch_tokens // config.accumulate - rows * config.context

    def batches(step: int) -> list[Batch]:
        micro = []
        for i in range(step * config.accumulate, (step + 1) * config.accumulate):
            lesson = lessons.batch(tokenizer, names, "chat", config.seed * 1_000_003 + 500_000_000 + i, budget, config.terse)
            micro.append(fill(join([lesson, order.batch(i * rows, rows)]) if rows else lesson))
        return micro

    identity = stage.settings | {"parent": lm.lineage["weights"], "threads": torch.get_num_threads()}
    store = StateStore(run / "state" / "sft", identity)
    with watching(run, "sft", config.steps, store) as tracker:
        progress = fit(
            model,
            next_token.loss,
            batches,
            build(model, config.optim, bf16=config.precision == "bf16"),
            warmup_cosine(config.steps, max(1, config.steps // 20), 0.05),
            steps=config.steps,
            precision=config.precision,
            clip=config.clip,
            store=store,
            save_seconds=config.save_seconds,
            tracker=tracker,
        )
    lm.save(run / "sft", parent="base")
    totals = {key: sum(r[key] for r in progress.history) for key in ("tokens", "targets")}
    stage.finish(steps=config.steps, skills=names, curve=progress.history, fit=progress.seconds, **totals)
    store.clear()


def _names(config: Config) -> list[str]:
    return skill.names() if config.skills is None else list(config.skills)
