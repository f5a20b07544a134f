"""Muon beside AdamW on the wall clock: `python bench/muon.py --help`.

What a life pre-trains is trained here: the standard library and the skills, the tokenizer of the life, a 2.0M LLaMA, rows of 256,
8,192 tokens an update. Every contender has a budget of seconds and a whole schedule of its own over it (the rate is a function of
the share of the budget that is spent), starts from the same weights and sees the same batches in the same order. They take turns
of a few seconds in one process, so that all of them see the same machine; held-out text is not on anybody's clock.

Both first sweep their peak rates over a quarter of the budget each. Then: AdamW, Muon, and Muon whose budget is three quarters of
AdamW's. The question is whether, and when, that third one reaches the held-out bits per byte that AdamW ends with.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from athanor.core import io
from athanor.core.device import Precision, machine, seed_all, supports_bf16, tune_allocator
from athanor.core.errors import AthanorError, ConfigError
from athanor.data import corpus, shards
from athanor.data.pack import Rows, fill, join
from athanor.evals import lessons, likelihood, skill
from athanor.models import llama
from athanor.objectives import next_token
from athanor.optim.build import Name, OptimConfig, build
from athanor.recipes import corpus as corpus_recipe
from athanor.recipes import tokenizer as tokenizer_recipe
from athanor.tokenizer.bpe import Tokenizer
from athanor.train import plan
from athanor.train.step import train_step
from athanor.types import Batch

CPU = torch.device("cpu")
SHORT = 0.75  # of AdamW's budget: what Muon must do with
SKILL_SHARE = 0.3  # as `athanor pretrain` has it
WARMUP, FINAL = 0.05, 0.05
TURN = 4.0  # seconds
LOOKS = (0.5, 0.75, 0.9, 1.0)  # shares of a budget after which held-out text is read


@dataclass(frozen=True)
class Life:
    """What is trained on: `batch(step)`, and `heldout(model)` in bits per byte."""

    config: llama.Config
    batch: Callable[[int], Batch]
    heldout: Callable[[llama.Model], float]
    precision: Precision


def life(folder: Path, shape: tuple[int, ...], batch_tokens: int, context: int, sample: int) -> Life:
    """Corpus, tokenizer and skills of a life, kept in `folder`."""
    corpus_recipe.main(corpus_recipe.Config(folder))
    tokenizer_recipe.main(tokenizer_recipe.Config(folder, vocab_size=plan.VOCAB_SIZE, sample=sample))
    tokenizer = Tokenizer.load(folder / "tokenizer")
    precision: Precision = "bf16" if supports_bf16(CPU) else "fp32"
    rows = round(batch_tokens * (1 - SKILL_SHARE) / context)
    order = Rows(shards.ensure(folder / "corpus", tokenizer, 40_000_000), context, 0)
    text = corpus.sample(folder / "corpus" / corpus.HELDOUT, 100_000)
    names = skill.names()

    def batch(step: int) -> Batch:
        told = lessons.batch(tokenizer, names, "text", step, round(batch_tokens * SKILL_SHARE))
        return fill(join([order.batch(step * rows, rows), told]))

    def heldout(model: llama.Model) -> float:
        model.eval()
        value = likelihood.bits_per_byte(model, tokenizer, text, window=context, precision=precision)
        model.train()
        return value

    return Life(plan.config(shape, tokenizer.vocab_size), batch, heldout, precision)


@dataclass
class Contender:
    """One optimiser with a budget of its own.

    seconds  spent on training so far
    curve    (seconds, updates, held-out bits per byte)
    """

    name: str
    optim: OptimConfig
    budget: float
    life: Life
    seconds: float = 0.0
    steps: int = 0
    curve: list[tuple[float, int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        seed_all(0)
        self.model = llama.Model(self.life.config)
        self.model.initialise(torch.Generator().manual_seed(0))
        self.model.train()
        self.optimizers = build(self.model, self.optim, bf16=self.life.precision == "bf16")
        self.looks = [share * self.budget for share in LOOKS]

    @property
    def done(self) -> bool:
        return not self.looks

    def turn(self, seconds: float) -> None:
        """Train for `seconds`, or to the next look at held-out text, and take that."""
        until = min(self.seconds + seconds, self.looks[0])
        while self.seconds < until:
            start = time.perf_counter()
            train_step(
                self.model,
                next_token.loss,
                [self.life.batch(self.steps)],
                self.optimizers,
                lr_factor=factor(self.seconds / self.budget),
                clip=1.0,
                precision=self.life.precision,
            )
            self.seconds += time.perf_counter() - start
            self.steps += 1
        if self.seconds >= self.looks[0]:
            self.looks = [x for x in self.looks if x > self.seconds]
            self.curve.append((self.seconds, self.steps, self.life.heldout(self.model)))
            print(f"{self.name}: {self.curve[-1][2]:.4f} after {self.seconds:.0f} s, {self.steps} updates", flush=True)


def factor(share: float) -> float:
    """Of the peak rate after `share` of the budget: linear warm-up, then half a cosine, as a life has it."""
    if share < WARMUP:
        return max(share / WARMUP, 0.05)
    return FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * min(1.0, (share - WARMUP) / (1 - WARMUP))))


def compete(contenders: Sequence[Contender]) -> None:
    """Turns in order, every other round backwards, in proportion to the budgets, until all are done."""
    longest = max(c.budget for c in contenders)
    backwards = False
    while any(not c.done for c in contenders):
        for contender in contenders[:: -1 if backwards else 1]:
            if not contender.done:
                contender.turn(TURN * contender.budget / longest)
        backwards = not backwards


def reached(curve: Sequence[tuple[float, int, float]], target: float) -> float | None:
    """The seconds at which the curve falls to `target`, linear between looks; None where it does not."""
    before: tuple[float, float] | None = None
    for seconds, _, value in curve:
        if value <= target:
            if before is None:
                return seconds
            return before[0] + (seconds - before[0]) * (before[1] - target) / (before[1] - value)
        before = seconds, value
    return None


def sweep(found: Life, rates: Mapping[Name, Sequence[float]], budget: float) -> dict[Name, dict[float, float]]:
    """Held-out bits per byte of each optimiser by its peak rate; one that has a single rate needs no trial."""
    runs = [Contender(f"{n} {r:g}", OptimConfig(n, r), budget, found) for n, each in rates.items() for r in each if len(each) > 1]
    for contender in runs:
        contender.looks = [budget]
    compete(runs)
    return {name: {c.optim.lr: c.curve[-1][2] for c in runs if c.optim.name == name} for name in rates}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole comparison."""
    found = life(folder, options.shape, options.batch_tokens, options.context, options.sample)
    rates: dict[Name, Sequence[float]] = {"adamw": options.rates, "muon": options.muon_rates}
    tried = sweep(found, rates, options.seconds / 4)
    adamw, muon = (OptimConfig(n, min(t, key=lambda rate: t[rate]) if (t := tried[n]) else rates[n][0]) for n in rates)
    contenders = [
        Contender("AdamW", adamw, options.seconds, found),
        Contender("Muon", muon, options.seconds, found),
        Contender(f"Muon, {SHORT:g} of the time", muon, options.seconds * SHORT, found),
    ]
    compete(contenders)
    target = contenders[0].curve[-1][2]
    at = reached(contenders[2].curve, target)
    return {
        "machine": machine(),
        "parameters": contenders[0].model.n_parameters(),
        "precision": found.precision,
        "sweep": {name: {f"{rate:g}": value for rate, value in each.items()} for name, each in tried.items()},
        "contenders": {c.name: {"optim": asdict(c.optim), "budget": c.budget, "curve": c.curve} for c in contenders},
        "target": target,
        "reached": at,
        "ratio": None if at is None else at / contenders[0].curve[-1][0],
        "wanted": SHORT,
    }


