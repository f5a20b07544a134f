"""Checkpoints of training: only the right one is resumed, and only whole; errors of the writing thread are never lost."""

import json
import re
import threading

import pytest
import torch

from athanor.core import io
from athanor.core.errors import CheckpointError
from athanor.optim.build import OptimConfig, build
from athanor.train.state import Progress, StateStore

IDENTITY = {"config": {"lr": 0.01, "betas": (0.9, 0.95)}, "data": "abc"}


@pytest.fixture
def saved(tiny, run, tmp_path):
    """A store with the checkpoint of step 2, the model and its optimisers."""
    model = tiny()
    progress, optimizers = run(model, steps=2)
    store = StateStore(tmp_path / "state", IDENTITY)
    store.save(progress, model, optimizers)
    store.wait()
    return store, model, optimizers, progress


def same_states(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        a, b = a.state_dict()["state"], b.state_dict()["state"]
        assert a.keys() == b.keys() and a
        for p in b:
            assert a[p].keys() == b[p].keys()
            for k, v in b[p].items():
                assert torch.equal(a[p][k], v) and a[p][k].dtype == v.dtype and a[p][k].device == v.device
    return True


def test_everything_comes_back_bit_by_bit(saved, tiny, run):
    store, model, optimizers, progress = saved
    drawn = torch.rand(3)
    other = tiny(seed=5)
    _, fresh = run(other, steps=1)
    where = {k: v.data_ptr() for k, v in other.state_dict().items()}
    back = StateStore(store.folder, IDENTITY).resume(other, fresh)
    assert back == progress
    assert torch.equal(torch.rand(3), drawn)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
        assert other.state_dict()[key].data_ptr() == where[key]  # read in place
    assert same_states(fresh, optimizers)


def test_the_state_of_an_optimiser_lies_under_the_names_of_parameters(saved):
    store, model, *_ = saved
    manifest = io.read_json(store.folder / "step-00000002" / "manifest.json")
    names = {n for n in manifest["tensors"] if n.startswith("optimizer.")}
    assert {n.removeprefix("optimizer.").rpartition(".")[0] for n in names} == {n for n, _ in model.named_parameters()}
    assert {n.rpartition(".")[2] for n in names} == {"momentum", "step", "exp_avg", "exp_avg_sq"}
    for name in ("head.weight", "norm.weight"):
        assert manifest["tensors"][f"optimizer.{name}.exp_avg"]["shape"] == list(model.state_dict()[name].shape)


def test_parameters_in_another_order_get_their_own_state(saved, tiny):
    """By index a resume would put the moments of one parameter into another."""
    store, _, optimizers, _ = saved
    model = tiny()
    fresh = build(model, OptimConfig(lr=0.01))
    fresh[1].param_groups[0]["params"].reverse()
    store.resume(model, fresh)
    wanted = optimizers[1].state_dict()["state"]
    last = len(wanted) - 1
    for p, values in fresh[1].state_dict()["state"].items():
        assert torch.equal(values["exp_avg"], wanted[last - p]["exp_avg"])


def test_moments_keep_their_precision_and_numbers_their_kind(tiny, tmp_path):
    """`Optimizer.load_state_dict` would round these moments to the weights' bfloat16."""
    model = tiny().to(torch.bfloat16)
    weight = model.head.weight
    optimizer = torch.optim.SGD([weight], lr=0.1)
    kept = {"momentum_buffer": torch.rand(weight.shape), "count": 3, "rate": 0.25, "none": None}
    optimizer.state[weight].update(kept)
    store = StateStore(tmp_path, {})
    store.save(Progress(1), model, [optimizer])
    moments = kept.pop("momentum_buffer").clone()
    optimizer.state.clear()
    store.resume(model, [optimizer])
    assert torch.equal(optimizer.state[weight].pop("momentum_buffer"), moments) and moments.dtype == torch.float32
    assert optimizer.state[weight] == kept and type(optimizer.state[weight]["count"]) is int


def test_what_the_loop_adds_comes_back(saved, tiny):
    store, model, optimizers, _ = saved
    averaged = {f"ema.{name}": torch.rand_like(p) for name, p in model.named_parameters()}
    other = {"guard.window": torch.arange(5), "guard.last": torch.tensor(2.5)}
    extra = {"loss_scale": 1024.0, "guard": {"skipped": [3, 9]}}
    store.save(Progress(3), model, optimizers, extra_tensors=averaged | other, extra=extra)
    fresh = {name: torch.zeros_like(value) for name, value in (averaged | other).items()}
    model = tiny(seed=1)
    progress = store.resume(model, build(model, OptimConfig()), extra_tensors=fresh)
    assert progress.extra == extra and progress.step == 3
    assert all(torch.equal(fresh[name], value) for name, value in (averaged | other).items())


def test_a_save_is_of_its_moment_whatever_happens_while_it_is_written(saved, tiny, monkeypatch):
    store, model, optimizers, _ = saved
    go = threading.Event()
    write = io.save_tensors
    monkeypatch.setattr(io, "save_tensors", lambda *a, **k: go.wait() and write(*a, **k))
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    progress = Progress(3, [{"step": 3, "loss": 1.0}])
    store.save(progress, model, optimizers)  # returns although nothing can be written yet
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    for optimizer in optimizers:
        for values in optimizer.state.values():
            for value in values.values():
                value.zero_()
    progress.step = 4
    progress.history.append({"step": 4, "loss": 2.0})
    go.set()
    back = tiny(seed=1)
    fresh = build(back, OptimConfig(lr=0.01))
    assert store.resume(back, fresh) == Progress(3, [{"step": 3, "loss": 1.0}])
    assert all(torch.equal(value, wanted[name]) for name, value in back.state_dict().items())
    assert all(values["step"] == 2 for values in fresh[1].state.values())


def test_the_next_save_waits_for_the_one_before(saved, monkeypatch):
    store, model, optimizers, _ = saved
    events = []
    write = io.save_tensors
    monkeypatch.setattr(io, "save_tensors", lambda path, *a, **k: (write(path, *a, **k), events.append(path.parent.name[-1])))
    copied = StateStore._copied
    monkeypatch.setattr(StateStore, "_copied", lambda self, *a: events.append("copy") or copied(self, *a))
    for step in (3, 4, 5):
        store.save(Progress(step), model, optimizers)
    store.close()
    assert events == ["copy", "3", "copy", "4", "copy", "5"]


def test_without_a_checkpoint_it_is_a_beginning(tiny, tmp_path):
    assert StateStore(tmp_path / "nothing", {}).resume(tiny(), []) == Progress()


def test_another_run_is_refused_naming_what_differs(saved):
    store, model, optimizers, _ = saved
    other = {"config": {"lr": 0.02, "betas": (0.9, 0.95)}, "data": "abd"}
    message = "belongs to a run with other config.lr, data: start with the same settings to resume it, or with another --out"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        StateStore(store.folder, other).resume(model, optimizers)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def edit(change):
    def apply(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return apply


def first(manifest):
    return manifest["tensors"]["model.norm.weight"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: flip(p / "rank-00000.safetensors"), r"rank-00000\.safetensors was altered \(its sha256 .*\): delete .*step-0"),
        (lambda p: cut(p / "rank-00000.safetensors"), r"rank-00000\.safetensors was altered"),
        (lambda p: (p / "rank-00000.safetensors").unlink(), r"rank-00000\.safetensors is missing: delete"),
        (lambda p: cut(p / "manifest.json"), r"manifest\.json is not JSON"),
        (
            lambda p: (p / "manifest.json").write_text('{"step": 2}'),
            r"manifest\.json lacks extra, files, format, history, identity",
        ),
        (lambda p: (p / "manifest.json").write_text("[]"), r"manifest\.json lacks extra, files"),
        (
            edit(lambda m: m.update(format=2)),
            r"has format 2 and this version of athanor reads format 1: use the version that wrote",
        ),
        (
            edit(lambda m: first(m).update(dtype="manual_seed")),
            r"does not say where tensors lie \(ValueError\(\"dtype 'manual_seed'",
        ),
        (edit(lambda m: first(m)["pieces"][0].update(file="../x")), r"file '../x'\"\)\): it was altered; delete"),
        (edit(lambda m: first(m)["pieces"][0].update(at=[0, 0])), r"a piece of 2 dimensions of a tensor of 1"),
        (edit(lambda m: first(m)["pieces"][0].update(at=[-1])), r"sizes \[-1\]"),
        (
            edit(lambda m: first(m)["pieces"][0].update(size=[31])),
            r"not whole \(model.norm.weight: 1 of 32 elements are in no piece",
        ),
        (edit(lambda m: first(m).update(pieces=first(m)["pieces"] * 2)), r"pieces at \(0,\) of size \(32,\) and .* overlap"),
        (edit(lambda m: first(m)["pieces"][0].update(key="model.head.weight")), r"model.head.weight is not of shape \(32,\)"),
        (edit(lambda m: first(m)["pieces"][0].update(key="gone")), r"rank-00000\.safetensors cannot be read \(.*gone"),
        (
            edit(lambda m: first(m).update(dtype="bfloat16")),
            r"of another dtype: model.norm.weight is torch.bfloat16 and must be tor",
        ),
    ],
)
def test_an_altered_checkpoint_is_refused(saved, damage, message):
    store, model, optimizers, _ = saved
    damage(store.folder / "step-00000002")
    with pytest.raises(CheckpointError, match=message):
        store.resume(model, optimizers)


