"""Supervised tuning on skills: conversations with written reasoning, some corpus text replayed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from athanor.core import dist
from athanor.core.errors import ConfigError
from athanor.core.stage import Stage, require
from athanor.data.pack import Rows, fill, join
from athanor.data.shards import TokenShard
from athanor.evals import lessons, skill
from athanor.lm import LM, load
from athanor.models.base import LanguageModel
from athanor.objectives import next_token
from athanor.optim.build import OptimConfig
from athanor.optim.ema import EMA
from athanor.optim.schedules import schedule
from athanor.tokenizer.chat import ours
from athanor.train.loop import fit
from athanor.train.monitor import Monitor
from athanor.train.parallel import group
from athanor.train.parallel.base import Alone
from athanor.train.setup import TrainConfig, keywords, layout_of, ready, settings, whole
from athanor.train.state import StateStore
from athanor.train.watch import watching
from athanor.types import Batch

POSITIONAL = ("run",)


@dataclass(frozen=True)
class Config(TrainConfig):
    run: Path
    """Run folder with a `base/`; the model goes to its `sft/`."""
    skills: tuple[str, ...] | None = None
    """Skills to teach; all by default. `reasoning_gym:<task>` names tasks of reasoning-gym."""
    terse: float = 0.65
    """Share of the conversations that answer at once, without reasoning, as much of what people write does."""
    replay: float = 0.1
    """Share of the tokens that are corpus text, against forgetting."""
    context: int = 256
    """Tokens of a replayed row."""
    steps: int = field(default=250, kw_only=True)
    """Updates."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-3), kw_only=True)


def main(config: Config) -> int:
    layout = layout_of(config)
    if not (0 <= config.replay < 1 and 0 <= config.terse <= 1):
        raise ConfigError(f"replay ({config.replay}) must lie in [0, 1) and terse ({config.terse}) in [0, 1]: they are shares")
    stage = Stage(config.run, "sft", settings(config) | {"skills": _names(config)})
    if stage.record is None:
        group.start("sft", config, layout, config.run / "logs", config.restarts)
        with group.strategy(layout) as strategy:
            _train(config, stage, strategy)
            if not dist.is_main():
                return 0
    r = stage.record or {}
    print(f"sft: {r['tokens']:,} tokens, {r['targets']:,} supervised, last loss {r['curve'][-1]['loss']:.3f}")
    return 0


def _train(config: Config, stage: Stage, strategy: Alone) -> None:
    run = config.run
    require(run, "pretrain")
    lm = load(run, "base")
    model: LanguageModel = lm.decoder.to(strategy.device)
    tokenizer = ours(lm.tokenizer)
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

    monitor = Monitor(model, context=config.context, precision=config.precision, every=config.detail) if config.detail else None
    model, optimizers = ready(model, config, strategy, next_token.loss, batches(0)[0])
    ema = EMA(model, config.ema) if config.ema else None
    store = StateStore(run / "state" / "sft", stage.settings | {"parent": lm.lineage["weights"]}, config.keep)
    with watching(run, "sft", config.steps, store, config.sinks) as tracker:
        progress = fit(
            model,
            next_token.loss,
            batches,
            optimizers,
            schedule(config.schedule, config.steps),
            store=store,
            tracker=tracker,
            monitor=monitor,
            ema=ema,
            **keywords(config, strategy),
        )
    trained = whole(lambda: load(run, "base").decoder, model, optimizers, progress, store, strategy, ema)
    if dist.is_main():
        LM(trained, tokenizer, lineage=lm.lineage).save(run / "sft", parent="base")
        totals = {key: sum(r.get(key, 0) for r in progress.history) for key in ("tokens", "targets")}
        stage.finish(steps=progress.step, skills=names, curve=progress.history, fit=progress.seconds, **totals)
    store.clear()


def _names(config: Config) -> list[str]:
    return skill.names() if config.skills is None else list(config.skills)
