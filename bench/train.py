"""Speed of training beside transformers, on the CPU: `python bench/train.py --help`.

pre-training  packed rows of one length: our step beside LlamaForCausalLM (sdpa, same weights, same rows, same autocast,
              fused AdamW and clipping on both sides)
tuning        ragged conversations, packed: our step beside transformers.Trainer, which pads

Both live in one process with the same threads and the same allocator settings (`tune_allocator`, so it serves the peer too)
and take turns; neither is compiled. A ratio is the median of the ratios of the rounds. Before anything is timed, both
sides must compute the same loss from the same weights and batch.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from training.pretraining import memory, pretraining
from training.rounds import ROUNDS
from training.sides import CPU, Shape
from training.tuning import tuning_sets

from athanor.core import io
from athanor.core.device import Precision, machine, supports_bf16, tune_allocator
from athanor.core.errors import AthanorError, ConfigError, MissingExtraError
from athanor.models import llama

PEERS = ("transformers", "accelerate")
SHAPES = {
    "life": Shape(llama.Config(2048, 192, 4, 3, 1, 512), 256, 32, conversations=2048),  # of a life of ten minutes
    "12m": Shape(llama.Config(16384, 256, 8, 8, 8, 1024), 512, 8),
    "tiny": Shape(llama.Config(512, 32, 2, 4, 2, 64), 32, 8, conversations=48),  # for tests: its speeds mean nothing
}


def show_pretraining(name: str, r: Mapping[str, Any]) -> None:
    print(f"\nPre-training {name}: {r['parameters']:,} parameters, {r['tokens_per_step']} tokens a step in rows of {r['row']}")
    print(f"  {'':<14}{'tokens/s':>10}{'ratio':>8}{'memory of a step':>20}")
    for side, rates in r["tokens_per_second"].items():
        shown = f"{r['ratio']:.2f}" if side == "athanor" else "1.00"
        print(f"  {side:<14}{statistics.median(rates):>10,.0f}{shown:>8}{r['memory'][side] / 2**20:>16,.0f} MiB")
    print(f"  ratio wanted: {r['wanted']}; loss of the first step {r['loss']['athanor']:.5f}, {r['loss']['transformers']:.5f}")


def show_tuning(name: str, data: str, r: Mapping[str, Any]) -> None:
    print(f"\nTuning {name} on {data}: {r['mean_length']:.0f} tokens each, {r['padding_of_eight']:.0%} padding in batches of 8")
    print(f"  {'':<52}{'tokens/s':>10}{'ratio':>8}")
    for side, rates in r["tokens_per_second"].items():
        print(f"  {side:<52}{statistics.median(rates):>10,.0f}{r['ratio'][side]:>8.2f}")
    print(f"  ratio wanted: {r['wanted']}; tokens are prompt and answer, without padding")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed of training beside transformers, on the CPU; see docs/benchmarks.md.")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="timed seconds of each contender, at least (default %(default)g)"
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["life", "12m"], help="models (default: life 12m)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything that was measured there")
    options = parser.parse_args(argv)
    if not options.seconds > 0:
        raise ConfigError(f"--seconds ({options.seconds:g}) must be above 0: 5 is usual")
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
    precision: Precision = "bf16" if supports_bf16(CPU) else "fp32"
    facts = machine() | {name: metadata.version(name) for name in PEERS}
    for key, value in facts.items():
        print(f"{key:<14}{value}")
    print(f"{'precision':<14}{precision}, fused AdamW on both sides, tuned allocator for both, nothing compiled", flush=True)
    needed = memory({name: SHAPES[name] for name in options.shapes}, precision)
    tune_allocator()

    from transformers.utils import logging

    logging.set_verbosity_error()
    results: dict[str, Any] = {"machine": facts, "precision": precision, "seconds": options.seconds, "rounds": ROUNDS}
    results |= {"pretraining": {}, "tuning": {}}
    for name in options.shapes:
        r = pretraining(SHAPES[name], precision, options.seconds)
        results["pretraining"][name] = r | {"memory": needed[name]}
        show_pretraining(name, results["pretraining"][name])
    for name in options.shapes:
        if SHAPES[name].conversations:
            results["tuning"][name] = tuning_sets(SHAPES[name], precision, options.seconds)
            for data, r in results["tuning"][name].items():
                show_tuning(name, data, r)
    if options.json:
        io.write_json(options.json, results)


if __name__ == "__main__":
    sys.exit(main())
