"""The config of a Qwen 2: what it refuses, its windows in fields old and new, and its presets."""

import re

import pytest
from transformers import Qwen2Config

from athanor.core.errors import CheckpointError, ConfigError
from athanor.models import io
from athanor.models.decoder import FULL, SLIDING
from athanor.models.qwen2 import PRESETS, Config

FIELDS = Config(100, 64, 4, 4, 2, 96).to_hf()
OLD = {k: v for k, v in FIELDS.items() if k != "layer_types"}


@pytest.mark.parametrize(
    ("fields", "window", "kinds"),
    [
        ({}, None, (FULL,) * 4),
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, None, (FULL,) * 4),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, 8, (FULL, FULL, FULL, SLIDING)),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None, (FULL,) * 4),
        ({"use_sliding_window": True, "max_window_layers": 3}, 4096, (FULL, FULL, FULL, SLIDING)),
        ({"use_sliding_window": True, "sliding_window": 8}, 8, (FULL,) * 4),  # the 28th layer is the first that slides
        ({"use_sliding_window": True, "sliding_window": 8, "layer_types": [SLIDING, FULL] * 2}, 8, (SLIDING, FULL) * 2),
    ],
)
def test_windows_are_read_as_transformers_reads_them(fields, window, kinds):
    base = {k: v for k, v in OLD.items() if k not in ("use_sliding_window", "sliding_window", "max_window_layers")}
    config = Config.from_hf(base | fields)
    theirs = Qwen2Config(**base | fields)
    assert (config.window, config.layer_types) == (window, kinds) == (theirs.sliding_window, tuple(theirs.layer_types))
    assert Config.from_hf(theirs.to_dict()) == Config.from_hf(config.to_hf()) == config


def test_readers_from_before_layer_types_read_the_same():
    config = Config(100, 64, 4, 4, 2, 96, window=8, layer_types=(FULL, FULL, SLIDING, SLIDING))
    assert Config.from_hf({k: v for k, v in config.to_hf().items() if k != "layer_types"}) == config


def test_fields_that_an_old_file_lacks_have_the_values_of_transformers():
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    fields = {k: FIELDS[k] for k in needed}
    assert Config.from_hf(fields) == Config.from_hf(Qwen2Config(**fields).to_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "window (0) must be at least 1, or None for attention to all of the past"),
        (
            {"layer_types": (SLIDING,) * 4},
            "layer_types has 'sliding_attention' and window is None: say how many positions such a",
        ),
        ({"layer_types": (FULL,)}, "layer_types names 1 layers and n_layers is 4: name each layer"),
        (
            {"layer_types": ("global",) * 4},
            "layer_types has 'global' and may have 'full_attention' and 'sliding_attention': use one of these",
        ),
    ],
)
def test_windows_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        Config(100, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "config.json: hidden_act is 'gelu', which is not supported for qwen2 (only 'silu' is)"),
        ({"layer_types": "full_attention"}, "config.json: layer_types is 'full_attention' and must be a list: copy it again"),
        ({"use_sliding_window": 1}, "config.json: use_sliding_window is 1 and must be true or false: copy it again"),
    ],
)
def test_fields_that_are_not_computed_are_refused_by_name(fields, message):
    with pytest.raises(CheckpointError, match="^" + re.escape(message)):
        Config.from_hf(FIELDS | fields)


@pytest.mark.parametrize(
    ("name", "size"), [("qwen2.5-0.5b", 494_032_768), ("qwen2.5-1.5b", 1_543_714_304), ("qwen2.5-7b", 7_615_616_512)]
)
def test_published_presets_have_the_size_of_their_files(name, size):
    assert io.build("qwen2", PRESETS[name]).n_parameters() == size
