"""Pre-train a language model from scratch on a run's corpus, skills mixed in as plain text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from athanor.core import config as configs
from athanor.core import plugins
from athanor.core.device import Precision, default_device
from athanor.core.errors import ConfigError
from athanor.core.stage import Stage, require
from athanor.data import corpus, shards
from athanor.data.pack import Rows, fill, join
from athanor.evals import lessons, likelihood, skill
from athanor.lm import LM
from athanor.models import io as models
from athanor.optim.build import OptimConfig, build
from athanor.optim.schedules import warmup_cosine
from athanor.tokenizer.bpe import Tokenizer
from athanor.train.loop import Hook, fit
from athanor.train.state import StateStore
from athanor.train.watch import watching
from athanor.types import Batch

POSITIONAL = ("run",)


@dataclass(frozen=True)
class Shape:
    """Shape of the model; see the architecture's own Config."""

    d_model: int = 192
    n_layers: int = 4
    n_heads: int = 3
    n_kv_heads: int = 1
    d_ff: int = 512


@dataclass(frozen=True)
class Config:
    run: Path
    """Run folder with corpus and tokenizer; the model goes to its `base/`."""
    arch: str = "llama"
    """Architecture: a file of `models/`."""
    objective: str = "next_token"
    """Objective: a file of `objectives/`."""
    steps: int = 400
    """Updates."""
    batch_tokens: int = 8192
    """Tokens of one update."""
    accumulate: int = 1
    """Micro-batches that an update is split into; changes memory, not the result."""
    context: int = 256
    """Tokens of a row."""
    skills: tuple[str, ...] | None = None
    """Skills mixed in as plain text; all by default."""
    skill_share: float = 0.3
    """Share of the tokens that are skills."""
    precision: Precision = "bf16"
    """Of the matrix products: bf16 or fp32."""
    clip: float = 1.0
    """Largest global gradient norm."""
    save_seconds: float = 15.0
    """Time between two saves of the training state; changes nothing else."""
    seed: int = 0
    """Of weights and data order."""
    shape: Shape = field(default_factory=Shape)
    optim: OptimConfig = field(default_factory=OptimConfig)


def main(config: Config) -> int:
    if not 0 <= config.skill_share < 1:
        raise ConfigError(f"skill_share ({config.skill_share}) must lie in [0, 1)")
    rows_per_step = round(config.batch_tokens * (1 - config.skill_share) / config.context / config.accumulate)
    if config.steps < 1 or config.accumulate < 1 or rows_per_step < 1:
        raise ConfigError(
            f"steps ({config.steps}) and accumulate ({config.accumulate}) must be at least 1, and batch_tokens"
            f" ({config.batch_tokens}) / accumulate must hold a row of context ({config.context}) tokens"
        )
    settings = configs.to_dict(config) | {"run": "", "save_seconds": None, "skills": _names(config)}
    stage = Stage(config.run, "pretrain", settings)
    if stage.record is None:
        _train(config, stage, rows_per_step)
    r = stage.record or {}
    print(f"pretrain: {r['parameters']:,} parameters, {r['tokens']:,} tokens, last loss {r['curve'][-1]['loss']:.3f}")
    return 0


def _train(config: Config, stage: Stage, rows: int) -> None:
    run = config.run
    corpus_hash = require(run, "corpus")["hashes"]["train.jsonl"]
    tokenizer = Tokenizer.load(run / "tokenizer")
    names = _names(config)
    model_config = plugins.require("models", config.arch, "Model", "Config").Config(tokenizer.vocab_size, **asdict(config.shape))
    model = models.build(config.arch, model_config, seed=config.seed).to(default_device())
    needed = rows * config.accumulate * config.steps * config.context
    order = Rows(shards.ensure(run / "corpus", tokenizer, needed + config.context), config.context, config.seed)
    skill_tokens = round(config.batch_tokens * config.skill_share / config.accumulate)

    def batches(step: int) -> list[Batch]:
        micro = []
        for i in range(step * config.accumulate, (step + 1) * config.accumulate):
            parts = [order.batch(i * rows, rows)]
            if skill_tokens:
                parts.append(lessons.batch(tokenizer, names, "text", config.seed * 1_000_003 + i, skill_tokens))
            micro.append(fill(join(parts)))
        return micro

    sample = corpus.sample(run / "corpus" / corpus.HELDOUT, 100_000)  # enough to watch a curve by

    def watch(step: int) -> dict[str, Any]:
        model.eval()
        value = likelihood.bits_per_byte(model, tokenizer, sample, window=config.context, precision=config.precision)
        model.train()
        return {"heldout_bits_per_byte": value}

    identity = stage.settings | {"corpus": corpus_hash, "tokenizer": tokenizer.hash, "threads": torch.get_num_threads()}
    store = StateStore(run / "state" / "pretrain", identity)
    with watching(run, "pretrain", config.steps, store) as tracker:
        progress = fit(
            model,
            plugins.require("objectives", config.objective, "loss").loss,
            batches,
            build(model, config.optim, bf16=config.precision == "bf16"),
            warmup_cosine(config.steps, max(1, config.steps // 20), 0.05),
            steps=config.steps,
            precision=config.precision,
            clip=config.clip,
            store=store,
            save_seconds=config.save_seconds,
            hooks=[Hook(watch, max(1, config.steps // 8))],
            tracker=tracker,
        )
    LM(model, tokenizer).save(run / "base", parent=None, corpus=corpus_hash)
    tokens = sum(r["tokens"] for r in progress.history)
    stage.finish(parameters=model.n_parameters(), tokens=tokens, steps=config.steps, curve=progress.history, fit=progress.seconds)
    store.clear()


def _names(config: Config) -> list[str]:
    return skill.names() if config.skills is None else list(config.skills)
