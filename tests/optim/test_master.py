"""Weights of 16 bits: stalled without float32 copies, trained with them, and resumed with these."""

import copy

import pytest
import torch
from torch import nn

from athanor.optim.build import OptimConfig, build
from athanor.optim.master import Masters
from athanor.optim.muon import Muon

ADAMW = OptimConfig("adamw")


def layers(dtype=torch.bfloat16):
    """Two matrices and their biases."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)


def step(model, optimizers, seed=0):
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).abs().to(p.dtype)
    for optimizer in optimizers:
        optimizer.step()


def test_tiny_rates_stall_without_masters_and_not_with_them():
    plain, ours, wide = layers(), layers(), layers().float()
    start = [p.detach().clone() for p in plain.parameters()]
    stalled = [torch.optim.AdamW(plain.parameters(), lr=1e-6, weight_decay=0.0)]
    config = OptimConfig("adamw", lr=1e-6, weight_decay=0.0)
    kept, exact = build(ours, config), build(wide, config)
    for i in range(2000):
        for model, optimizers in ((plain, stalled), (ours, kept), (wide, exact)):
            step(model, optimizers, i % 5)
    big = [s.abs() > 0.05 for s in start]
    assert all(torch.equal(p[b], s[b]) for p, s, b in zip(plain.parameters(), start, big, strict=True))
    for p, w, s, b in zip(ours.parameters(), wide.parameters(), start, big, strict=True):
        assert (p[b] != s[b]).all()
        # As float32 training ends, rounded; gradients were the same.
        assert torch.equal(p, w.to(p.dtype))


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd", "adafactor"])
def test_masters_are_in_the_state_and_weights_are_their_rounding(name):
    model = layers()
    optimizers = build(model, OptimConfig(name, lr=1e-3))
    assert all(isinstance(o, Masters) for o in optimizers)
    assert {type(o.inner) for o in optimizers} >= ({Muon} if name == "muon" else set())
    step(model, optimizers)
    for optimizer in optimizers:
        packed = optimizer.state_dict()["state"]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        assert packed.keys() == set(range(len(params)))
        for i, p in enumerate(params):
            assert packed[i]["master"].dtype == torch.float32
            assert torch.equal(p, packed[i]["master"].to(p.dtype))
            assert all(v.dtype == torch.float32 for v in packed[i].values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("by", ["load_state_dict", "state"])
@pytest.mark.parametrize("name", ["adamw", "muon", "sgd", "adafactor"])
def test_resumed_is_uninterrupted(name, by):
    config = OptimConfig(name, lr=1e-3)
    first, second = layers(), layers()
    ours, others = build(first, config), build(second, config)
    for i in range(3):
        step(first, ours, i)
    second.load_state_dict(first.state_dict())
    for a, b in zip(ours, others, strict=True):
        if by == "load_state_dict":
            b.load_state_dict(copy.deepcopy(a.state_dict()))
        else:  # as a checkpoint is read: into the state of each parameter
            b.state.clear()
            pairs = zip(a.param_groups, b.param_groups, strict=True)
            for p, q in [pair for g, h in pairs for pair in zip(g["params"], h["params"], strict=True)]:
                b.state[q] = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in a.state[p].items()}
    for i in range(3, 6):
        step(first, ours, i)
        step(second, others, i)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    for a, b in zip(ours, others, strict=True):
        for i, values in a.state_dict()["state"].items():
            assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(b.state_dict()["state"][i][k])) for k, v in values.items())


def test_rates_reach_the_masters_and_a_parameter_without_a_gradient_stays():
    model = layers()
    (optimizer,) = build(model, OptimConfig("sgd", lr=0.5, momentum=0.0, weight_decay=0.0))
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(model, [optimizer])
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"]
    model[0].weight.grad = torch.ones_like(model[0].weight)
    assert optimizer.step(lambda: 2.0) == 2.0
    assert torch.equal(model[0].weight, (before[0].float() - 0.5).bfloat16())
    assert all(torch.equal(p, b) for p, b in list(zip(model.parameters(), before, strict=True))[1:])


def test_weights_of_32_bits_have_none():
    assert not any(isinstance(o, Masters) for o in build(layers(torch.float32), OptimConfig()))
    mixed = layers()
    mixed[0].float()
    dtypes = {isinstance(o, Masters): {p.dtype for g in o.param_groups for p in g["params"]} for o in build(mixed, ADAMW)}
    assert dtypes == {True: {torch.bfloat16}, False: {torch.float32}}