def test_another_model_is_refused_naming_its_tensors_and_nothing_is_changed(saved, tiny):
    store, *_ = saved
    narrow = tiny(d_ff=48)
    with pytest.raises(CheckpointError, match=r"misshaped: model.blocks.0.feed_forward.*\(128, 32\) and must be \(96, 32\)"):
        store.resume(narrow, build(narrow, OptimConfig()))
    short = tiny(n_layers=1)
    before = {name: value.clone() for name, value in short.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"unexpected: model.blocks.1.*and \d+ more, optimizer|unexpected: .*blocks\.1"):
        store.resume(short, build(short, OptimConfig()))
    assert all(torch.equal(value, before[name]) for name, value in short.state_dict().items())
    deep = tiny(n_layers=3)
    with pytest.raises(CheckpointError, match=r"missing: model.blocks.2.*Use the settings that it was saved with"):
        store.resume(deep, build(deep, OptimConfig()))
    half = tiny().to(torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"of another dtype: .* is torch.float32 and must be torch.bfloat16"):
        store.resume(half, build(half, OptimConfig()))
    with pytest.raises(CheckpointError, match=r"missing: ema.x"):
        store.resume(model := tiny(), build(model, OptimConfig()), extra_tensors={"ema.x": torch.zeros(2)})


