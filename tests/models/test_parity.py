"""Every architecture against transformers: the same numbers from the same files, in both directions."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import athanor
from athanor.core import io as files
from athanor.core import plugins
from athanor.lm import LM
from athanor.models import io
from athanor.objectives import next_token
from athanor.types import Batch

SHAPE = {"vocab_size": 320, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48, "max_positions": 64}
VARIANTS = {
    "tied, grouped": {"tied": True, "n_kv_heads": 2},
    "untied, grouped": {"tied": False, "n_kv_heads": 1, "norm_eps": 1e-3, "rope_theta": 500.0},
    "tied, one key per query": {"tied": True, "n_kv_heads": 4},
    "untied, one key per query": {"tied": False, "n_kv_heads": 4},
}


def config_of(name, variant):
    """The architecture's config with those fields of the tiny shape that it has."""
    cls = plugins.require("models", name, "Config").Config
    known = {f.name for f in dataclasses.fields(cls)}
    return cls(**{k: v for k, v in (SHAPE | VARIANTS[variant]).items() if k in known})


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture(params=plugins.names("models"))
def config(request, variant):
    return config_of(request.param, variant)


@pytest.fixture
def theirs(config):
    """A tiny random model of transformers, biases and norms random too."""
    torch.manual_seed(0)
    fields = config.to_hf()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


@pytest.fixture
def ids():
    return torch.randint(0, SHAPE["vocab_size"], (3, 33), generator=torch.Generator().manual_seed(1))


def greatest(a, b):
    return float((a - b).abs().max())


def test_reading_their_folder_gives_their_logits(theirs, config, ids, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = io.load(tmp_path)
    assert ours.config == config
    assert ours.n_parameters() == theirs.num_parameters()
    with torch.no_grad():
        assert greatest(ours(ids), theirs(ids).logits) <= 1e-5


def test_loss_and_every_gradient_are_theirs(theirs, ids, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = io.load(tmp_path)
    expected = theirs(ids, labels=ids).loss
    expected.backward()
    rows, time = ids.shape
    labels = torch.cat((ids[:, 1:], torch.full((rows, 1), -100)), 1)
    total, count, _ = next_token.loss(ours, Batch(ids.flatten(), labels.flatten(), torch.full((rows,), time)))
    (total / count).backward()
    assert count == rows * (time - 1)
    assert total.item() / count == pytest.approx(expected.item(), rel=1e-5)
    grads = ours.to_hf({name: p.grad for name, p in ours.named_parameters()})
    named = {name: p.grad for name, p in theirs.named_parameters()}
    assert grads.keys() == named.keys()
    for name, grad in named.items():
        assert greatest(grads[name], grad) <= 1e-4 * float(grad.abs().max()), name


def test_they_read_our_folder_and_give_our_logits(config, tokenizer, ids, tmp_path):
    ours = io.build(config.to_hf()["model_type"], config, seed=3)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.1)
    LM(ours, tokenizer).save(tmp_path / "model")
    again = athanor.load(tmp_path / "model").model
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        logits = ours(ids)
        assert greatest(theirs(ids).logits, logits) <= 1e-5
        assert torch.equal(again(ids), logits)


def test_a_round_trip_keeps_names_and_bits(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    io.save(io.load(tmp_path / "theirs"), tmp_path / "ours")
    before, after = (load_file(tmp_path / side / io.WEIGHTS) for side in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name]), name
    fields, saved = (files.read_json(tmp_path / side / "config.json") for side in ("theirs", "ours"))
    shared = fields.keys() & saved.keys()
    assert {k: saved[k] for k in shared} == {k: fields[k] for k in shared}


def test_bfloat16_files_are_read_and_written_as_they_are(theirs, ids, tmp_path):
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    ours = io.load(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    io.save(ours, tmp_path / "ours")
    before, after = (load_file(tmp_path / side / io.WEIGHTS) for side in ("theirs", "ours"))
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16 for name in before)
    assert files.read_json(tmp_path / "ours" / "config.json")["dtype"] == "bfloat16"
    with torch.no_grad():
        exact = theirs.float()(ids).logits
        assert greatest(ours(ids).float(), exact) <= 0.05 * float(exact.abs().max())


@pytest.mark.parametrize("name", plugins.names("models"))
def test_initialise_is_a_function_of_the_seed_and_sets_every_weight(name):
    config = config_of(name, "untied, grouped")
    a, b, other = (io.build(name, config, seed=seed) for seed in (1, 1, 2))
    module = plugins.load("models", name)
    poisoned = module.Model(config)
    with torch.no_grad():
        for p in poisoned.parameters():
            p.fill_(torch.nan)
    poisoned.initialise(torch.Generator().manual_seed(1))
    for (key, p), q, r in zip(a.named_parameters(), b.parameters(), poisoned.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p, r), key
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", plugins.names("models"))
def test_loading_neither_draws_random_numbers_nor_leaves_anything_without_a_device(name, tmp_path):
    io.save(io.build(name, config_of(name, "tied, grouped"), seed=0), tmp_path)
    state = torch.get_rng_state()
    model = io.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert {x.device.type for x in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert not model.training
