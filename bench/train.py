"""Speed and memory of training beside transformers.Trainer, on the CPU: `python bench/train.py --help`.

pre-training  packed rows of one length: our step beside Trainer in the same precision, on the same rows from the same weights
tuning        ragged conversations: our step, which packs them, beside Trainer, which pads or flattens them
memory        of two pre-training steps at a vocabulary of 32,768, each side in a process of its own

Each side lives in a process of its own as its users have it, with the same threads, and they take turns; nothing is compiled
unless asked. Our recipes set the allocator (`tune_allocator`), and `--tuned-peer` does it for Trainer too. A ratio is the median
of the ratios of the rounds. Before anything is timed, both sides must compute the same loss from the same weights and batch.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from training.footprint import memory
from training.pretraining import pretraining
from training.rounds import Timing
from training.sides import Shape
from training.tuning import tuning_sets

from athanor.core import io
from athanor.core.device import Precision, machine, supports_bf16, tune_allocator
from athanor.core.errors import AthanorError, ConfigError, MissingExtraError
from athanor.models import llama

PEERS = ("transformers", "accelerate")
PARTS = ("pretraining", "tuning", "memory")
SHAPES = {
    "life": Shape(llama.Config(2048, 192, 4, 3, 1, 512), 256, 32, conversations=2048, skills=True),  # of a life of ten minutes
    "12m": Shape(llama.Config(16384, 256, 8, 8, 8, 1024), 512, 8, conversations=2048),
    "124m": Shape(llama.Config(32768, 768, 12, 12, 12, 2560), 512, 4, conversations=2048),
    "tiny": Shape(llama.Config(512, 32, 2, 4, 2, 64), 32, 8, conversations=48, skills=True),  # for tests: speeds mean nothing
}


def show_pretraining(name: str, r: Mapping[str, Any]) -> None:
    print(f"\nPre-training {name}: {r['parameters']:,} parameters, {r['tokens_per_step']} tokens a step in rows of {r['row']}")
    print(f"  {'':<30}{'tokens/s':>10}{'ratio':>8}{'to the best':>14}")
    for side, rates in r["tokens_per_second"].items():
        waited = r["first_step_seconds"].get(side)
        first = "" if waited is None else f"   first step {waited:.0f} s"
        print(f"  {side:<30}{statistics.median(rates):>10,.0f}{r['ratio'][side]:>8.2f}{r['ratio_to_best'][side]:>14.2f}{first}")
    losses = f"{r['loss']['athanor']:.5f}, {r['loss']['transformers']:.5f}"
    print(f"  ratio wanted: {r['wanted']}; the best is {r['best_peer']!r}; loss of the first step {losses}")


def show_tuning(name: str, data: str, r: Mapping[str, Any]) -> None:
    print(f"\nTuning {name} on {data}: {r['mean_length']:.0f} tokens each, {r['padding_of_eight']:.0%} padding in batches of 8")
    print(f"  {'':<36}{'tokens/s':>10}{'ratio':>8}{'to the best':>14}")
    for side, rates in r["tokens_per_second"].items():
        print(f"  {side:<36}{statistics.median(rates):>10,.0f}{r['ratio'][side]:>8.2f}{r['ratio_to_best'][side]:>14.2f}")
    print(f"  ratio wanted: {r['wanted']}; tokens are prompt and answer, without padding; the best is {r['best_peer']!r}")


def show_memory(name: str, r: Mapping[str, Any]) -> None:
    sizes = ", ".join(f"{side} {size / 2**20:,.0f} MiB" for side, size in r["bytes"].items())
    print(
        f"\nMemory of a step, {name}, vocabulary {r['vocabulary']:,}, {r['tokens_per_step']} tokens: {sizes};"
        f" ratio {r['ratio']:.2f}, wanted {r['wanted']}"
    )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training beside transformers.Trainer, on the CPU; see docs/benchmarks.md.")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="timed seconds of each contender, at least (default %(default)g)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns that each contender has (default %(default)d)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["life", "12m"], help="models (default: life 12m)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured (default: all)")
    parser.add_argument("--compiled", action="store_true", help="pre-training: both sides with torch.compile as well")
    parser.add_argument("--tuned-peer", action="store_true", help="Trainer with our settings of the allocator")
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread, timed by what it computes: for machines with other work on them"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything that was measured there")
    options = parser.parse_args(argv)
    if not options.seconds > 0:
        raise ConfigError(f"--seconds ({options.seconds:g}) must be above 0: 5 is usual")
    if not options.rounds > 0:
        raise ConfigError(f"--rounds ({options.rounds}) must be above 0: 5 is usual")
    if options.compiled and "pretraining" not in options.parts:
        raise ConfigError(f"--compiled is about pretraining, and --parts has only {' and '.join(options.parts)}: leave one away")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options = arguments(argv)
        missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
        if missing:
            raise MissingExtraError(f"{' and '.join(missing)} not installed, to compare with: pip install 'athanor-lm[dev]'")
        run(options)
    except AthanorError as error:
        print(f"bench/train.py: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    precision: Precision = "bf16" if supports_bf16(torch.device("cpu")) else "fp32"
    if options.cpu_time:
        torch.set_num_threads(1)
    timing = Timing(options.seconds, options.rounds, time.process_time if options.cpu_time else time.perf_counter)
    facts = machine() | {name: metadata.version(name) for name in PEERS}
    for key, value in facts.items():
        print(f"{key:<14}{value}")
    print(f"{'precision':<14}{precision}, fused AdamW on both sides")
    print(f"{'allocator':<14}{'tuned for both' if options.tuned_peer else 'tuned by us, as it comes for Trainer'}")
    print(f"{'clock':<14}{'CPU time of one thread' if options.cpu_time else 'time on the wall'}", flush=True)
    results: dict[str, Any] = {"machine": facts, "precision": precision, "seconds": options.seconds, "rounds": options.rounds}
    results |= {"cpu_time": options.cpu_time, "tuned_peer": options.tuned_peer}
    results |= {part: {} for part in options.parts}
    if "memory" in options.parts:
        results["memory"] = memory({name: SHAPES[name] for name in options.shapes}, precision)
        for name, r in results["memory"].items():
            show_memory(name, r)
    tune_allocator()

    from transformers.utils import logging

    logging.set_verbosity_error()
    for name in options.shapes:
        if "pretraining" in options.parts:
            r = pretraining(SHAPES[name], precision, timing, options.compiled, options.tuned_peer)
            results["pretraining"][name] = r
            show_pretraining(name, r)
        if "tuning" in options.parts:
            results["tuning"][name] = tuning_sets(SHAPES[name], precision, timing, options.tuned_peer)
            for data, r in results["tuning"][name].items():
                show_tuning(name, data, r)
        sys.stdout.flush()
    if options.json:
        io.write_json(options.json, results)


if __name__ == "__main__":
    sys.exit(main())
