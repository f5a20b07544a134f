"""Evaluate checkpoints on held-out problems and held-out text, with 95 % intervals."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from athanor.core import io
from athanor.core.device import Precision
from athanor.core.errors import ConfigError
from athanor.core.runs import resolve
from athanor.data import corpus
from athanor.evals import harness, likelihood, scores, skill
from athanor.lm import load
from athanor.tokenizer.chat import ours

COMMAND = "eval"
POSITIONAL = ("path",)
_SAMPLES_PER_SKILL = 1


@dataclass(frozen=True)
class Config:
    path: Path
    """A checkpoint folder, or a run folder (its last checkpoint)."""
    checkpoint: str | None = None
    """Which checkpoint of a run folder: base, sft, rl, int8, int4."""
    n: int = 2800
    """Held-out problems, equally many per skill."""
    skills: tuple[str, ...] | None = None
    """Skills asked; all by default."""
    text: Path | None = None
    """Held-out documents (.jsonl) for bits per byte; those of the run where there are any."""
    text_bytes: int | None = None
    """How many bytes of them at most; all by default."""
    window: int = 256
    """Tokens of context for bits per byte: what the model was trained on."""
    max_tokens: int = 96
    """Longest answer."""
    batch: int = 350
    """Answers in flight."""
    precision: Precision = "bf16"
    """Of the matrix products."""
    seed: int = 0
    """Which held-out problems."""
    out: Path | None = None
    """File for the figures as JSON; `eval/<checkpoint>.json` of the run by default."""


def main(config: Config) -> int:
    if config.window < 2 or config.max_tokens < 1 or config.batch < 1:
        raise ConfigError(
            f"window ({config.window}) must be 2 or more, max_tokens ({config.max_tokens}) and batch ({config.batch}) 1"
        )
    folder = resolve(config.path, config.checkpoint)
    record = run(config, folder)
    out = config.out or folder.parent / "eval" / f"{folder.name}.json"
    io.write_json(out, record)
    a, bits = record["accuracy"], record["bits_per_byte"]
    text = "" if bits is None else f" {bits:.3f} bits per byte,"
    print(
        f"{folder.name}: accuracy {a['value']:.1%} [{a['low']:.1%}, {a['high']:.1%}] on {a['n']} problems,"
        f" format {record['format_rate']:.1%}, stop {record['stop_rate']:.1%},{text} in {out}"
    )
    return 0


def run(config: Config, folder: Path) -> dict[str, Any]:
    """The figures of one checkpoint."""
    began = time.perf_counter()
    lm = load(folder)
    names = skill.names() if config.skills is None else list(config.skills)
    examples = skill.heldout(names, config.n, config.seed)
    engine = lm.engine(max_batch=config.batch, precision=config.precision)
    start = time.perf_counter()
    results = harness.answer(engine, examples, max_tokens=config.max_tokens)
    spent = time.perf_counter() - start
    text = config.text or folder.parent / "corpus" / corpus.HELDOUT
    bits = None
    if text.exists():
        documents = corpus.beginning(text, config.text_bytes)
        bits = likelihood.bits_per_byte(
            lm.decoder, ours(lm.tokenizer), documents, window=config.window, precision=config.precision
        )
    first: dict[str, list[harness.Result]] = {}
    for r in results:
        first.setdefault(r.skill, []).append(r)
    samples = [_sample(r) for rs in first.values() for r in rs[:_SAMPLES_PER_SKILL]]
    return scores.summarise(results) | {
        "bits_per_byte": bits,
        "bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors")),
        "tokens_per_second": sum(r.tokens for r in results) / spent,
        "mean_tokens": sum(r.tokens for r in results) / len(results),
        "samples": samples,
        "lineage": lm.lineage,
        "seconds": time.perf_counter() - began,
    }


def _sample(r: harness.Result) -> dict[str, Any]:
    question, reference = r.example.conversation
    return {
        "prompt": question.content,
        "skill": r.skill,
        "language": r.language,
        "expected": reference.content,
        "answer": {"reasoning": r.message.reasoning, "content": r.message.content, "correct": bool(r.correct)},
    }
