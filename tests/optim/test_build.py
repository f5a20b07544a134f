"""From a model to its optimisers: every parameter has one, and AdamW is torch's."""

import copy
import re

import pytest
import torch

from athanor.core.errors import ConfigError
from athanor.optim.adafactor import Adafactor
from athanor.optim.build import OptimConfig, build
from athanor.optim.muon import Muon


def groups(optimizers):
    """(class, weight decay) of each parameter's only group, by the parameter's id."""
    found = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert id(p) not in found, "a parameter in two groups"
                found[id(p)] = (type(optimizer), group["weight_decay"])
    return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_is_in_exactly_one_group(tiny, name, tied):
    model = tiny(tied=tied)
    found = groups(build(model, OptimConfig(name=name, weight_decay=0.1)))
    assert found.keys() == {id(p) for p in model.parameters()}
    for key, p in model.named_parameters():
        hidden = p.ndim == 2 and not key.startswith(("embedding", "head"))
        expected = (Muon if name == "muon" else torch.optim.AdamW, 0.1) if hidden else (torch.optim.AdamW, 0.0)
        assert found[id(p)] == expected, key


def test_frozen_parameters_are_in_none(tiny):
    model = tiny()
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("norm.weight"))
    found = groups(build(model, OptimConfig()))
    assert found.keys() == {id(p) for p in model.parameters() if p.requires_grad}


def test_the_adamw_path_is_torchs(tiny):
    model = tiny()
    other = copy.deepcopy(model)
    config = OptimConfig("adamw", lr=0.01, weight_decay=0.1, beta1=0.8, beta2=0.9)
    (ours,) = build(model, config)
    plain = {name: name.startswith(("embedding", "head")) or "norm" in name for name, _ in other.named_parameters()}
    params = dict(other.named_parameters())
    theirs = torch.optim.AdamW(
        [
            {"params": [p for n, p in params.items() if plain[n]], "weight_decay": 0.0},
            {"params": [p for n, p in params.items() if not plain[n]], "weight_decay": 0.1},
        ],
        lr=0.01,
        betas=(0.8, 0.9),
    )
    for seed in range(3):
        for one in (model, other):
            generator = torch.Generator().manual_seed(seed)
            for p in one.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
        ours.step()
        theirs.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7, msg=name)


def test_base_rates_are_remembered_and_precision_reaches_muon(tiny):
    muon, adam = build(tiny(), OptimConfig(lr=0.02), bf16=True)
    assert muon.dtype == torch.bfloat16
    assert build(tiny(), OptimConfig())[0].dtype == torch.float32
    assert [g["base_lr"] for o in (muon, adam) for g in o.param_groups] == [0.02, 0.02]


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_sgd_path_is_its_formula(tiny, nesterov):
    model = tiny()
    plain = {name: name.startswith(("embedding", "head")) or "norm" in name for name, _ in model.named_parameters()}
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    momenta = {}
    (sgd,) = build(model, OptimConfig("sgd", lr=0.1, weight_decay=0.2, momentum=0.7, nesterov=nesterov))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            g = p.grad + (0.0 if plain[name] else 0.2) * expected[name]
            momenta[name] = 0.7 * momenta[name] + g if name in momenta else g
            expected[name] = expected[name] - 0.1 * (g + 0.7 * momenta[name] if nesterov else momenta[name])
        sgd.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("relative", [False, True])
def test_the_adafactor_path_takes_its_options(tiny, relative):
    (adafactor,) = build(tiny(), OptimConfig("adafactor", lr=0.02, relative=relative))
    assert isinstance(adafactor, Adafactor)
    assert {(g["lr"], g["base_lr"], g["relative"]) for g in adafactor.param_groups} == {(0.02, 0.02, relative)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adam"}, "optim.name ('adam') must be one of adamw, muon, sgd, adafactor; did you mean 'adamw'?"),
        ({"momentum": 1.0, "name": "sgd"}, "optim.momentum (1.0) must lie in [0, 1)"),
        ({"layer_decay": 0.0}, "optim.layer_decay (0.0) must lie in (0, 1]: 0.75 is usual for tuning, 1 is off"),
        ({"layer_decay": 1.5}, "optim.layer_decay (1.5) must lie in (0, 1]"),
        ({"momentum": 0.8}, "optim.momentum (0.8) is read by sgd only, and optim.name is 'muon': leave it at 0.9"),
        ({"nesterov": True}, "optim.nesterov (True) is read by sgd only, and optim.name is 'muon': leave it at False"),
        ({"relative": True}, "optim.relative (True) is read by adafactor only, and optim.name is 'muon': leave it at False"),
        ({"name": "sgd", "beta1": 0.8}, "optim.beta1 (0.8) is read by adamw and muon only, and optim.name is 'sgd'"),
        ({"name": "sgd", "momentum": 0.0, "nesterov": True}, "optim.nesterov needs momentum, and optim.momentum is 0: 0.9 is"),
        ({"lr": 0.0}, "optim.lr (0.0) must be positive"),
        ({"lr": float("nan")}, "optim.lr (nan) must be positive"),
        ({"weight_decay": -0.1}, "optim.weight_decay (-0.1) must not be negative"),
        ({"weight_decay": float("nan")}, "optim.weight_decay (nan) must not be negative"),
        ({"beta1": 1.0}, "optim.beta1 (1.0) must lie in [0, 1)"),
        ({"beta2": -0.1}, "optim.beta2 (-0.1) must lie in [0, 1)"),
    ],
)
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        OptimConfig(**fields)
