"""The laws of the loop hold, and are broken by the faults that they are there for."""

import pytest
import torch

from athanor.objectives import next_token
from athanor.train import laws
from athanor.train.state import StateStore


@pytest.fixture
def batches(ragged):
    return [ragged(9, 2, seed=1), ragged(30, seed=2), ragged(4, 4, 5, seed=3)]


@pytest.fixture
def model(tiny):
    return tiny()


def test_both_hold_and_leave_the_model_as_it_is(model, tiny, batches, tmp_path):
    model.requires_grad_(False)
    findings = [laws.accumulated_is_whole(model, batches), laws.resumed_is_uninterrupted(model, batches, tmp_path)]
    assert [f.passed for f in findings] == [True, True]
    assert [f.law for f in findings] == ["L3", "L4"]
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), tiny().parameters(), strict=True))


def test_a_mean_of_means_is_seen(model, batches, monkeypatch):
    true_loss = next_token.loss

    def mean(model, batch):
        total, count, metrics = true_loss(model, batch)
        return total / count, 1, metrics

    monkeypatch.setattr(next_token, "loss", mean)
    finding = laws.accumulated_is_whole(model, batches)
    assert not finding.passed and finding.value > 0.01


def test_optimisers_that_forget_are_seen(model, batches, tmp_path, monkeypatch):
    true_resume = StateStore.resume
    monkeypatch.setattr(StateStore, "resume", lambda self, model, optimizers, **more: true_resume(self, model, [], **more))
    finding = laws.resumed_is_uninterrupted(model, batches, tmp_path)
    assert not finding.passed and finding.value > 5


def test_one_bit_of_one_weight_is_seen(model, batches, tmp_path, monkeypatch):
    true_resume = StateStore.resume

    def almost(self, model, optimizers, **more):
        progress = true_resume(self, model, optimizers, **more)
        with torch.no_grad():
            if progress.step:
                weight = next(model.parameters())
                weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
        return progress

    monkeypatch.setattr(StateStore, "resume", almost)
    assert not laws.resumed_is_uninterrupted(model, batches, tmp_path).passed


def test_processes_that_learn_otherwise_are_seen_and_refused_layouts_skipped(tiny, ragged, tmp_path, monkeypatch):
    """The fault is in this process: what others start does not know of it."""
    true_loss = next_token.loss

    def less(model, batch):
        total, count, metrics = true_loss(model, batch)
        return total, count + 1, metrics

    monkeypatch.setattr(next_token, "loss", less)
    monkeypatch.setattr(laws, "LAYOUTS", ("tp=2", "ddp=2", "fsdp=2"))
    shape = {"n_heads": 3, "n_kv_heads": 3, "d_model": 24}
    model = tiny(**shape)
    skipped, *broken = laws.parallel_is_single(model, ragged(9, 4, 12, seed=1), tmp_path)
    assert skipped.skipped == "tp (2) must divide n_heads (3) and n_kv_heads (3)" and skipped.value is None
    assert all(not f.passed and 1e-4 < f.value < 1 and f.law == "L5" for f in broken)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), tiny(**shape).parameters(), strict=True))


def test_a_layout_whose_processes_stop_is_broken_and_says_why(model, ragged, tmp_path, monkeypatch):
    monkeypatch.setattr(laws, "LAYOUTS", ("ddp=2", "fsdp=2"))
    findings = laws.parallel_is_single(model, ragged(9), tmp_path)
    assert [f.value for f in findings] == [torch.inf] * 2 and not any(f.passed for f in findings)
    assert "has 1 sequences with a target and must have one for each of the 2 ranks" in findings[0].compared
    assert findings[1].compared.endswith("not reached")
