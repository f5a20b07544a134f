"""A training run that may be killed at any moment: `python killed.py OUT STEPS [LAYOUT [OPTIMISER]]`, or under torchrun.

It saves after every step, keeps 2 checkpoints and the best, evaluates every third step and averages weights. What it is doing
stands in OUT/phase-R, two letters of process R: the main thread's and the writer's (`PHASES`). The environment variable KILL,
such as manifest:3, lets process KILL_RANK (0) kill itself when it comes to that point for the third time. A run that is through
writes OUT/done.json.
"""

import mmap
import os
import shutil
import signal
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import torch

from athanor.core import dist, io
from athanor.core.device import seed_all
from athanor.core.track import JsonlTracker
from athanor.models import llama
from athanor.objectives import next_token
from athanor.optim.build import OptimConfig, build
from athanor.optim.schedules import warmup_cosine
from athanor.train import _written, state
from athanor.train.parallel import group
from athanor.train.parallel.base import ALONE, local
from athanor.train.parallel.distributed import Distributed
from athanor.train.parallel.layout import parse
from athanor.train.step import apply, gradients
from athanor.types import IGNORE, Batch

# point -> (thread, letter): where a run can be, and be told to die
PHASES = {
    "resume": (0, "R"), "step": (0, "S"), "update": (0, "U"), "save": (0, "V"), "evaluate": (0, "E"),
    "idle": (1, "-"), "write": (1, "W"), "manifest": (1, "M"), "place": (1, "P"), "placed": (1, "A"), "delete": (1, "D"),
    "deleting": (1, "d"),
}  # fmt: skip


class Points:
    """Says what the run is doing, and kills it where the environment says so."""

    def __init__(self, out):
        path = out / f"phase-{dist.rank()}"
        path.write_bytes(b"R-")
        with path.open("r+b") as file:
            self.phase = mmap.mmap(file.fileno(), 2)  # seen by others at once, and after a kill
        point, _, count = os.environ.get("KILL", ":0").partition(":")
        here = int(os.environ.get("KILL_RANK", "0")) == dist.rank()
        self.fatal, self.seen = (point, int(count)) if here else ("", 0), Counter()

    def __call__(self, point):
        thread, letter = PHASES[point]
        self.phase[thread] = ord(letter)
        self.seen[point] += 1
        if (point, self.seen[point]) == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, module, name, point):
        true = getattr(module, name)

        def wrapped(*args, **kwargs):
            self(point)
            return true(*args, **kwargs)

        setattr(module, name, wrapped)

    def watch(self):
        self.before(state.StateStore, "_copied", "save")
        self.before(_written, "write_rank", "write")
        self.before(_written, "merge", "manifest")
        self.before(io, "place_dir", "place")
        self.before(state.StateStore, "_prune", "placed")
        self.before(io, "remove_dir", "delete")
        remove, write = shutil.rmtree, state.StateStore._write

        def one_by_one(path, **kwargs):
            for file in sorted(path.iterdir()) if path.is_dir() else ():
                file.unlink()
                self("deleting")
            remove(path, **kwargs)

        def whole_write(*args):
            write(*args)
            self("idle")

        shutil.rmtree, state.StateStore._write = one_by_one, whole_write


def ragged(step, part, sequences=4):
    generator = torch.Generator().manual_seed(1000 * step + part)
    lengths = torch.randint(3, 12, (sequences,), generator=generator)
    ids, labels = torch.randint(0, 160, (2, int(lengths.sum())), generator=generator)
    labels[torch.rand(len(labels), generator=generator) < 0.33] = IGNORE
    labels[torch.cumsum(lengths, 0) - lengths] = 7  # every sequence has a target
    return Batch(ids, labels, lengths, origin=f"step {step} part {part}")


def train(out, steps, strategy=ALONE, optim="muon"):
    out.mkdir(parents=True, exist_ok=True)
    point = Points(out)
    point.watch()
    model = llama.Model(llama.Config(160, d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, d_ff=64, max_positions=32))
    model.initialise(torch.Generator().manual_seed(0))
    model = strategy.place(model).train()
    optimizers = build(model, OptimConfig(name=optim, lr=0.01))
    averaged = {f"ema.{name}": p.detach().clone() for name, p in model.named_parameters()}
    schedule = warmup_cosine(steps, 5)
    store = state.StateStore(out / "state", {"steps": steps}, keep=2, best=("heldout", "min"), timeout=60.0)
    seed_all(0)
    progress = store.resume(model, optimizers, strategy=strategy, extra_tensors=averaged)
    seen = progress.extra.get("seen", 0)
    with closing(JsonlTracker(out / f"log-{dist.rank()}.jsonl", last_step=progress.step)) as tracker:
        while progress.step < steps:
            step = progress.step
            point("step")
            micro = [ragged(step, part) for part in range(2)]
            result = gradients(model, next_token.loss, micro, optimizers, precision="fp32", strategy=strategy)
            point("update")
            apply(optimizers, grad_norm=result.grad_norm, clip=1.0, lr_factor=schedule(step))
            with torch.no_grad():
                for name, p in model.named_parameters():
                    local(averaged[f"ema.{name}"]).lerp_(local(p), 0.1)
            seen += result.count
            record = {"step": step + 1, "loss": result.loss, "grad_norm": result.grad_norm, "noise": float(torch.rand(()))}
            if (step + 1) % 3 == 0:
                point("evaluate")
                sums = strategy.evaluate(model, next_token.loss, [ragged(10**6 + step, part) for part in range(2)], "fp32")
                record["heldout"] = float(sums.loss) / sums.count
            progress.step = step + 1
            progress.history.append(record)
            tracker.log(record)
            store.save(progress, model, optimizers, strategy=strategy, extra_tensors=averaged, extra={"seen": seen})
    store.close()
    if dist.is_main():
        io.write_json(out / "done.json", {"seen": seen})


def main(out, steps, layout="", optim="muon"):
    torch.set_num_threads(1)
    if not group.inside():
        return train(Path(out), int(steps), optim=optim)
    chosen = parse(layout)
    with group.joined(chosen) as device:
        train(Path(out), int(steps), Distributed(chosen, device), optim)


if __name__ == "__main__":
    main(*sys.argv[1:])
