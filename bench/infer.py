"""Generation beside transformers, on the CPU: `python bench/infer.py --help`.

single  one request: a prompt of 128 tokens and 128 new ones, greedy
mixed   64 requests, prompts and answers of 32..256 tokens: the engine beside static batches and `generate_batch` of transformers
prefix  time to the first token of a second request whose first 1,000 tokens are those of one before
memory  of the cache that nothing stands in, while the mixed requests run

llama.cpp runs beside where ATHANOR_LLAMACPP names its library (`inference/llamacpp.py`).

The sides have the same weights (through a file), bfloat16 on both, live in one process with the same threads and take turns. A
ratio is the median of the ratios of the rounds. Before anything is timed, both must give the same logits.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from inference import llamacpp
from inference.requests import Mix
from inference.sides import Ours, Static, Theirs, continuous, models
from training.rounds import ratio

from athanor.core import io
from athanor.core.device import machine, tune_allocator
from athanor.core.errors import AthanorError, ConfigError, MissingExtraError
from athanor.models import llama

SHAPES = {
    "124m": llama.Config(32768, 768, 12, 12, 12, 2560, max_positions=2048),
    "tiny": llama.Config(512, 64, 2, 4, 2, 128, max_positions=2048),  # for tests: speeds mean nothing
}
PARTS = ("single", "mixed", "prefix", "memory")
WANTED = {"bf16": 1.5, "int4": 3.0, "mixed": 3.0, "prefix": 0.2, "memory": 0.04}


def turns(contenders: Mapping[str, Any], rounds: int) -> dict[str, list[float]]:
    """Results of each contender in each round; every other round goes backwards, against drift of the machine."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        for name in list(contenders)[:: -1 if i % 2 else 1]:
            found[name].append(contenders[name]())
    return found


def single(sides: dict[str, Any], rounds: int, prompt: int, new: int) -> dict[str, Any]:
    """Tokens per second of one request."""
    ids = Mix(1, 0).ids(prompt, sides["ours"].vocab_size)
    contenders = {f"athanor {kind}": lambda side=side: side.single(ids, new) for kind, side in sides["kinds"].items()}
    contenders |= {f"llama.cpp {kind}": lambda side=side: side.single(ids, new) for kind, side in sides["llama.cpp"].items()}
    contenders["transformers bf16"] = lambda: sides["theirs"].single(ids, new)
    for run in contenders.values():
        run()  # what is prepared once is not timed
    rates = turns(contenders, rounds)
    return {"tokens_per_second": rates, "ratio": {n: ratio(r, rates["transformers bf16"]) for n, r in rates.items()}}


def mixed(sides: dict[str, Any], rounds: int, count: int, low: int, high: int, sizes: Sequence[int]) -> dict[str, Any]:
    """Useful tokens per second of many requests at once."""
    requests = Mix(count, 1).requests(low, high, sides["ours"].vocab_size)
    ours = {name: side for name, side in sides["kinds"].items() if name.startswith("bf16")}
    contenders: dict[str, Any] = {f"athanor {name}": lambda side=side: side.mixed(requests) for name, side in ours.items()}
    contenders |= {f"llama.cpp {kind}": lambda side=side: side.mixed(requests) for kind, side in sides["llama.cpp"].items()}
    for size in sizes:
        contenders[f"transformers, static batches of {size}"] = lambda size=size: Static(sides["theirs"], size).mixed(requests)
    contenders["transformers, generate_batch"] = lambda: continuous(sides["theirs"], requests)
    rates = turns(contenders, rounds)
    peers = {name: statistics.median(r) for name, r in rates.items() if name.startswith("transformers")}
    best = max(peers, key=lambda name: peers[name])
    return {
        "tokens_per_second": rates,
        "best": best,
        "ratio": {name: ratio(r, rates[best]) for name, r in rates.items()},
        "waste": sides["ours"].waste,
    }


