"""Averaged weights: the formula, the exchange, and going on from a state."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from athanor.core.errors import CheckpointError, ConfigError
from athanor.optim.ema import EMA


def walk(model, steps):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn(p.shape, generator=generator).to(p.dtype)
        yield {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_it_is_the_weighted_mean_of_all_weights_seen(decay):
    model = nn.Linear(3, 2)
    ema, seen = EMA(model, decay), []
    for weights in walk(model, 20):
        seen.append(weights)
        ema.update(model)
        factors = [decay ** (len(seen) - 1 - i) for i in range(len(seen))]
        for name, average in ema.averages.items():
            mean = sum(f * w[name].double() for f, w in zip(factors, seen, strict=True)) / sum(factors)
            torch.testing.assert_close(average.double(), mean, rtol=1e-5, atol=1e-5)


def test_it_is_torchs_with_these_shares():
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.9)
    theirs = AveragedModel(model, avg_fn=lambda a, w, n: a + (w - a) * (1 - 0.9) / (1 - 0.9 ** (n + 1)))
    for _ in walk(model, 10):
        ema.update(model)
        theirs.update_parameters(model)
    for name, p in theirs.module.named_parameters():
        torch.testing.assert_close(ema.averages[name], p.detach(), rtol=1e-5, atol=1e-6)


def test_swapped_and_back_whatever_happens():
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.9)
    for _ in walk(model, 4):
        ema.update(model)
    own = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), ema.swapped(model):
        assert torch.equal(model.weight, ema.averages["weight"])
        assert not torch.equal(model.weight, own["weight"])
        raise KeyError
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_weights_of_16_bits_are_averaged_in_32_and_frozen_ones_not():
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    model.bias.requires_grad_(False)
    ema = EMA(model, 0.999)
    for _ in walk(model, 3):
        ema.update(model)
    assert ema.averages.keys() == {"weight"}
    assert ema.averages["weight"].dtype == torch.float32
    with ema.swapped(model):
        assert model.weight.dtype == torch.bfloat16
        assert torch.equal(model.weight, ema.averages["weight"].bfloat16())


def test_resumed_is_uninterrupted():
    model = nn.Linear(3, 2)
    whole, first = EMA(model, 0.9), EMA(model, 0.9)
    for i, _ in enumerate(walk(model, 8)):
        whole.update(model)
        first.update(model)
        if i == 3:
            state = {name: value.clone() for name, value in first.state().items()}
            first = EMA(nn.Linear(3, 2), 0.9)
            first.load(state)
    assert first.state().keys() == {"weight", "bias", "updates"}
    assert all(torch.equal(value, first.state()[name]) for name, value in whole.state().items())


def test_what_does_not_fit_is_refused():
    ema = EMA(nn.Linear(3, 2))
    state = ema.state()
    message = (
        "these averaged weights are of another model: {} is missing, unknown or of another shape (1 such): start without them"
    )
    for wrong, name in (
        ({k: v for k, v in state.items() if k != "bias"}, "bias"),
        (state | {"more": torch.zeros(1)}, "more"),
        (state | {"weight": torch.zeros(2, 2)}, "weight"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(message.format(name))):
            ema.load(wrong)
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match=re.escape(f"the decay of averaged weights ({decay}) must lie in [0, 1): 0.999")):
            EMA(nn.Linear(3, 2), decay)
