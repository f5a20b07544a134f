"""Of every architecture: what decays, what Muon takes, and how deep each parameter lies."""

import re

import pytest
import torch
from torch import nn

from athanor.core import plugins
from athanor.core.errors import ConfigError
from athanor.models import heads, io
from athanor.nn.norms import RMSNorm
from athanor.optim.build import OptimConfig, build
from athanor.optim.groups import heights, kinds
from athanor.optim.muon import Muon

CASES = [
    (name, preset)
    for name in plugins.names("models")
    for preset in plugins.load("models", name).PRESETS
    if preset.startswith("tiny")
]


def model_of(case):
    name, preset = case
    return io.build(name, plugins.load("models", name).PRESETS[preset], seed=0)


@pytest.mark.parametrize("optim", ["adamw", "muon", "sgd", "adafactor"])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_each_parameter_is_in_one_group_and_only_matrices_decay(case, optim):
    model = model_of(case)
    optimizers = build(model, OptimConfig(optim, weight_decay=0.1))
    found = [(id(p), type(o), g["weight_decay"]) for o in optimizers for g in o.param_groups for p in g["params"]]
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(i for i, _, _ in found) == sorted(trained)
    owners = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    for i, kind, decay in found:
        name, owner = trained[i], owners[i]
        assert decay in (0.0, 0.1)
        # Written otherwise than in groups.py: by types, and by what a tensor is in the model.
        looked_up = isinstance(owner, nn.Embedding) or type(owner).__name__ in ("RelativeBias", "CRF", "Sinusoids")
        makes_logits = (model.kind != "tagger" and owner_is_output(model, owner)) or name.startswith("emission")
        norm_or_bias = isinstance(owner, (RMSNorm, nn.LayerNorm)) or "bias" in name.rpartition(".")[2]
        plain = looked_up or makes_logits or norm_or_bias
        assert (decay == 0.0) == plain, name
        assert (kind is Muon) == (optim == "muon" and not plain), name


def owner_is_output(model, owner):
    return getattr(owner, "weight", None) is not None and owner.weight is model.output_weight


def test_a_head_on_a_trunk_is_an_output():
    model = heads.attach(model_of(("bert", "tiny")), "sequence", ("a", "b"), generator=torch.Generator())
    found = kinds(model)
    assert found["head.out.weight"] == "table"
    assert found["trunk.blocks.0.attention.out.weight"] == "matrix"
    assert found["trunk.embedding.weight"] == found["trunk.positions.weight"] == "table"
    assert heights(model)["trunk.blocks.1.attention.out.weight"] == 1
    assert heights(model)["head.out.weight"] == 0
    assert heights(model)["trunk.embedding_norm.weight"] == 3


def test_depths_of_a_decoder():
    found = heights(model_of(("deepseek_v3", "tiny-ahead")))
    assert found["embedding.weight"] == 3
    assert found["blocks.0.attention.out.weight"] == found["blocks.0.attention_norm.weight"] == 2
    assert found["blocks.1.feed_forward.experts.down.weight"] == 1
    assert found["norm.weight"] == found["head.weight"] == found["ahead.0.block.attention.out.weight"] == 0


def test_depths_of_two_stacks():
    found = heights(model_of(("t5", "tiny-gated")))  # 3 blocks and 2
    assert found["embedding.weight"] == found["encoder.relative.weight"] == 4
    assert found["decoder.relative.weight"] == 3
    assert [found[f"encoder.blocks.{i}.attention.out.weight"] for i in range(3)] == [3, 2, 1]
    assert [found[f"decoder.blocks.{i}.cross.out.weight"] for i in range(2)] == [2, 1]
    assert found["encoder.norm.weight"] == found["decoder.norm.weight"] == 0


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_architecture_has_depths(case):
    model = model_of(case)
    found = heights(model)
    assert found.keys() == kinds(model).keys()
    deepest = max(found.values())
    assert found["embedding.weight"] == deepest
    assert set(found.values()) >= set(range(1, deepest + 1))


def test_layer_decay_reaches_the_rates():
    model = model_of(("llama", "tiny-untied"))
    optimizers = build(model, OptimConfig("muon", lr=0.02, layer_decay=0.5))
    rates = {id(p): (g["lr"], g["base_lr"]) for o in optimizers for g in o.param_groups for p in g["params"]}
    height = heights(model)
    for name, p in model.named_parameters():
        assert rates[id(p)] == (0.02 * 0.5 ** height[name],) * 2, name
    assert {rate for rate, _ in rates.values()} == {0.02, 0.01, 0.005, 0.0025}


def test_a_model_without_blocks_has_no_depths():
    with pytest.raises(ConfigError, match=re.escape("has no blocks, so optim.layer_decay has nothing to go by: leave it at 1")):
        build(nn.Linear(2, 2), OptimConfig(layer_decay=0.9))


def test_nothing_to_train_is_refused():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match="the model has no trainable parameter, so there is nothing to build an optimiser for"):
        build(model, OptimConfig())
    assert isinstance(build(nn.Linear(2, 2), OptimConfig("sgd"))[0], torch.optim.SGD)
