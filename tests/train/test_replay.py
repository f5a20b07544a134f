"""A step that failed, done again from its files: the same batches, the same random state, the same numbers."""

import json

import pytest
import torch

from athanor.core import dist
from athanor.core.device import rng_state
from athanor.core.errors import CheckpointError
from athanor.objectives import next_token
from athanor.train.replay import keep, kept, replay
from athanor.types import Source


def noisy(model, batch):
    """An objective with dropout of labels' losses: it depends on the random state."""
    loss, count, metrics = next_token.loss(model, batch)
    return loss * (1 + torch.rand(())), count, metrics


def test_a_kept_step_gives_the_same_numbers_again(tiny, ragged, tmp_path):
    model, micro = tiny().train(), [ragged(5, 9, 3, seed=1), ragged(11, 2, seed=2)]
    torch.manual_seed(7)
    rng = rng_state()
    expected = []
    for batch in micro:
        model.zero_grad()
        loss, count, _ = noisy(model, batch)
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        expected.append((batch.origin, loss.item() / count, count, norm.item() / count))
    path = keep(tmp_path / "state", 12, micro, rng, "the loss is inf")
    assert path == tmp_path / "state" / "bad-step-12.json"
    torch.manual_seed(8)
    model.eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    for _ in range(2):
        found = [(r.origin, r.loss, r.count, r.grad_norm) for r in replay(path, model, noisy)]
        assert [f[:3] for f in found] == [e[:3] for e in expected]
        assert [f[3] for f in found] == pytest.approx([e[3] for e in expected], rel=1e-5)
    assert not model.training and all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_everything_of_a_batch_is_kept(ragged, tmp_path):
    batch = ragged(4, 2)
    batch.extras = {"advantages": torch.tensor([0.5, -1.0]), "same": batch.ids}
    batch.source = Source(torch.tensor([1, 2, 3]), torch.tensor([1, 2]))
    path = keep(tmp_path, 3, [batch, ragged(3, seed=4)], rng_state(), "why")
    assert json.loads(path.read_text()) == {
        "step": 3,
        "why": "why",
        "batches": [{"origin": "ragged 0", "tokens": 9, "sequences": 2}, {"origin": "ragged 4", "tokens": 3, "sequences": 1}],
    }
    (found, other), rng = kept(path)
    for name in ("ids", "labels", "lengths"):
        assert torch.equal(getattr(found, name), getattr(batch, name))
    assert found.extras.keys() == batch.extras.keys() and all(torch.equal(found.extras[k], v) for k, v in batch.extras.items())
    assert torch.equal(found.source.ids, batch.source.ids) and torch.equal(found.source.lengths, batch.source.lengths)
    assert other.source is None and other.origin == "ragged 4" and other.extras == {}
    assert rng.keys() == rng_state().keys()


def test_bf16_is_replayed_in_bf16(tiny, ragged, tmp_path):
    path = keep(tmp_path, 1, [ragged(30, seed=1)], rng_state(), "")
    model = tiny()
    full, half = (replay(path, model, next_token.loss, precision)[0].loss for precision in ("fp32", "bf16"))
    assert full != half and full == pytest.approx(half, rel=0.02)


def test_damaged_files_are_refused(ragged, tmp_path):
    path = keep(tmp_path, 3, [ragged(4)], rng_state(), "")
    path.write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"bad-step-3.json is no kept step, or lacks 'batches': train again until it is met"
    ):
        kept(path)
    path.write_text('{"batches": [{"origin": ""}, {"origin": ""}]}')
    with pytest.raises(CheckpointError, match=r"or lacks 'ids'"):
        kept(path)
    path.with_suffix(".safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"bad-step-3.safetensors cannot be read"):
        kept(path)


def test_the_main_process_writes(ragged, tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "rank", lambda: 1)
    assert keep(tmp_path, 3, [ragged(4)], rng_state(), "") == tmp_path / "bad-step-3.json"
    assert not list(tmp_path.iterdir())