def show(r: dict[str, Any]) -> None:
    print(f"\n{r['parameters']:,} parameters, {r['precision']}, held-out bits per byte after seconds of training (updates)")
    for name, c in r["contenders"].items():
        print(f"  {name:<24}{c['optim']['lr']:<8g}" + "".join(f"{f'{s:.0f} s ({n})':>13}" for s, n, _ in c["curve"]))
        print(f"  {'':<32}" + "".join(f"{value:>13.4f}" for *_, value in c["curve"]))
    if r["ratio"] is None:
        print(f"  Muon with {r['wanted']:g} of the time does not reach AdamW's {r['target']:.4f}")
    else:
        print(f"  Muon reaches AdamW's {r['target']:.4f} after {r['reached']:.1f} s: {r['ratio']:.3f} of its time")
    print(f"  wanted: {r['wanted']:g} or less")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Muon beside AdamW on the wall clock, on the CPU; see docs/benchmarks.md.")
    parser.add_argument("--seconds", type=float, default=180.0, help="AdamW's budget (default %(default)g)")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3], help="AdamW's peak rates to sweep")
    parser.add_argument("--muon-rates", type=float, nargs="+", default=[3e-3, 5e-3, 8e-3, 12e-3], help="Muon's, likewise")
    parser.add_argument("--shape", type=int, nargs=5, default=plan.SHAPES[2], help="d_model n_layers n_heads n_kv_heads d_ff")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens of an update (default %(default)d)")
    parser.add_argument("--context", type=int, default=plan.CONTEXT, help="tokens of a row (default %(default)d)")
    parser.add_argument("--sample", type=int, default=16_000_000, help="bytes the tokenizer is trained on")
    parser.add_argument("--work", type=Path, help="where corpus and tokenizer are kept for the next run (default: nowhere)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything that was measured there")
    options = parser.parse_args(argv)
    options.shape = tuple(options.shape)
    if not options.seconds > 0:
        raise ConfigError(f"--seconds ({options.seconds:g}) must be above 0: 180 is usual")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options = arguments(argv)
        tune_allocator()
        with tempfile.TemporaryDirectory() as temporary:
            result = measure(options, options.work or Path(temporary))
    except AthanorError as error:
        print(f"bench/muon.py: {error}", file=sys.stderr)
        return 1
    show(result)
    if options.json:
        io.write_json(options.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