def test_a_parameter_without_a_name_is_refused(saved):
    store, model, *_ = saved
    stray = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2, 3))], lr=0.1)
    with pytest.raises(CheckpointError, match=r"SGD trains a parameter of shape \(2, 3\) that the model lacks"):
        store.save(Progress(3), model, [stray])


def test_states_that_no_file_can_hold_are_refused(saved, monkeypatch):
    store, model, optimizers, _ = saved
    optimizers[1].state[model.head.weight]["note"] = "text"
    with pytest.raises(CheckpointError, match=r"optimizer\.head\.weight\.note is a str: optimisers may keep tensors and numbers"):
        store.save(Progress(3), model, optimizers)
    monkeypatch.setattr(type(model), "get_extra_state", lambda self: {"a": 1})
    with pytest.raises(CheckpointError, match=r"the model's state '_extra_state' is a dict: checkpoints hold tensors only"):
        store.save(Progress(3), model, [])


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_are_kept(saved, keep):
    store, model, optimizers, _ = saved
    store.keep = keep
    for step in (3, 10, 100_000_000):
        store.save(Progress(step), model, optimizers)
    assert store.steps() == [3, 10, 100_000_000][-keep:]
    assert len(list(store.folder.iterdir())) == keep
    assert store.resume(model, optimizers).step == 100_000_000


