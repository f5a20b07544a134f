"""`fit`: what it calls, logs and keeps, and law L4: resumed = uninterrupted."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from athanor.core.errors import NonFiniteLossError
from athanor.core.track import JsonlTracker
from athanor.models import t5
from athanor.objectives import next_token, seq2seq
from athanor.train.loop import Hook
from athanor.train.replay import kept
from athanor.train.state import StateStore
from athanor.types import Batch, Source

TIMES = ("tokens_per_second", "batch_seconds")


def timeless(history):
    """Records without what a clock says."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in history]


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def moments(optimizers):
    """Everything that optimisers remember."""
    states = {}
    for i, optimizer in enumerate(optimizers):
        for p, values in optimizer.state_dict()["state"].items():
            states |= {f"{i}.{p}.{name}": torch.as_tensor(value) for name, value in values.items()}
    return states


class Log(list):
    def log(self, record):
        self.append(dict(record))

    def close(self):
        pass


def test_it_learns(tiny, run, ragged):
    batch = ragged(12, 5, seed=3)
    progress, _ = run(tiny(), steps=20, batches=lambda step: [batch])
    losses = [r["loss"] for r in progress.history]
    assert losses[-1] < 0.8 * losses[0]
    assert progress.history[-1]["correct"] > progress.history[0]["correct"]


def test_a_record_per_step(tiny, run):
    log = Log()
    progress, _ = run(tiny(), steps=5, tracker=log)
    assert log == progress.history
    assert [r["step"] for r in log] == [1, 2, 3, 4, 5]
    assert [r["lr"] for r in log] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01, 0.0096], rel=0.05)
    for record in log:
        assert record["tokens"] == 30 and 0 < record["targets"] < 30
        assert record["grad_norm"] > 0 and record["tokens_per_second"] > 0 and 0 <= record["correct"] <= 1
    assert progress.seconds > 0 and progress.step == 5


def test_what_an_encoder_reads_counts_as_tokens(run):
    model = t5.Model(t5.Config(vocab_size=64, d_model=16, n_layers=1, n_heads=2, head_dim=8, d_ff=32))
    ids = torch.arange(3, 17)
    batch = Batch(ids[:4], ids[1:5], torch.tensor([4]), source=Source(ids[4:], torch.tensor([10])))
    progress, _ = run(model, steps=1, objective=seq2seq.build(seq2seq.Config()), batches=lambda step: [batch, batch])
    assert (progress.history[0]["tokens"], progress.history[0]["targets"]) == (28, 8)


def test_the_model_trains_while_it_is_trained_and_then_answers(tiny, run):
    model, seen = tiny(), []

    def objective(model, batch):
        seen.append(model.training)
        return next_token.loss(model, batch)

    run(model, steps=1, objective=objective)
    assert seen == [True, True] and not model.training


def test_hooks_are_called_every_so_often_and_at_the_end(tiny, run):
    calls = []

    def hook(name):
        return lambda step: calls.append((name, step)) or {name: step}

    log = Log()
    run(tiny(), steps=7, hooks=[Hook(hook("a"), 3), Hook(hook("b"), 100)], tracker=log)
    assert calls == [("a", 3), ("a", 6), ("a", 7), ("b", 7)]
    assert [r.get("a") for r in log] == [None, None, 3, None, None, 6, 7]
    assert log[-1]["b"] == 7


def test_a_loss_that_is_not_finite_ends_it_before_the_update_and_keeps_the_batch(tiny, run, tmp_path):
    model = tiny()

    def objective(model, batch):
        total, count, metrics = next_token.loss(model, batch)
        return total * (float("inf") if batch.origin == "ragged 5" else 1), count, metrics

    _, good = run(other := tiny(), steps=2)
    store = StateStore(tmp_path / "state", {})
    with pytest.raises(
        NonFiniteLossError, match=r"step 3: the loss of batch 'ragged 5' is inf; the batches are in .*bad-step-3.json"
    ):
        run(model, objective=objective, store=store)
    assert equal(weights(model), weights(other))
    batches, _ = kept(tmp_path / "state" / "bad-step-3.json")
    assert [b.origin for b in batches] == ["ragged 4", "ragged 5"]
    assert [b.lengths.tolist() for b in batches] == [[5, 9, 3], [11, 2]]
    assert len(batches[1].ids) == 13
    with pytest.raises(NonFiniteLossError, match="lower the learning rate, or look at the batches named above"):
        run(tiny(), objective=objective)
    assert good


