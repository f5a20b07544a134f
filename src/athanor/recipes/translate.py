"""Train an encoder-decoder on parallel text, translate held-out text with it and measure BLEU."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from athanor.core import config as configs
from athanor.core import io, plugins
from athanor.core.device import Precision, default_device, seed_all
from athanor.core.errors import ConfigError
from athanor.core.stage import Stage
from athanor.data import pairs
from athanor.data.pack import fill
from athanor.evals import translation
from athanor.lm import LM
from athanor.models import io as models
from athanor.models.base import TokenIds
from athanor.objectives import seq2seq
from athanor.optim.build import OptimConfig, build
from athanor.optim.schedules import ScheduleConfig, schedule
from athanor.tokenizer.bpe import Tokenizer
from athanor.train.loop import Hook, fit
from athanor.train.monitor import heldout
from athanor.train.regularise import dropout
from athanor.train.state import StateStore
from athanor.train.watch import watching

POSITIONAL = ("run",)


@dataclass(frozen=True)
class Shape:
    """Shape of the model; see the architecture's own Config."""

    d_model: int = 256
    n_layers: int = 3
    n_heads: int = 8
    d_ff: int = 512


@dataclass(frozen=True)
class Config:
    """What to learn from, and how.

    Attributes:
        run: run folder; the model goes to its `translate/`, translations to `translations/`
        source: text to translate from: lines, or a .tsv or .jsonl with both sides; may be compressed (.gz, .bz2, .xz)
        target: its translation
        valid_source: held-out text; its loss is measured after each epoch
        valid_target: its translation
        test_source: text that is translated and measured at the end, too
        test_target: its translation
        lower: make all text small letters
        vocab_size: tokens of the vocabulary that both languages share
        max_tokens: longest side of a pair, and longest translation; longer pairs are left out and counted
        arch: architecture: a file of `models/` that is an encoder-decoder
        epochs: how often every pair is seen
        batch_tokens: tokens of one update, both sides together
        dropout: share of activations left out while training
        precision: of the matrix products: bf16 or fp32
        save_seconds: time between two saves of the training state; changes nothing else
        seed: of weights, data order and dropout
    """

    run: Path
    source: Path
    valid_source: Path
    target: Path | None = None
    valid_target: Path | None = None
    test_source: Path | None = None
    test_target: Path | None = None
    lower: bool = False
    vocab_size: int = 8000
    max_tokens: int = 128
    arch: str = "transformer"
    epochs: int = 10
    batch_tokens: int = 4096
    dropout: float = 0.1
    precision: Precision = "bf16"
    save_seconds: float = 15.0
    seed: int = 0
    shape: Shape = field(default_factory=Shape)
    objective: seq2seq.Config = seq2seq.Config(smoothing=0.1)
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    search: translation.Search = translation.Search()


def main(config: Config) -> int:
    if config.epochs < 1 or config.max_tokens < 2:
        raise ConfigError(f"epochs ({config.epochs}) must be at least 1, max_tokens ({config.max_tokens}) at least 2")
    if config.test_target and not config.test_source:
        raise ConfigError(f"test_target ({config.test_target}) has no test_source: give both sides")
    metric = translation.metric(config.search.tokenize, lower=config.lower)  # fails before training, not after
    stage = Stage(config.run, "translate", configs.to_dict(config) | {"run": "", "save_seconds": None})
    if stage.record is None:
        _run(config, stage, metric)
    r = stage.record or {}
    print(f"translate: {r['parameters']:,} parameters, {r['pairs']:,} pairs, held-out loss {r['curve'][-1]['heldout_loss']:.3f}")
    for name, b in r["bleu"].items():
        print(f"  {name}: BLEU {b['value']:.2f} [{b['low']:.2f}, {b['high']:.2f}] {b['signature']}, in {b['seconds']:.0f} s")
        print(f"    {b['cut']} sources cut, {b['open']} translations without an end; all in translations/{name}.txt")
        for source, ours, theirs in b["examples"]:
            print(f"    source       {source}\n    translation  {ours}\n    reference    {theirs}\n")
    return 0


def _run(c: Config, stage: Stage, metric: Any) -> None:
    train, valid = (pairs.read(*sides, lower=c.lower) for sides in ((c.source, c.target), (c.valid_source, c.valid_target)))
    held = {"valid": valid} | ({"test": pairs.read(c.test_source, c.test_target, lower=c.lower)} if c.test_source else {})
    tokenizer = Tokenizer.train(chain.from_iterable(train), c.vocab_size)
    model = _model(c, tokenizer).to(default_device())
    sides = {name: pairs.encode(part, tokenizer, max_tokens=c.max_tokens) for name, part in (("train", train), ("valid", valid))}
    print("\n".join(f"{name}: {len(e.pairs):,} pairs; left out: {e.summary}" for name, e in sides.items()))
    order, watched = (pairs.PairBatches(e.pairs, c.batch_tokens, tokenizer.bos_id, c.seed) for e in sides.values())
    steps, objective = c.epochs * order.per_epoch, seq2seq.build(c.objective)
    measure = heldout(model, objective, [watched.batch(i) for i in range(watched.per_epoch)], precision=c.precision)
    data = {"data": io.sha256_text(json.dumps([train, valid])), "tokenizer": tokenizer.hash}
    store = StateStore(c.run / "state" / "translate", stage.settings | data | {"threads": torch.get_num_threads()})
    seed_all(c.seed)
    dropout(model, c.dropout)
    with watching(c.run, "translate", steps, store) as tracker:
        progress = fit(
            model, objective, lambda step: [fill(order.batch(step))], build(model, c.optim, bf16=c.precision == "bf16"),
            schedule(c.schedule, steps), steps=steps, precision=c.precision, store=store, save_seconds=c.save_seconds,
            hooks=[Hook(lambda step: dict(measure(step)), order.per_epoch)], tracker=tracker,
        )  # fmt: skip
    LM(model, tokenizer).save(c.run / "translate", parent=None, corpus=data["data"])
    out = c.run / "translations"
    bleu = {n: translation.measure(model, tokenizer, p, c.search, metric, out / f"{n}.txt") for n, p in held.items()}
    figures = {"parameters": model.n_parameters(), "pairs": len(sides["train"].pairs), "steps": steps, "bleu": bleu}
    dropped = {name: {"empty": e.empty, "long": e.long} for name, e in sides.items()}
    stage.finish(**figures, dropped=dropped, curve=progress.history, fit=progress.seconds)
    store.clear()


def _model(c: Config, tokenizer: Tokenizer) -> Any:
    module = plugins.require("models", c.arch, "Model", "Config")
    if module.Model.kind != "encoder_decoder":
        raise ConfigError(f"arch ({c.arch!r}) is no encoder-decoder but of the kind {module.Model.kind!r}: use transformer")
    shape = module.Config(tokenizer.vocab_size, **asdict(c.shape), max_positions=c.max_tokens)
    model = models.build(c.arch, shape, seed=c.seed)
    model.token_ids = TokenIds(tokenizer.bos_id, (tokenizer.end_id,), tokenizer.pad_id, decoder_start=tokenizer.bos_id)
    return model