@pytest.mark.parametrize(("direction", "best", "improved"), [("min", 4, [2, 4]), ("max", 2, [2])])
def test_the_best_is_kept_besides(tiny, tmp_path, direction, best, improved):
    model = tiny()
    store = StateStore(tmp_path, {}, keep=2, best=("heldout", direction))
    progress = Progress()
    found = []
    for step, value in enumerate([None, 3.0, None, 1.0, 1.0, float("nan"), 2.0, None, None], 1):
        progress.step = step
        record = {"step": step, "loss": 1.0}
        progress.history.append(record if value is None or value != value else record | {"heldout": value})
        found += [step] if store.improved(progress) else []
        store.save(progress, model, [])
    assert store.steps() == [best, 8, 9]
    assert found == improved
    assert not StateStore(tmp_path, {}).improved(progress)


def test_figures_that_are_not_finite_are_named(saved):
    store, model, optimizers, _ = saved
    store.save(Progress(3, [{"step": 3, "loss": float("nan"), "norm": 1.0}]), model, optimizers)
    with pytest.raises(CheckpointError, match="JSON has no word for it: loss is nan in the record of step 3; keep it as text"):
        store.wait()
    assert store.steps() == [2]


def test_what_a_killed_writer_left_is_not_resumed_and_not_kept(saved):
    store, model, optimizers, progress = saved
    half_written = store.folder / ".tmp-0123abcd-step-00000003"
    half_deleted = store.folder / "step-00000001"
    for folder in (half_written, half_deleted):
        folder.mkdir()
        (folder / "rank-00000.safetensors").write_bytes(b"half")
    assert store.steps() == [2]
    assert store.resume(model, optimizers) == progress
    assert [p.name for p in store.folder.iterdir()] == ["step-00000002"]


def test_a_checkpoint_that_was_being_replaced_is_put_back(saved):
    store, model, optimizers, progress = saved
    (store.folder / "step-00000002").rename(store.folder / ".old-0123abcd-step-00000002")
    assert store.resume(model, optimizers) == progress


def test_a_checkpoint_of_the_version_before_is_not_thrown_away(saved):
    store, model, optimizers, _ = saved
    old = store.folder / "step-00000009"
    old.mkdir()
    (old / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step-00000009 is of an earlier version of athanor: finish it with that"):
        store.resume(model, optimizers)
    assert old.is_dir()


@pytest.mark.parametrize("call", ["save", "resume", "steps", "history", "wait", "close", "clear"])
def test_an_error_of_the_thread_is_raised_by_the_next_call_and_the_old_one_is_whole(saved, monkeypatch, call):
    store, model, optimizers, progress = saved

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io, "place_dir", full)
    store.save(Progress(7), model, optimizers)
    arguments = {"save": (Progress(8), model, optimizers), "resume": (model, optimizers)}.get(call, ())
    with pytest.raises(CheckpointError, match=r"step 7 was not written to .*No space left.*; earlier ones are whole") as caught:
        getattr(store, call)(*arguments)
    assert isinstance(caught.value.__cause__, OSError)
    monkeypatch.undo()
    assert [p.name for p in store.folder.iterdir()] == ["step-00000002"]
    assert store.resume(model, optimizers) == progress  # said once


def test_the_same_step_may_be_saved_again(saved):
    store, model, optimizers, _ = saved
    store.save(Progress(2, seconds=9.0), model, optimizers)
    assert store.resume(model, optimizers).seconds == 9.0
    assert [p.name for p in store.folder.iterdir()] == ["step-00000002"]


def test_history_is_that_of_the_newest(saved, tmp_path):
    store, _, _, progress = saved
    assert store.history() == progress.history and len(progress.history) == 2
    assert StateStore(tmp_path / "none", {}).history() == []


def test_clear_removes_all(saved):
    store, model, optimizers, _ = saved
    store.clear()
    assert not store.folder.exists()
    assert store.resume(model, optimizers) == Progress()
