"""The config of a Qwen 3: its defaults, what it refuses, and its presets."""

import re

import pytest
from transformers import Qwen3Config

from athanor.core.errors import CheckpointError, ConfigError
from athanor.models import io
from athanor.models.decoder import FULL, SLIDING
from athanor.models.qwen3 import PRESETS, Config

FIELDS = Config(100, 64, 4, 4, 2, 96, head_dim=32).to_hf()


def test_fields_that_an_old_file_lacks_have_the_values_of_transformers():
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    fields = {k: FIELDS[k] for k in needed}
    config = Config.from_hf(fields)
    assert config == Config.from_hf(Qwen3Config(**fields).to_dict())
    assert config.head_dim == 128


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [({"max_window_layers": 3}, (FULL, FULL, FULL, SLIDING)), ({"layer_types": [SLIDING, FULL] * 2}, (SLIDING, FULL) * 2)],
)
def test_windows_are_read_as_transformers_reads_them(fields, kinds):
    base = {k: v for k, v in FIELDS.items() if k != "layer_types"} | {"use_sliding_window": True, "sliding_window": 8}
    config = Config.from_hf(base | fields)
    assert (config.window, config.layer_types) == (8, kinds)
    assert Config.from_hf(Qwen3Config(**base | fields).to_dict()) == Config.from_hf(config.to_hf()) == config


def test_layers_that_slide_need_a_window():
    fields = FIELDS | {"use_sliding_window": True, "sliding_window": None, "layer_types": [SLIDING, FULL] * 2}
    with pytest.raises(ConfigError, match="layer_types has 'sliding_attention' and window is None"):
        Config.from_hf(fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "config.json: hidden_act is 'gelu', which is not supported for qwen3 (only 'silu' is)"),
        ({"attention_bias": "no"}, "config.json: attention_bias is 'no' and must be true or false: copy it again"),
    ],
)
def test_fields_that_are_not_computed_are_refused_by_name(fields, message):
    with pytest.raises(CheckpointError, match="^" + re.escape(message)):
        Config.from_hf(FIELDS | fields)


@pytest.mark.parametrize(
    ("name", "size"), [("qwen3-0.6b", 596_049_920), ("qwen3-1.7b", 1_720_574_976), ("qwen3-8b", 8_190_735_360)]
)
def test_published_presets_have_the_size_of_their_files(name, size):
    assert io.build("qwen3", PRESETS[name]).n_parameters() == size