@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_resumed_is_uninterrupted_bit_by_bit(tiny, run, tmp_path, optim):
    """Global generators are drawn from in every step: their state is part of it."""

    def objective(model, batch):
        noise = torch.rand(()) + random.random() + float(np.random.rand())
        total, count, metrics = next_token.loss(model, batch)
        return total * (1 + 0.1 * noise), count, metrics

    def seed():
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)

    seed()
    whole, optimizers = run(expected := tiny(), steps=10, optim=optim, objective=objective)
    seed()
    log = tmp_path / "log.jsonl"
    identity = {"optim": optim}
    tracker = JsonlTracker(log)
    # Killed by an exception in step 8, when the newest checkpoint is that of some earlier step.
    with pytest.raises(KeyboardInterrupt):
        run(
            tiny(), steps=10, optim=optim, objective=objective, tracker=tracker,
            store=SavesAt(tmp_path / "state", identity, at=4), save_seconds=-1.0,
            hooks=[Hook(interrupt_at(8), 1)],
        )  # fmt: skip
    tracker.close()
    torch.manual_seed(99)  # a new process knows nothing of the old one's generators
    store = StateStore(tmp_path / "state", identity)
    assert store.steps() == [4]
    model = tiny(seed=77)
    tracker = JsonlTracker(log, last_step=4)
    progress, resumed = run(model, steps=10, optim=optim, objective=objective, store=store, save_seconds=1e9, tracker=tracker)
    tracker.close()
    assert equal(weights(model), weights(expected))
    assert equal(moments(resumed), moments(optimizers))
    assert timeless(progress.history) == timeless(whole.history)
    assert timeless(json.loads(line) for line in log.read_text().splitlines()) == timeless(whole.history)


class SavesAt(StateStore):
    """Saves once, at step `at`."""

    def __init__(self, folder, identity, at):
        super().__init__(folder, identity)
        self.at = at

    def save(self, progress, model, optimizers, **more):
        if progress.step == self.at:
            super().save(progress, model, optimizers, **more)


def interrupt_at(step):
    def hook(now):
        if now == step:
            raise KeyboardInterrupt
        return {}

    return hook


def test_a_finished_run_is_not_trained_further(tiny, run, tmp_path):
    store = SavesAt(tmp_path, {}, at=3)
    model = tiny()
    run(model, steps=4, store=store, save_seconds=-1.0)
    again = tiny(seed=3)
    progress, _ = run(again, steps=3, store=store)
    assert progress.step == 3 and len(progress.history) == 3


LIVES = """
# Trains in forked processes, one life after another; all but the last are killed at a random moment of their own steps.
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
import conftest
from athanor.core.io import save_tensors
from athanor.models import llama
from athanor.objectives import next_token
from athanor.optim.build import OptimConfig, build
from athanor.optim.schedules import warmup_cosine
from athanor.train.loop import Hook, fit
from athanor.train.state import StateStore

STEPS = 24

def live(out, report):
    model = llama.Model(llama.Config(320, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=64, max_positions=32))
    model.initialise(torch.Generator().manual_seed(0))
    optimizers = build(model, OptimConfig(lr=0.01))
    hook = Hook(lambda step: os.write(report, b".") and {{}}, 1)
    fit(model, next_token.loss, conftest._by_step, optimizers, warmup_cosine(STEPS, 3), steps=STEPS, hooks=[hook],
        store=StateStore(out / "state", {{"a": 1}}), save_seconds=0.0)
    save_tensors(out / "weights.safetensors", dict(model.state_dict()))

def start(out):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        live(out, write)
        os._exit(0)
    os.close(write)
    return pid, read

def finish(out):
    pid, read = start(out)
    assert os.waitpid(pid, 0)[1] == 0

whole, killed, chance = Path(sys.argv[1]), Path(sys.argv[2]), random.Random()
finish(whole)
for _ in range(5):
    pid, read = start(killed)
    steps = chance.randint(1, 4)
    done = 0
    while done < steps and os.read(read, 1):
        done += 1
    until = time.perf_counter() + chance.uniform(0, 0.02)  # the save after the step, the step after it ...
    while time.perf_counter() < until:
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(read)
assert not (killed / "weights.safetensors").exists()
finish(killed)
"""


def test_killed_at_random_moments_and_resumed_the_weights_are_the_same_bits(tmp_path):
    """Real processes and SIGKILL; every step is saved, so most kills hit a save or the deletion of an old checkpoint."""
    script = LIVES.format(here=str(Path(__file__).parent))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    done = subprocess.run([sys.executable, "-c", script, *folders], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder in folders:
        assert len(list((folder / "state").iterdir())) == 1  # nothing half written is left behind
    whole, killed = ((folder / "weights.safetensors").read_bytes() for folder in folders)
    assert whole == killed
