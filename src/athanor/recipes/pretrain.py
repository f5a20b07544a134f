"""Pre-train a language model of any architecture from scratch on a run's corpus, skills mixed in as plain text."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from athanor.core import dist
from athanor.core.errors import ConfigError
from athanor.core.stage import Stage, require
from athanor.data import corpus, shards
from athanor.data.pack import Rows, fill, join
from athanor.evals import lessons, skill
from athanor.lm import LM
from athanor.models import io as models
from athanor.models.base import LanguageModel
from athanor.objectives._pretraining import Pretraining, choose, generator
from athanor.optim.ema import EMA
from athanor.optim.schedules import schedule
from athanor.tokenizer.bpe import Tokenizer
from athanor.train.loop import Hook, fit
from athanor.train.monitor import Monitor, heldout
from athanor.train.parallel import group
from athanor.train.parallel.base import Alone
from athanor.train.setup import TrainConfig, keywords, layout_of, ready, settings, whole
from athanor.train.state import StateStore
from athanor.train.watch import watching
from athanor.train.weights import continue_from
from athanor.types import Batch

POSITIONAL = ("run",)
HELDOUT_TOKENS = 32_768  # that the curve is drawn by


@dataclass(frozen=True)
class Config(TrainConfig):
    run: Path
    """Run folder with corpus and tokenizer; the model goes to its `base/`."""
    arch: str = "llama"
    """Architecture: a file of `models/`, or one of its published shapes, such as gpt2:gpt2."""
    shape: dict[str, Any] = field(default_factory=dict)
    """Fields of the architecture's Config, such as --shape.d-model 256."""
    begin: Path | None = None
    """Weights to begin with: a model folder or a checkpoint; fresh ones without."""
    objective: str = "next_token"
    """Objective: a file of `objectives/`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of the objective's Config, such as --options.rate 0.3."""
    context: int = 256
    """Tokens of a row."""
    skills: tuple[str, ...] | None = None
    """Skills mixed in as plain text; all by default."""
    skill_share: float = 0.3
    """Share of the tokens that are skills."""


def main(config: Config) -> int:
    if not 0 <= config.skill_share < 1:
        raise ConfigError(f"skill_share ({config.skill_share}) must lie in [0, 1)")
    layout = layout_of(config)
    rows = round(config.batch_tokens * (1 - config.skill_share) / config.context / config.accumulate)
    if rows < 1:
        raise ConfigError(
            f"batch_tokens ({config.batch_tokens}) / accumulate ({config.accumulate}) must hold a row of context"
            f" ({config.context}) tokens"
        )
    stage = Stage(config.run, "pretrain", settings(config) | {"skills": _names(config)})
    if stage.record is None:
        group.start("pretrain", config, layout, config.run / "logs", config.restarts)
        with group.strategy(layout) as strategy:
            _train(config, stage, rows, strategy)
            if not dist.is_main():
                return 0
    r = stage.record or {}
    print(f"pretrain: {r['parameters']:,} parameters, {r['tokens']:,} tokens, last loss {r['curve'][-1]['loss']:.3f}")
    return 0


def _train(config: Config, stage: Stage, rows: int, strategy: Alone) -> None:
    run = config.run
    corpus_hash = require(run, "corpus")["hashes"]["train.jsonl"]
    tokenizer = Tokenizer.load(run / "tokenizer")
    shape = models.shape(config.arch, config.shape | {"vocab_size": tokenizer.vocab_size})

    def make() -> tuple[LanguageModel, Pretraining]:
        fresh = models.build(config.arch.partition(":")[0], shape, seed=config.seed).to(strategy.device)
        chosen = choose(config.objective, fresh, config.options, tokenizer, config.context, config.seed)
        if chosen.vocabulary.start is not None:
            fresh.token_ids = replace(fresh.token_ids, decoder_start=chosen.vocabulary.start)
        return fresh, chosen

    model, pretraining = make()
    with dist.main_first():
        needed = rows * config.accumulate * config.steps * config.context
        shard = shards.ensure(run / "corpus", tokenizer, needed + config.context)
        kept = shards.ensure(run / "corpus", tokenizer, HELDOUT_TOKENS, corpus.HELDOUT)
    order, quiz = Rows(shard, config.context, config.seed), Rows(kept, config.context, config.seed)
    skill_tokens = round(config.batch_tokens * config.skill_share / config.accumulate)

    def batches(step: int) -> list[Batch]:
        micro = []
        for part in range(config.accumulate):
            i = step * config.accumulate + part
            pieces = [order.batch(i * rows, rows)]
            if skill_tokens:
                pieces.append(lessons.batch(tokenizer, _names(config), "text", config.seed * 1_000_003 + i, skill_tokens))
            micro.append(fill(pretraining.prepare(join(pieces), generator(config.seed, step, part))))
        return micro

    count = min(quiz.count, HELDOUT_TOKENS // config.context)
    exam = [quiz.batch(i, min(rows, count - i)) for i in range(0, count, rows)]
    exam = [fill(pretraining.prepare(b, generator(config.seed, i, HELDOUT_TOKENS))) for i, b in enumerate(exam)]
    plain = config.objective == "next_token"
    ratio = kept.report.bytes / kept.report.tokens if plain else None
    facts: dict[str, Any] = {"context": config.context, "precision": config.precision, "likelihood": plain}
    monitor = Monitor(model, every=config.detail, **facts) if config.detail else None
    if config.begin is not None:
        continue_from(config.begin, model)
    model, optimizers = ready(model, config, strategy, pretraining.loss, batches(0)[0])
    ema = EMA(model, config.ema) if config.ema else None
    watch = heldout(model, pretraining.loss, exam, precision=config.precision, strategy=strategy, bytes_per_token=ratio)
    identity = stage.settings | {"corpus": corpus_hash, "tokenizer": tokenizer.hash}
    store = StateStore(run / "state" / "pretrain", identity, config.keep)
    with watching(run, "pretrain", config.steps, store, config.sinks) as tracker:
        progress = fit(
            model,
            pretraining.loss,
            batches,
            optimizers,
            schedule(config.schedule, config.steps),
            store=store,
            hooks=[Hook(watch, max(1, config.steps // 8))],
            tracker=tracker,
            monitor=monitor,
            ema=ema,
            **keywords(config, strategy),
        )
    trained = whole(lambda: make()[0], model, optimizers, progress, store, strategy, ema)
    if dist.is_main():
        LM(trained, tokenizer).save(run / "base", parent=None, corpus=corpus_hash)
        figures = {"parameters": trained.n_parameters(), "tokens": sum(r.get("tokens", 0) for r in progress.history)}
        stage.finish(steps=progress.step, curve=progress.history, fit=progress.seconds, **figures)
    store.clear()


def _names(config: Config) -> list[str]:
    return skill.names() if config.skills is None else list(config.skills)
