"""The config of a Gemma: fields of both versions, old and new; what is refused; presets; embeddings in bfloat16."""

import re
from dataclasses import replace

import pytest
import torch
from transformers import Gemma2Config, Gemma3TextConfig

from athanor.core.errors import CheckpointError, ConfigError
from athanor.models import io
from athanor.models.decoder import FULL, SLIDING
from athanor.models.gemma import PRESETS, Config
from athanor.nn.rope import LinearRope
from tests.models.reference import greatest, inputs, logits, ours_of, theirs_of

NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
SHAPE = {"window": 8, "head_dim": 16, "rope_theta": 250.0}
TWO = Config(100, 64, 8, 4, 2, 96, **SHAPE).to_hf()
THREE = Config(100, 64, 8, 4, 2, 96, **SHAPE, version=3, local_theta=70.0).to_hf()


@pytest.mark.parametrize(("fields", "cls"), [(TWO, Gemma2Config), (THREE, Gemma3TextConfig)])
def test_fields_that_an_old_file_lacks_have_the_values_of_transformers(fields, cls):
    short = {k: fields[k] for k in (*NEEDED, "model_type")}
    config = Config.from_hf(short)
    assert config == Config.from_hf(cls(**short).to_dict())
    pattern = (SLIDING, FULL) * 4 if cls is Gemma2Config else (SLIDING,) * 5 + (FULL, SLIDING, SLIDING)
    assert (config.window, config.head_dim, config.query_scale, config.layer_types) == (4096, 256, 256, pattern)
    assert (config.attention_softcap, config.output_softcap) == ((50.0, 30.0) if cls is Gemma2Config else (None, None))


def test_null_is_no_cap():
    config = Config.from_hf(TWO | {"attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert (config.attention_softcap, config.output_softcap) == (None, None)
    capped = Config.from_hf(THREE | {"final_logit_softcapping": 7})
    assert capped.output_softcap == 7.0


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 250.0, "rope_local_base_freq": 70.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "rope_parameters": {
                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 250.0},
                SLIDING: {"rope_type": "default", "rope_theta": 70.0},
            }
        },
    ],
)
def test_old_and_new_rotary_fields_of_gemma_3_are_read_as_transformers_reads_them(rope):
    fields = {k: v for k, v in THREE.items() if not k.startswith("rope")} | rope
    config = Config.from_hf(fields)
    assert (config.rope_theta, config.local_theta, config.rope_scaling) == (250.0, 70.0, LinearRope(8.0))
    assert Config.from_hf(config.to_hf()) == config
    assert Config.from_hf(Gemma3TextConfig(**fields).to_dict()) == config


def test_which_layers_slide_in_files_that_give_a_pattern():
    fields = {k: v for k, v in THREE.items() if k != "layer_types"} | {"sliding_window_pattern": 3}
    config = Config.from_hf(fields)
    assert config.layer_types == (SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING, SLIDING)
    assert list(config.layer_types) == Gemma3TextConfig(**fields).layer_types


@pytest.mark.parametrize("name", ["tiny-2", "tiny-3"])
def test_without_a_window_it_is_saved_with_one_that_changes_nothing(tmp_path, name):
    """transformers makes the mask of a window even where no layer has one."""
    config = replace(PRESETS[name], window=None, layer_types=())
    fields = config.to_hf()
    assert fields["sliding_window"] == config.max_positions
    assert Config.from_hf(fields) == Config.from_hf(fields | {"sliding_window": None}) == config
    theirs = theirs_of(config)
    ours = ours_of(theirs, tmp_path)
    given = inputs(config, "decoder")
    with torch.no_grad():
        assert greatest(logits(ours, given), theirs(**given).logits) <= 1e-5


