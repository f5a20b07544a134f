"""The config of a Mistral: its window in fields, what it refuses, and its presets."""

import re

import pytest
from transformers import MistralConfig

from athanor.core.errors import CheckpointError, ConfigError
from athanor.models import io
from athanor.models.mistral import PRESETS, Config

FIELDS = Config(100, 64, 4, 4, 2, 96, window=8).to_hf()


@pytest.mark.parametrize(("fields", "window"), [({"sliding_window": 8}, 8), ({"sliding_window": None}, None), ({}, 4096)])
def test_null_is_no_window_and_an_absent_field_is_that_of_transformers(fields, window):
    base = {k: v for k, v in FIELDS.items() if k != "sliding_window"}
    config = Config.from_hf(base | fields)
    assert config.window == window
    assert Config.from_hf(MistralConfig(**base | fields).to_dict()) == Config.from_hf(config.to_hf()) == config


def test_fields_that_an_old_file_lacks_have_the_values_of_transformers():
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    fields = {k: FIELDS[k] for k in needed}
    assert Config.from_hf(fields) == Config.from_hf(MistralConfig(**fields).to_dict())


def test_a_window_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=re.escape("window (0) must be at least 1, or None for attention to all of the past")):
        Config(100, window=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "config.json: hidden_act is 'gelu', which is not supported for mistral (only 'silu' is)"),
        (
            {"layer_types": ["full_attention"]},
            "config.json: layer_types is ['full_attention'], which is not supported for mistral (only None is)",
        ),
        ({"sliding_window": "8"}, "config.json: sliding_window is '8' and must be a whole number: copy it again"),
    ],
)
def test_fields_that_are_not_computed_are_refused_by_name(fields, message):
    with pytest.raises(CheckpointError, match="^" + re.escape(message)):
        Config.from_hf(FIELDS | fields)


@pytest.mark.parametrize(
    ("name", "size"),
    [("mistral-7b-v0.1", 7_241_732_096), ("mistral-7b-v0.3", 7_248_023_552), ("mistral-nemo-12b", 12_247_782_400)],
)
def test_published_presets_have_the_size_of_their_files(name, size):
    assert io.build("mistral", PRESETS[name]).n_parameters() == size
