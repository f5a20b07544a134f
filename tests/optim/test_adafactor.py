"""Adafactor beside transformers' (plain rates) and torch's (relative steps)."""

import copy

import pytest
import torch
from transformers.optimization import Adafactor as Theirs

from athanor.optim.adafactor import Adafactor

SHAPES = [(12, 8), (8, 12), (3, 6, 4), (16,), (1, 8), ()]


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def run(optimizer, params, steps=12):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** (step % 4 - 2)
        optimizer.step()


def test_plain_rates_are_those_of_transformers():
    ours, theirs = parameters(), parameters()
    run(Adafactor(ours, 0.01, weight_decay=0.1), ours)
    options = {"relative_step": False, "scale_parameter": False, "warmup_init": False}
    run(Theirs(theirs, lr=0.01, weight_decay=0.1, **options), theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lr", [0.01, 10.0])  # below 1/sqrt(step), and above
def test_relative_steps_are_those_of_torch(lr):
    ours, theirs = parameters(), parameters()
    run(Adafactor(ours, lr, relative=True, weight_decay=0.001), ours)
    run(torch.optim.Adafactor(theirs, lr=lr, weight_decay=0.001, eps=(1e-15, 1e-3)), theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_its_state_is_rows_and_columns():
    params = parameters()
    optimizer = Adafactor(params, 0.01)
    run(optimizer, params, 2)
    kept = {tuple(p.shape): {k: tuple(v.shape) for k, v in optimizer.state[p].items()} for p in params}
    assert kept[12, 8] == {"step": (), "row": (12, 1), "column": (1, 8)}
    assert kept[3, 6, 4] == {"step": (), "row": (3, 6, 1), "column": (3, 1, 4)}
    assert kept[16,] == {"step": (), "variance": (16,)}


def test_its_state_can_be_saved_and_loaded_and_no_gradient_is_no_update():
    a, b = parameters(), parameters()
    first, second = Adafactor(a, 0.1), Adafactor(b, 0.1)
    run(first, a, 3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        for p, q in zip(a, b, strict=True):
            q.copy_(p)
    run(first, a, 1)
    run(second, b, 1)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    before = a[0].detach().clone()
    a[0].grad = None
    assert first.step(lambda: 1.5) == 1.5
    assert torch.equal(a[0], before)
