"""The config of a LLaMA: what it refuses, and what it reads of Hugging Face's fields."""

import re

import pytest

from athanor.core.errors import CheckpointError, ConfigError
from athanor.models.llama import Config

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
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(fields, message):
    with pytest.raises(CheckpointError, match=re.escape(f"config.json: {message}, which is not supported for llama (only")):
        Config.from_hf(FIELDS | fields)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_attention_heads", "intermediate_size"])
def test_a_missing_field_is_named(name):
    with pytest.raises(CheckpointError, match=f"config.json lacks '{name}', which a llama needs: copy it again"):
        Config.from_hf({k: v for k, v in FIELDS.items() if k != name})