def prefix(sides: dict[str, Any], rounds: int, shared: int, own: int) -> dict[str, Any]:
    """Seconds to the first token, of a prompt that nobody asked before and of one whose beginning is known."""
    cold, warm = [], []
    for i in range(rounds):
        mix = Mix(1, 100 + i)
        beginning = mix.ids(shared, sides["ours"].vocab_size)
        tails = [mix.ids(own, sides["ours"].vocab_size) for _ in range(2)]
        cold.append(sides["ours"].first([*beginning, *tails[0]]))
        warm.append(sides["ours"].first([*beginning, *tails[1]]))
    return {"cold": cold, "warm": warm, "ratio": ratio(warm, cold)}


def show(name: str, r: Mapping[str, Any]) -> None:
    print(f"\n{name}")
    for side, values in r.get("tokens_per_second", {}).items():
        print(f"  {side:<38}{statistics.median(values):>10,.1f} tokens/s{r['ratio'][side]:>8.2f}")
    if name == "mixed":
        print(f"  beside {r['best']!r}, wanted {WANTED['mixed']}; of the cache {r['waste']:.1%} is held and empty, wanted < 4%")
    if name == "single":
        print(f"  wanted: bf16 {WANTED['bf16']}, int4 {WANTED['int4']}")
    if name == "prefix":
        cold, warm = (statistics.median(r[kind]) for kind in ("cold", "warm"))
        print(f"  cold {cold:.3f} s, warm {warm:.3f} s: {r['ratio']:.2f}, wanted {WANTED['prefix']}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generation beside transformers, on the CPU; see docs/benchmarks.md.")
    parser.add_argument("--shape", choices=SHAPES, default="124m")
    parser.add_argument("--parts", nargs="+", choices=PARTS[:3], default=list(PARTS[:3]))
    parser.add_argument("--rounds", type=int, default=3, help="turns that each contender has (default %(default)d)")
    parser.add_argument("--requests", type=int, default=64, help="mixed requests (default %(default)d)")
    parser.add_argument("--range", type=int, nargs=2, default=(32, 256), help="tokens of their prompts and answers")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32], help="sizes of transformers' static batches")
    parser.add_argument("--compiled", action="store_true", help="also engines whose step is compiled, which takes minutes")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything that was measured there")
    options = parser.parse_args(argv)
    if min(options.batches) < 1 or options.rounds < 1 or options.requests < 1 or not 1 <= options.range[0] <= options.range[1]:
        raise ConfigError("--rounds, --requests and --batches must be at least 1, and --range two numbers from 1 up in order")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    tune_allocator()
    facts = machine() | {"transformers": metadata.version("transformers")}
    for key, value in facts.items():
        print(f"{key:<14}{value}")
    results: dict[str, Any] = {"machine": facts, "shape": options.shape}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ours, theirs, kinds = models(SHAPES[options.shape], Path(folder))
        engines = {kind: Ours(m) for kind, m in kinds.items()}
        sides = {"ours": engines["bf16"], "theirs": Theirs(theirs), "kinds": engines, "llama.cpp": {}}
        if options.compiled:
            start = time.perf_counter()
            engines |= {f"{kind} compiled": Ours(m, compile=True) for kind, m in kinds.items()}
            results["compiling"] = time.perf_counter() - start
            print(f"{'compiling':<14}{results['compiling']:.0f} s for {len(kinds)} engines")
        if llamacpp.VARIABLE in os.environ:
            sides["llama.cpp"] = stack.enter_context(llamacpp.sides(ours, Path(folder), torch.get_num_threads()))
        print(f"{'parameters':<14}{ours.n_parameters():,}", flush=True)
        if "single" in options.parts:
            results["single"] = single(sides, options.rounds, 128, 128)
            show("single", results["single"])
        if "mixed" in options.parts:
            results["mixed"] = mixed(sides, options.rounds, options.requests, *options.range, options.batches)
            show("mixed", results["mixed"])
        if "prefix" in options.parts:
            results["prefix"] = prefix(sides, options.rounds, 1000, 24)
            show("prefix", results["prefix"])
    return results


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options = arguments(argv)
        if importlib.util.find_spec("transformers") is None:
            raise MissingExtraError("transformers is not installed, to compare with: pip install 'athanor-lm[dev]'")
        results = run(options)
    except AthanorError as error:
        print(f"bench/infer.py: {error}", file=sys.stderr)
        return 1
    if options.json:
        io.write_json(options.json, results)
    return 0


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
