"""The config of a LLaMA: what it refuses, and what it reads of Hugging Face's fields."""

import re

import pytest
import torch

from athanor.core.errors import CheckpointError, ConfigError
from athanor.infer.rows import Rows
from athanor.models.llama import PRESETS, Config
from athanor.nn.rope import DynamicRope, LinearRope, Llama3Rope, YarnRope
from tests.models.reference import greatest, inputs, logits, ours_of, packed, random_ids, separate, theirs_of

FIELDS = Config(vocab_size=100, d_model=64, n_heads=4, n_kv_heads=2, rope_theta=250.0).to_hf()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 256, "n_heads": 6}, "n_heads (6) must divide d_model (256): use 4 or 8"),
        ({"d_model": 96, "n_heads": 5}, "n_heads (5) must divide d_model (96): use 4 or 6"),
        ({"d_model": 33}, "d_model (33) must be even for rotary positions: use 34"),
        ({"d_model": 18, "n_heads": 6}, "d_model / n_heads (18 / 6 = 3) must be even for rotary positions: use a d_model of 24"),
        ({"n_heads": 6, "n_kv_heads": 4}, "n_kv_heads (4) must divide n_heads (6): use one of 1, 2, 3, 6"),
        ({"vocab_size": 0}, "vocab_size (0) must be at least 1"),
        ({"n_layers": -1}, "n_layers (-1) must be at least 1"),
        ({"rope_theta": 0.0}, "rope_theta (0.0) must be positive: 10000 is usual"),
        ({"norm_eps": float("nan")}, "norm_eps (nan) must be positive: 1e-5 is usual"),
        ({"head_dim": 5}, "head_dim (5) must be even and positive for rotary positions: 64 is usual"),
        (
            {"rope_scaling": DynamicRope(2.0, 32), "max_positions": 99},
            "max_positions (99) must be factor times original_max_position_embeddings of dynamic scaling (2 x 32): use 64",
        ),
    ],
)
def test_a_shape_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        Config(**({"vocab_size": 100} | fields))


def test_every_remedy_is_one():
    Config(100, d_model=256, n_heads=4)
    Config(100, d_model=256, n_heads=8)
    Config(100, d_model=34, n_heads=1)
    Config(100, d_model=24, n_heads=6)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 250.0},  # before transformers 5
        {"rope_theta": 250.0, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 250.0, "rope_type": "default"}},
    ],
)
def test_old_and_new_rotary_fields_are_read(rope):
    fields = {k: v for k, v in FIELDS.items() if not k.startswith("rope")}
    assert Config.from_hf(fields | rope) == Config.from_hf(FIELDS)
    assert Config.from_hf(FIELDS).rope_theta == 250.0


@pytest.mark.parametrize("unknown", ["rope_theta", "rope_parameters"])
def test_readers_of_the_old_field_and_of_the_new_one_read_the_same(unknown):
    assert Config.from_hf({k: v for k, v in FIELDS.items() if k != unknown}) == Config.from_hf(FIELDS)


def test_fields_that_an_old_file_lacks_have_the_values_of_transformers():
    from transformers import LlamaConfig

    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    fields = {k: FIELDS[k] for k in needed}
    theirs = LlamaConfig(**fields)
    assert Config.from_hf(fields) == Config.from_hf(theirs.to_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(fields, message):
    with pytest.raises(CheckpointError, match=re.escape(f"config.json: {message}, which is not supported for llama (only")):
        Config.from_hf(FIELDS | fields)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_attention_heads", "intermediate_size"])
def test_a_missing_field_is_named(name):
    with pytest.raises(CheckpointError, match=f"config.json lacks '{name}', which a llama needs: copy it again"):
        Config.from_hf({k: v for k, v in FIELDS.items() if k != name})


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4}}, LinearRope(4.0)),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, DynamicRope(2.0, 1024)),
        (
            {"rope_scaling": {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}},
            YarnRope(4.0, 256),
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, YarnRope(4.0, 1024)),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 128}, YarnRope(4.0, 128)),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}},
            Llama3Rope(8.0, 1.0, 4.0, 1024),
        ),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1.0}}, LinearRope(2.0)),
    ],
)
def test_old_and_new_fields_of_scalings_are_read_as_transformers_reads_them(fields, scaling):
    from transformers import LlamaConfig

    plain = {k: v for k, v in FIELDS.items() if not k.startswith("rope")} | {"rope_theta": 250.0}
    config = Config.from_hf(plain | fields)
    assert config.rope_scaling == scaling
    assert config.rope_theta == 250.0
    theirs = LlamaConfig(**plain | {k: dict(v) if isinstance(v, dict) else v for k, v in fields.items()})
    assert Config.from_hf(theirs.to_dict()) == config
    assert Config.from_hf(config.to_hf()) == config
    assert config.max_positions == (2048 if isinstance(scaling, DynamicRope) else 1024)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "su", "factor": 2.0}, "rope_type ('su') must be one of default, linear, dynamic, yarn, llama3, longrope"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor (0.5) is no field of default rotary"),
        ({"rope_type": "linear", "factor": 0}, "factor (0) of linear scaling must be a number from 1 on"),
        (
            {"rope_type": "yarn", "factor": 4.0, "truncate": None},
            "truncate (None) of yarn scaling must be true or false: true is",
        ),
    ],
)
def test_a_scaling_that_is_not_computed_is_refused(rope, message):
    with pytest.raises(CheckpointError, match="^" + re.escape(f"config.json: rope_parameters: {message}")):
        Config.from_hf(FIELDS | {"rope_parameters": rope})


def test_published_presets_have_the_shapes_of_their_files():
    sizes = {"llama-1.1b": 1_100_048_384, "llama-2-7b": 6_738_415_616, "llama-3-8b": 8_030_261_248, "llama-3.1-8b": 8_030_261_248}
    for name, size in sizes.items():
        assert n_parameters(PRESETS[name]) == size, name


def n_parameters(config):
    from athanor.models import io

    return io.build(config.to_hf()["model_type"], config).n_parameters()


def test_beyond_the_original_context_dynamic_scaling_is_that_of_transformers(tmp_path):
    config = PRESETS["tiny-dynamic"]
    theirs = theirs_of(config)
    ours = ours_of(theirs, tmp_path)
    for time in (96, 97, 150):
        given = inputs(config, "decoder", rows=2, time=time)
        with torch.no_grad():
            assert greatest(logits(ours, given), theirs(**given).logits) <= 1e-5
    sources = [random_ids(config, n, seed=n) for n in (120, 20, 97, 150)]
    with torch.no_grad():
        assert greatest(packed(ours, sources), separate(ours, sources)) <= 1e-5
    runner = Rows(ours)
    runner.prefill([random_ids(config, 95).tolist()], 0)
    runner.decode([5], [95])
    with pytest.raises(ConfigError, match=re.escape("position 96 is beyond original_max_position_embeddings (96)")):
        runner.decode([5], [96])
