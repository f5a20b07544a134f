"""A dry step measures, touches nothing, and says what to lower where there is no room."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from athanor.core.errors import NoTargetsError, TrainingError
from athanor.models import io as models
from athanor.nn import sdpa
from athanor.objectives import next_token
from athanor.optim.build import OptimConfig, build
from athanor.train import dry
from athanor.train.step import train_step
from athanor.types import IGNORE, Batch


def start(family="llama", optim="muon", dtype=torch.float32):
    model = models.build(family, models.architecture(family).PRESETS["tiny"], seed=0).to(dtype).train()
    return model, build(model, OptimConfig(name=optim))


def state(model, optimizers):
    inner = [t for o in optimizers for s in o.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [t.clone() for t in (*model.parameters(), *model.buffers(), *grads, *inner)]


def step(model, optimizers, batch):
    return train_step(model, next_token.loss, [batch], optimizers, lr_factor=1.0, clip=1.0, precision="fp32")


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "mixtral"])
@pytest.mark.parametrize("begun", [False, True])
def test_everything_is_what_it_was(family, begun, ragged):
    model, optimizers = start(family)
    if begun:
        step(model, optimizers, ragged(5, 9))
    before, generators = state(model, optimizers), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())

    def noisy(model, batch):
        random.random(), np.random.rand()
        loss, count, metrics = next_token.loss(model, batch)
        return loss * (1 + torch.rand(())), count, metrics

    found = dry.dry_step(model, noisy, optimizers, dry.worst(512, 64, 320), "fp32")
    after = state(model, optimizers)
    assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[1]
    assert (np.random.get_state()[1] == generators[2]).all()
    assert found.seconds > 0 and found.peak > sum(p.nbytes for p in model.parameters()) and found.resident > 0


def test_training_goes_on_as_if_nothing_had_been(ragged):
    with_dry, without = start(), start()
    dry.dry_step(*with_dry[:1], next_token.loss, with_dry[1], dry.worst(512, 64, 320), "bf16")
    for i in range(3):
        a, b = (step(model, optimizers, ragged(5, 9, seed=i)) for model, optimizers in (with_dry, without))
        assert a == b
    assert all(torch.equal(p, q) for p, q in zip(with_dry[0].parameters(), without[0].parameters(), strict=True))


@pytest.mark.parametrize("length", [48, 200, 256, 600])
def test_masks_of_every_way_of_attention_are_those_of_real_tensors_afterwards(length):
    """What is kept of a rehearsal has no data: read later, it gives whatever lies in memory."""
    sdpa.forget_masks()
    model = models.build("llama", replace(models.architecture("llama").PRESETS["tiny"], max_positions=1024), seed=0).train()
    batch = dry.worst(2 * length, length, 320)
    batch.labels = batch.ids.clone()
    expected, _, _ = next_token.loss(model, batch)
    sdpa.forget_masks()
    dry.dry_step(model, next_token.loss, build(model, OptimConfig()), batch, "fp32")
    assert torch.equal(next_token.loss(model, batch)[0], expected)


def test_more_tokens_take_more():
    model, optimizers = start()
    one, two = (dry.dry_step(model, next_token.loss, optimizers, dry.worst(n, 64, 320), "fp32").peak for n in (1024, 4096))
    assert two > 2 * one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optim", ["adamw", "muon", "sgd", "adafactor"])
def test_the_state_to_come_is_the_state_that_comes(optim, dtype, ragged):
    model, optimizers = start(optim=optim, dtype=dtype)
    before = sum(t.nbytes for o in optimizers for t in dry._tensors(o.state))
    coming = dry.state_to_come(optimizers)
    assert all(p.grad is None for p in model.parameters())
    step(model, optimizers, ragged(5, 9))
    assert sum(t.nbytes for o in optimizers for t in dry._tensors(o.state)) == before + coming
    assert dry.state_to_come(optimizers) == 0


def test_refused_before_anything_is_computed(monkeypatch):
    model, optimizers = start()
    monkeypatch.setattr(dry, "free_memory", lambda: 1_000_000)
    monkeypatch.setattr(dry, "_run", lambda *a: pytest.fail("it was computed"))
    with pytest.raises(TrainingError) as error:
        dry.dry_step(model, next_token.loss, optimizers, dry.worst(65_536, 64, 320), "fp32")
    said = str(error.value)
    assert said.startswith("a step of 65,536 tokens (longest sequence 64) needs about 0.")
    assert said.endswith("and 0.00 GB are free: lower batch_tokens or context, raise accumulate, or compute activations again"
                         " (--checkpointing full)")  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError("no room"),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_says_what_to_lower(error):
    model, optimizers = start()
    before = state(model, optimizers)
    calls = []

    def objective(model, batch):
        calls.append(1)
        if len(calls) > 1:  # the first is the rehearsal
            raise error
        return next_token.loss(model, batch)

    with pytest.raises(TrainingError, match=r"does not fit into the memory of cpu \(.*lower batch_tokens or context"):
        dry.dry_step(model, objective, optimizers, dry.worst(512, 64, 320), "fp32")
    assert all(torch.equal(a, b) for a, b in zip(before, state(model, optimizers), strict=True))


def test_other_errors_stay_what_they_are():
    def objective(model, batch):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        dry.dry_step(*start()[:1], objective, start()[1], dry.worst(512, 64, 320), "fp32")


def test_a_batch_without_targets():
    model, optimizers = start()
    ids = torch.zeros(8, dtype=torch.int64)
    batch = Batch(ids, torch.full_like(ids, IGNORE), torch.tensor([8]), origin="masked")
    with pytest.raises(NoTargetsError, match="batch 'masked' has no supervised target: a dry step needs one"):
        dry.dry_step(model, next_token.loss, optimizers, batch, "fp32")


def test_an_objective_that_cannot_be_rehearsed_is_run():
    def picky(model, batch):
        loss, count, metrics = next_token.loss(model, batch)
        return loss + 0 * len(torch.unique(model.embedding.weight)), count, metrics

    model, optimizers = start()
    assert dry.dry_step(model, picky, optimizers, dry.worst(512, 64, 320), "fp32").peak > 0


def test_the_worst_batch():
    batch = dry.worst(1000, 64, 320)
    assert batch.lengths.tolist() == [64] * 15 and batch.ids.max() < 320 and (batch.labels != IGNORE).all()
    assert dry.worst(10, 64, 320).lengths.tolist() == [64]


def test_free_memory_heeds_control_groups(monkeypatch, tmp_path):
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    2000 kB\n",
        "/sys/fs/cgroup/memory.max": "1500000\n",
        "/sys/fs/cgroup/memory.current": "500000\n",
    }

    def read(path, *args, **kwargs):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert dry.free_memory() == 1_000_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert dry.free_memory() == 2_048_000
    files.clear()
    assert dry.free_memory() is None
