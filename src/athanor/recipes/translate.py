"""Train an encoder-decoder on parallel text, translate held-out text with it and measure BLEU."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from athanor.core import dist, io
from athanor.core.errors import ConfigError
from athanor.core.stage import Stage
from athanor.data import pairs
from athanor.data.pack import fill
from athanor.evals import translation
from athanor.lm import LM
from athanor.models import io as models
from athanor.models.base import EncoderDecoder, TokenIds
from athanor.objectives import seq2seq
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
from athanor.types import Batch

POSITIONAL = ("run",)


@dataclass(frozen=True)
class Shape:
    """Shape of the model; see the architecture's own Config."""

    d_model: int = 256
    n_layers: int = 3
    n_heads: int = 8
    d_ff: int = 512


@dataclass(frozen=True)
class Config(TrainConfig):
    run: Path
    """Run folder; the model goes to its `translate/`, translations to `translations/`."""
    source: Path
    """Text to translate from: lines, or a .tsv or .jsonl with both sides; may be compressed (.gz, .bz2, .xz)."""
    valid_source: Path
    """Held-out text; its loss is measured after each epoch."""
    target: Path | None = None
    """Its translation."""
    valid_target: Path | None = None
    """Its translation."""
    test_source: Path | None = None
    """Text that is translated and measured at the end, too."""
    test_target: Path | None = None
    """Its translation."""
    lower: bool = False
    """Make all text small letters."""
    vocab_size: int = 8000
    """Tokens of the vocabulary that both languages share."""
    max_tokens: int = 128
    """Longest side of a pair, and longest translation; longer pairs are left out and counted."""
    arch: str = "transformer"
    """Architecture: a file of `models/` that is an encoder-decoder."""
    epochs: int = 10
    """How often every pair is seen."""
    steps: int = field(default=0, kw_only=True)
    """Updates; 0 is as many as `epochs` come to."""
    batch_tokens: int = field(default=4096, kw_only=True)
    """Tokens of one update, both sides together."""
    dropout: float = field(default=0.1, kw_only=True)
    """Share of what sub-layers and embeddings give that is dropped in training."""
    shape: Shape = field(default_factory=Shape)
    objective: seq2seq.Config = seq2seq.Config(smoothing=0.1)
    search: translation.Search = translation.Search()


def main(config: Config) -> int:
    if config.epochs < 1 or config.max_tokens < 2:
        raise ConfigError(f"epochs ({config.epochs}) must be at least 1, max_tokens ({config.max_tokens}) at least 2")
    if config.test_target and not config.test_source:
        raise ConfigError(f"test_target ({config.test_target}) has no test_source: give both sides")
    layout = layout_of(config if config.steps else replace(config, steps=1))
    metric = translation.metric(config.search.tokenize, lower=config.lower)  # fails before training, not after
    stage = Stage(config.run, "translate", settings(config))
    if stage.record is None:
        group.start("translate", config, layout, config.run / "logs", config.restarts)
        with group.strategy(layout) as strategy:
            _run(config, stage, strategy, metric)
            if not dist.is_main():
                return 0
    r = stage.record or {}
    print(f"translate: {r['parameters']:,} parameters, {r['pairs']:,} pairs, held-out loss {r['curve'][-1]['heldout_loss']:.3f}")
    print("\n".join(translation.told(name, b) for name, b in r["bleu"].items()))
    return 0


def _run(c: Config, stage: Stage, strategy: Alone, metric: Any) -> None:
    train, valid = (pairs.read(*sides, lower=c.lower) for sides in ((c.source, c.target), (c.valid_source, c.valid_target)))
    held = {"valid": valid} | ({"test": pairs.read(c.test_source, c.test_target, lower=c.lower)} if c.test_source else {})
    tokenizer = Tokenizer.train(chain.from_iterable(train), c.vocab_size)
    sides = {name: pairs.encode(part, tokenizer, max_tokens=c.max_tokens) for name, part in (("train", train), ("valid", valid))}
    if dist.is_main():
        print("\n".join(f"{name}: {len(e.pairs):,} pairs; left out: {e.summary}" for name, e in sides.items()))
    size = c.batch_tokens // c.accumulate
    order, watched = (pairs.PairBatches(e.pairs, size, tokenizer.bos_id, c.seed) for e in sides.values())
    per_epoch = -(-order.per_epoch // c.accumulate)
    c = replace(c, steps=c.steps or c.epochs * per_epoch)

    def batches(step: int) -> list[Batch]:
        return [fill(order.batch(i)) for i in range(step * c.accumulate, (step + 1) * c.accumulate)]

    objective, fresh = seq2seq.build(c.objective), partial(_model, c, tokenizer)
    model, optimizers = ready(fresh().to(strategy.device), c, strategy, objective, batches(0)[0])
    texts = [*map(watched.batch, range(watched.per_epoch))]
    measure = heldout(model, objective, texts, precision=c.precision, strategy=strategy)
    monitor = Monitor(model, context=c.max_tokens, precision=c.precision, every=c.detail) if c.detail else None
    ema = EMA(model, c.ema) if c.ema else None
    data = {"data": io.sha256_text(json.dumps([train, valid])), "tokenizer": tokenizer.hash, "threads": torch.get_num_threads()}
    store = StateStore(c.run / "state" / "translate", stage.settings | data, c.keep)
    with watching(c.run, "translate", c.steps, store, c.sinks) as tracker:
        progress = fit(
            model, objective, batches, optimizers, schedule(c.schedule, c.steps), store=store, tracker=tracker, monitor=monitor,
            hooks=[Hook(lambda step: dict(measure(step)), per_epoch)], ema=ema, **keywords(c, strategy),
        )  # fmt: skip
    trained = whole(fresh, model, optimizers, progress, store, strategy, ema)
    if dist.is_main():
        LM(trained, tokenizer).save(c.run / "translate", parent=None, corpus=data["data"])
        figures = {"parameters": trained.n_parameters(), "pairs": len(sides["train"].pairs), "steps": progress.step}
        bleu = translation.measure_all(trained, tokenizer, held, c.search, metric, c.run / "translations")
        dropped = {name: {"empty": e.empty, "long": e.long} for name, e in sides.items()}
        stage.finish(**figures, bleu=bleu, dropped=dropped, curve=progress.history, fit=progress.seconds)
    store.clear()


def _model(c: Config, tokenizer: Tokenizer) -> EncoderDecoder:
    fields = asdict(c.shape) | {"vocab_size": tokenizer.vocab_size, "max_positions": c.max_tokens}
    ids = TokenIds(tokenizer.bos_id, (tokenizer.end_id,), tokenizer.pad_id, decoder_start=tokenizer.bos_id)
    return models.encoder_decoder(c.arch, fields, ids, c.seed)
