"""Train an encoder-decoder on parallel text, translate held-out text with it and measure BLEU."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from athanor.core import dist, io, plugins
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
    for name, b in r["bleu"].items():
        print(f"  {name}: BLEU {b['value']:.2f} [{b['low']:.2f}, {b['high']:.2f}] {b['signature']}, in {b['seconds']:.0f} s")
        print(f"    {b['cut']} sources cut, {b['open']} translations without an end; all in translations/{name}.txt")
        for source, ours, theirs in b["examples"]:
            print(f"    source       {source}\n    translation  {ours}\n    reference    {theirs}\n")
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

    objective = seq2seq.build(c.objective)
    fresh = partial(_model, c, tokenizer)
    model, optimizers = ready(fresh().to(strategy.device), c, strategy, objective, batches(0)[0])
    texts = [watched.batch(i) for i in range(watched.per_epoch)]
    measure = heldout(model, objective, texts, precision=c.precision, strategy=strategy)
    monitor = Monitor(model, context=c.max_tokens, precision=c.precision, every=c.detail) if c.detail else None
    ema = EMA(model, c.ema) if c.ema else None
    data = {"data": io.sha256_text(json.dumps([train, valid])), "tokenizer": tokenizer.hash}
    store = StateStore(c.run / "state" / "translate", stage.settings | data | {"threads": torch.get_num_threads()}, c.keep)
    with watching(c.run, "translate", c.steps, store, c.sinks) as tracker:
        progress = fit(
            model,
            objective,
            batches,
            optimizers,
            schedule(c.schedule, c.steps),
            store=store,
            hooks=[Hook(lambda step: dict(measure(step)), per_epoch)],
            tracker=tracker,
            monitor=monitor,
            ema=ema,
            **keywords(c, strategy),
        )
    trained = whole(fresh, model, optimizers, progress, store, strategy, ema)
    if dist.is_main():
        assert isinstance(trained, EncoderDecoder)
        LM(trained, tokenizer).save(c.run / "translate", parent=None, corpus=data["data"])
        out = c.run / "translations"
        bleu = {n: translation.measure(trained, tokenizer, p, c.search, metric, out / f"{n}.txt") for n, p in held.items()}
        figures: dict[str, Any] = {"parameters": trained.n_parameters(), "pairs": len(sides["train"].pairs), "bleu": bleu}
        dropped = {name: {"empty": e.empty, "long": e.long} for name, e in sides.items()}
        stage.finish(**figures, steps=progress.step, dropped=dropped, curve=progress.history, fit=progress.seconds)
    store.clear()


def _model(c: Config, tokenizer: Tokenizer) -> Any:
    module = plugins.require("models", c.arch, "Model", "Config")
    if module.Model.kind != "encoder_decoder":
        raise ConfigError(f"arch ({c.arch!r}) is no encoder-decoder but of the kind {module.Model.kind!r}: use transformer")
    shape = module.Config(tokenizer.vocab_size, **asdict(c.shape), max_positions=c.max_tokens)
    model = models.build(c.arch, shape, seed=c.seed)
    model.token_ids = TokenIds(tokenizer.bos_id, (tokenizer.end_id,), tokenizer.pad_id, decoder_start=tokenizer.bos_id)
    return model
