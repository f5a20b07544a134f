"""Checkpoints of training: only the right one is resumed, and only whole."""

import json
import re

import pytest
import torch

from athanor.core.errors import CheckpointError
from athanor.train.state import Progress, StateStore

IDENTITY = {"config": {"lr": 0.01, "betas": (0.9, 0.95)}, "data": "abc"}


@pytest.fixture
def saved(tiny, run, tmp_path):
    """A store with the checkpoint of step 2, the model and its optimisers."""
    model = tiny()
    progress, optimizers = run(model, steps=2)
    store = StateStore(tmp_path / "state", IDENTITY)
    store.save(progress, model, optimizers)
    return store, model, optimizers, progress


def test_everything_comes_back_bit_by_bit(saved, tiny, run):
    store, model, optimizers, progress = saved
    drawn = torch.rand(3)
    other = tiny(seed=5)
    _, fresh = run(other, steps=1)
    back = StateStore(store.folder, IDENTITY).resume(other, fresh)
    assert back == progress
    assert torch.equal(torch.rand(3), drawn)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    for mine, theirs in zip(fresh, optimizers, strict=True):
        a, b = mine.state_dict(), theirs.state_dict()
        assert a["state"].keys() == b["state"].keys() and a["state"]
        for p in b["state"]:
            assert a["state"][p].keys() == b["state"][p].keys()
            assert all(torch.equal(torch.as_tensor(a["state"][p][k]), torch.as_tensor(v)) for k, v in b["state"][p].items())


def test_without_a_checkpoint_it_is_a_beginning(tiny, tmp_path):
    assert StateStore(tmp_path / "nothing", {}).resume(tiny(), []) == Progress()


def test_another_run_is_refused_naming_what_differs(saved):
    store, model, optimizers, _ = saved
    other = {"config": {"lr": 0.02, "betas": (0.9, 0.95)}, "data": "abd"}
    message = "belongs to a run with other config.lr, data: start with the same settings to resume it, or with another --out"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        StateStore(store.folder, other).resume(model, optimizers)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: flip(p / "state.safetensors"),
            r"state\.safetensors was altered \(its sha256 is not the recorded one\): delete",
        ),
        (lambda p: cut(p / "state.safetensors"), r"state\.safetensors was altered"),
        (lambda p: (p / "state.safetensors").unlink(), r"state\.safetensors was altered"),
        (lambda p: cut(p / "state.json"), r"state\.json is not JSON"),
        (lambda p: (p / "state.json").write_text('{"step": 2}'), r"state\.json lacks history, identity, seconds, sha256"),
    ],
)
def test_an_altered_checkpoint_is_refused(saved, damage, message):
    store, model, optimizers, _ = saved
    damage(store.folder / "step-00000002")
    with pytest.raises(CheckpointError, match=message):
        store.resume(model, optimizers)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_are_kept(saved, keep):
    store, model, optimizers, _ = saved
    store.keep = keep
    for step in (3, 10, 100_000_000):
        store.save(Progress(step), model, optimizers)
    assert store.steps() == [3, 10, 100_000_000][-keep:]
    assert len(list(store.folder.iterdir())) == keep
    assert store.resume(model, optimizers).step == 100_000_000


def test_what_a_killed_writer_left_is_not_resumed_and_not_kept(saved):
    store, model, optimizers, progress = saved
    half_written = store.folder / ".tmp-0123abcd-step-00000003"
    half_deleted = store.folder / "step-00000001"
    for folder in (half_written, half_deleted):
        folder.mkdir()
        (folder / "state.safetensors").write_bytes(b"half")
    assert store.steps() == [2]
    assert store.resume(model, optimizers) == progress
    assert [p.name for p in store.folder.iterdir()] == ["step-00000002"]


def test_a_checkpoint_that_was_being_replaced_is_put_back(saved):
    store, model, optimizers, progress = saved
    (store.folder / "step-00000002").rename(store.folder / ".old-0123abcd-step-00000002")
    assert store.resume(model, optimizers) == progress


def test_a_failed_save_leaves_the_old_one(saved, monkeypatch):
    store, model, optimizers, progress = saved
    monkeypatch.setattr(json, "dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.save(Progress(7), model, optimizers)
    monkeypatch.undo()
    assert store.resume(model, optimizers) == progress


def test_clear_removes_all(saved):
    store, model, optimizers, _ = saved
    store.clear()
    assert not store.folder.exists()
    assert store.resume(model, optimizers) == Progress()
