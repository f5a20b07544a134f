"""Weights alone: out of any checkpoint, or of a model's folder; nothing else comes along, and what does not fit is named."""

import pytest
import torch

from athanor.core.errors import CheckpointError
from athanor.models import io as models
from athanor.models import qwen2
from athanor.train.state import Progress, StateStore
from athanor.train.weights import continue_from, whole_state


@pytest.fixture
def saved(tiny, run, tmp_path):
    """The folder of a store with two checkpoints, and the model of the newer one."""
    model = tiny()
    progress, optimizers = run(model, steps=2)
    store = StateStore(tmp_path / "state", {"lr": 1}, keep=2)
    store.save(Progress(1), tiny(seed=9), [])
    store.save(progress, model, optimizers, extra_tensors={"ema.head.weight": torch.ones(320, 32)})
    store.close()
    return store.folder, model


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_whole_model_comes_out_of_a_checkpoint(saved, tiny):
    folder, model = saved
    assert same(whole_state(folder), model.state_dict())
    assert same(whole_state(folder / "step-00000001"), tiny(seed=9).state_dict())
    assert whole_state(folder, "ema.")["head.weight"].eq(1).all()
    tiny(seed=4).load_state_dict(whole_state(folder))


def test_a_new_run_begins_with_the_weights_and_nothing_else(saved, tiny):
    folder, model = saved
    fresh = tiny(seed=3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    continue_from(folder, fresh)
    assert same(fresh.state_dict(), model.state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    half = tiny(seed=3).to(torch.bfloat16)
    continue_from(folder, half)
    assert same(half.state_dict(), {name: value.bfloat16() for name, value in model.state_dict().items()})


def test_a_new_run_begins_with_a_models_folder(tiny, tmp_path):
    model = tiny()
    models.save(model, tmp_path / "model")
    fresh = tiny(seed=3)
    continue_from(tmp_path / "model", fresh)
    assert same(fresh.state_dict(), model.state_dict())


def test_what_does_not_fit_is_named_and_nothing_is_changed(saved, tiny, tmp_path):
    folder, model = saved
    models.save(model, tmp_path / "model")
    cases = [
        ({"n_layers": 3}, r"missing: model.blocks.2"),
        ({"n_layers": 1}, r"unexpected: model.blocks.1"),
        ({"d_ff": 48}, r"misshaped: model.blocks.0.feed_forward.gate_up.weight is \(128, 32\) and must be \(96, 32\)"),
    ]
    for fields, message in cases:
        for source in (folder, tmp_path / "model"):
            other = tiny(seed=3, **fields)
            with pytest.raises(CheckpointError, match=rf"does not fit the model: {message}.*Use (the|its own) config"):
                continue_from(source, other)
            assert same(other.state_dict(), tiny(seed=3, **fields).state_dict())


def test_another_architecture_is_refused(tiny, tmp_path):
    models.save(tiny(), tmp_path)
    other = qwen2.Model(qwen2.PRESETS["tiny"])
    with pytest.raises(CheckpointError, match=r"does not fit the model: it is a llama and must be a qwen2"):
        continue_from(tmp_path, other)


def test_what_is_no_checkpoint_or_damaged_is_refused(saved, tiny, tmp_path):
    folder, model = saved
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty has no checkpoint \(manifest.json\) and no model \(config.json\): give"):
        continue_from(tmp_path / "empty", model)
    with pytest.raises(CheckpointError, match=r"has no tensors 'emma.': it has ema., model., optimizer., rng."):
        whole_state(folder, "emma.")
    path = folder / "step-00000002" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors was altered .*: copy .*step-00000002 again, or take"):
        whole_state(folder)
