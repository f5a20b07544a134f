"""Memory of a training step, predicted and measured: `python bench/memory.py --help`.

Each configuration is trained for some steps in a process of its own, with the allocator as the recipes set it (`tune_allocator`).

resident  by how much the process grew: its peak, less what it had before the model was built and after a tiny step had loaded
          what every step loads
tensors   the peak of bytes of live tensors in one more step, counted operation by operation; not under fsdp, which takes memory
          from tensors that live on

Both stand beside what `athanor plan` predicts; a ratio is predicted over measured.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from athanor.core import io
from athanor.core.device import machine, peak_memory, tune_allocator
from athanor.core.errors import AthanorError
from athanor.models import io as models
from athanor.models import llama
from athanor.objectives import next_token
from athanor.optim.build import OptimConfig, build
from athanor.train.budget_memory import Setup, predict
from athanor.train.budget_trace import Live
from athanor.train.checkpointing import checkpoint
from athanor.train.parallel.base import ALONE, Alone
from athanor.train.parallel.group import joined
from athanor.train.parallel.layout import parse
from athanor.train.step import train_step
from athanor.types import Batch

STEPS = 4
SHAPES = {
    "9m": (llama.Config(8192, 256, 8, 4, 4, 704), 4096, 512),
    "41m": (llama.Config(32768, 512, 8, 8, 4, 1408), 4096, 512),
    "tiny": (llama.Config(320, 32, 2, 4, 2, 48), 256, 64),  # for tests
}
_BASE = Setup(precision="bf16", optimizer="adamw")
CONFIGURATIONS = {
    "fp32": replace(_BASE, precision="fp32"),
    "bf16": _BASE,
    "bf16, accumulate 4": "accumulate",
    "bf16, checkpointing full": replace(_BASE, checkpointing="full"),
    "bf16, muon": replace(_BASE, optimizer="muon"),
    "bf16, fsdp 2": replace(_BASE, layout=parse("fsdp=2")),
}


def setup(name: str, batch_tokens: int, context: int) -> Setup:
    """A configuration at a size; four micro-batches are of half the size each, so that they are not all small."""
    chosen = CONFIGURATIONS[name]
    if isinstance(chosen, Setup):
        return replace(chosen, batch_tokens=batch_tokens, context=context)
    return replace(_BASE, batch_tokens=2 * batch_tokens, accumulate=4, context=context)


def _steps(config: llama.Config, how: Setup, steps: int, strategy: Alone) -> Any:
    """A function that makes one more step, after `steps`."""
    model = models.build("llama", config, seed=0)
    if how.checkpointing != "none":
        checkpoint(model, how.checkpointing)
    model = strategy.place(model).train()
    optimizers = build(model, OptimConfig(name=how.optimizer), bf16=how.precision != "fp32")
    rows = how.rows * how.layout.data
    ids = torch.randint(0, config.vocab_size, (rows * how.context,), generator=torch.Generator().manual_seed(1))
    batch = Batch(ids, ids.roll(-1), torch.full((rows,), how.context), origin="random rows")

    def step() -> None:
        train_step(
            model, next_token.loss, [batch] * how.micro, optimizers,
            lr_factor=1.0, clip=1.0, precision="fp32" if how.precision == "fp32" else "bf16", strategy=strategy,
        )  # fmt: skip

    for _ in range(steps):
        step()
    return step


def measure(shape: str, name: str, rank: int, port: int, found: Any) -> None:
    """One process; puts (resident, tensors) into the queue, where it is the first."""
    tune_allocator()
    config, batch_tokens, context = SHAPES[shape]
    how = setup(name, batch_tokens, context)
    world = how.layout.world
    torch.set_num_threads(max(1, torch.get_num_threads() // world))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    tiny = SHAPES["tiny"][0]
    if world == 1:
        _measure(config, how, tiny, lambda: ALONE, found)
        return
    from athanor.train.parallel.distributed import Distributed

    with joined(how.layout) as device:
        _measure(config, how, tiny, lambda: Distributed(how.layout, device), found if rank == 0 else None)


def _measure(config: llama.Config, how: Setup, tiny: llama.Config, strategy: Any, found: Any) -> None:
    _steps(tiny, replace(how, batch_tokens=64 * how.layout.data * how.micro, context=64), 1, strategy())
    before = _resident()
    with Live() as live:
        step = _steps(config, how, 1, strategy())
    for _ in range(STEPS - 1):
        step()
    resident = peak_memory() - before
    with live:
        live.restart()
        step()
    if found is not None:
        found.put((resident, live.peak if how.layout.world == 1 else None))


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def compare(shape: str, name: str) -> dict[str, Any]:
    """Predicted and measured bytes of one configuration."""
    config, batch_tokens, context = SHAPES[shape]
    how = setup(name, batch_tokens, context)
    need = predict(models.build("llama", config), how)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context_ = multiprocessing.get_context("spawn")
    found = context_.Queue()
    ranks = [context_.Process(target=measure, args=(shape, name, r, port, found)) for r in range(how.layout.world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise AthanorError(f"{shape}, {name}: the process that was measured died; see above")
    resident, tensors = found.get()
    return {
        "shape": shape,
        "configuration": name,
        "predicted": {"resident": need.resident, "tensors": need.peak, "parts": need.parts},
        "measured": {"resident": resident, "tensors": tensors},
        "ratio": {"resident": need.resident / resident, "tensors": tensors and need.peak / tensors},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Memory of a training step, predicted and measured.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["9m", "41m"], help="models (default: 9m 41m)")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), help="configurations")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything that was measured there")
    options = parser.parse_args(argv)
    facts = machine()
    print(", ".join(f"{k} {facts[k]}" for k in ("cpu", "threads", "torch")))
    print(
        f"{'MB':<34}{'resident: predicted':>20}{'measured':>10}{'ratio':>7}{'tensors: predicted':>20}{'measured':>10}{'ratio':>7}"
    )
    rows = []
    try:
        for shape in options.shapes:
            for name in options.only:
                r = compare(shape, name)
                rows.append(r)
                print(f"{shape + ': ' + name:<34}", end="")
                for kind in ("resident", "tensors"):
                    p, m, ratio = r["predicted"][kind] / 1e6, r["measured"][kind], r["ratio"][kind]
                    print(f"{p:>20,.0f}" + (f"{m / 1e6:>10,.0f}{ratio:>7.3f}" if m else f"{'-':>10}{'-':>7}"), end="")
                print(flush=True)
    except AthanorError as error:
        print(f"bench/memory.py: {error}", file=sys.stderr)
        return 1
    if options.json:
        io.write_json(options.json, {"machine": facts, "results": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