@pytest.mark.parametrize("fields", [TWO, THREE])
def test_layers_that_slide_need_a_window(fields):
    with pytest.raises(ConfigError, match="layer_types has 'sliding_attention' and window is None"):
        Config.from_hf(fields | {"sliding_window": None})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 1}, "version (1) of a Gemma must be 2 or 3"),
        ({"query_scale": -1}, "query_scale (-1) must be positive"),
        ({"attention_softcap": 0.0}, "attention_softcap (0.0) must be positive"),
        ({"output_softcap": -2.0}, "output_softcap (-2.0) must be positive"),
        ({"version": 3, "local_theta": 0.0}, "local_theta (0.0) must be positive"),
        ({"version": 3, "attention_softcap": 50.0}, "attention_softcap (50.0) belongs to Gemma 2: leave it out in version 3"),
        ({"local_theta": 5.0}, "local_theta (5.0) belongs to Gemma 3: leave it out in version 2"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        Config(100, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (TWO | {"hidden_activation": "gelu"}, "hidden_activation is 'gelu', which is not supported for gemma2 (only"),
        (TWO | {"attention_bias": True}, "attention_bias is True, which is not supported for gemma2 (only False is)"),
        (TWO | {"use_bidirectional_attention": True}, "use_bidirectional_attention is True, which is not supported for gemma2"),
        (
            THREE | {"use_bidirectional_attention": True},
            "use_bidirectional_attention is True, which is not supported for gemma3_",
        ),
        (
            THREE | {"attn_logit_softcapping": 50.0},
            "attn_logit_softcapping is 50.0, which is not supported for gemma3_text (only",
        ),
        (
            TWO | {"model_type": "gemma"},
            "model_type is 'gemma', and Gemma 1 is not supported (only gemma2 and gemma3_text are): use",
        ),
        (
            {k: v for k, v in THREE.items() if k != "layer_types"} | {"sliding_window_pattern": 0},
            "sliding_window_pattern is 0 and",
        ),
        (
            THREE | {"rope_parameters": {SLIDING: {"type": "linear", "factor": 2.0}}},
            "rope_parameters scales sliding_attention by 'linear', which is not supported for gemma3_text (only 'default' is):",
        ),
        (
            THREE | {"rope_parameters": {SLIDING: {"rope_type": "default", "factor": 2.0}}},
            "rope_parameters: factor (2.0) is no field of default rotary scaling",
        ),
        (
            THREE | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_scaling ({'rope_type': 'linear', 'factor': 2.0}) and rope_parameters ({'rope_theta': 250.0, 'rope_type': 'def",
        ),
        (
            THREE | {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling has the type 'linear', which transformers passes over in a gemma3_text: call the field rope_type, or",
        ),
        (THREE | {"rope_parameters": [1]}, "rope_parameters is [1] and must be a table: copy it again"),
        (THREE | {"rope_parameters": {FULL: 3}}, "full_attention is 3 and must be a table: copy it again"),
        (
            THREE | {"rope_parameters": {SLIDING: {"rope_theta": "x"}}},
            "rope_theta is 'x' and must be a number: copy it again",
        ),
        (
            THREE | {"rope_parameters": {"rope_theta": 5.0}},
            "rope_parameters has 'rope_theta' and may have 'full_attention' and 'sliding_attention', each with its own: copy it",
        ),
        (THREE | {"rope_parameters": None, "rope_scaling": 8}, "rope_scaling is 8 and must be a table: copy it again"),
        (
            THREE | {"rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters scales sliding_attention by 'linear', which is not supported for gemma3_text (only 'default' is):",
        ),
    ],
)
def test_fields_that_are_not_computed_are_refused_by_name(fields, message):
    with pytest.raises(CheckpointError, match="^" + re.escape("config.json: " + message)):
        Config.from_hf(fields)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("gemma-2-2b", 2_614_341_888),
        ("gemma-2-9b", 9_241_705_984),
        ("gemma-3-270m", 268_098_176),
        ("gemma-3-1b", 999_885_952),
    ],
)
def test_published_presets_have_the_size_of_their_files(name, size):
    assert io.build("gemma", PRESETS[name]).n_parameters() == size


def test_embeddings_are_multiplied_by_a_factor_rounded_as_theirs(tmp_path):
    theirs = theirs_of(PRESETS["tiny-3"]).to(torch.bfloat16)
    ours = ours_of(theirs, tmp_path)
    ids = torch.arange(300).unsqueeze(0)
    assert torch.equal(ours.embed(ids), theirs.model.embed_tokens(ids))
    exact = ours.embedding(ids).double() * 32**0.5
    assert not torch.equal(ours.embed(ids), exact.to(torch.bfloat16))  # sqrt(32) is no bfloat16


def test_fresh_norms_multiply_by_one():
    model = io.build("gemma", PRESETS["tiny-3"], seed=0)
    assert torch.equal(model.norm.weight, torch.zeros(32))
    assert torch.equal(model.blocks[0].attention.query_norm.weight, torch.zeros(16))


def test_the_model_goes_by_the_name_of_its_version():
    assert [io.build("gemma", PRESETS[n]).model_type for n in ("tiny-2", "tiny-3")] == ["gemma2", "gemma3_text"]
