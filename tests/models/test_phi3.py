"""The config of a Phi-3: its rotary fields old and new, what it refuses, long contexts, and presets."""

import re

import pytest
import torch
from transformers import Phi3Config

from athanor.core.errors import CheckpointError, ConfigError
from athanor.infer.rows import Rows
from athanor.models import io
from athanor.models.phi3 import PRESETS, Config
from athanor.nn.rope import LinearRope, LongRope
from tests.models.reference import greatest, inputs, logits, ours_of, packed, random_ids, separate, theirs_of

FIELDS = Config(100, 64, 2, 4, 2, 96, 512).to_hf()
SHORT, LONG = [1.0 + i / 8 for i in range(8)], [1.0 + i for i in range(8)]
BARE = {
    k: v for k, v in FIELDS.items() if "rope" not in k and k not in ("partial_rotary_factor", "original_max_position_embeddings")
}


def test_fields_that_an_old_file_lacks_have_the_values_of_transformers():
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    fields = {k: FIELDS[k] for k in needed}
    assert Config.from_hf(fields) == Config.from_hf(Phi3Config(**fields, pad_token_id=0).to_dict())


@pytest.mark.parametrize("kind", [{"type": "longrope"}, {"rope_type": "longrope"}, {"type": "su"}, {"rope_type": "yarn"}])
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_old_and_new_fields_of_longrope_are_read_as_transformers_reads_them(kind, place):
    fields = {place: kind | {"short_factor": SHORT, "long_factor": LONG}, "original_max_position_embeddings": 128}
    config = Config.from_hf(BARE | fields)
    assert config.rope_scaling == LongRope(tuple(SHORT), tuple(LONG), 128)
    assert config.cached_positions == 128
    assert Config.from_hf(config.to_hf()) == config
    if "su" in kind.values():  # transformers reads it no more
        return
    theirs = Phi3Config(**BARE | {k: dict(v) if isinstance(v, dict) else v for k, v in fields.items()})
    assert Config.from_hf(theirs.to_dict()) == config


@pytest.mark.parametrize(
    "fields", [{"partial_rotary_factor": 0.5}, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}]
)
def test_old_and_new_fields_of_partial_rotation_are_read(fields):
    config = Config.from_hf(BARE | fields)
    assert (config.rotary_factor, config.rotary_dim) == (0.5, 8)
    assert Config.from_hf(config.to_hf()) == Config.from_hf(Phi3Config(**BARE | fields).to_dict()) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 32}, "head_dim (32) must be d_model / n_heads (64 / 4) in a Phi-3: leave it out"),
        ({"rotary_factor": 0.2}, "rotary_factor (0.2) must turn an even number of the 16 entries of a head: 1 turns all"),
        ({"rotary_factor": 1.5}, "rotary_factor (1.5) must turn an even number of the 16 entries of a head: 1 turns all"),
        ({"rotary_factor": 0.0}, "rotary_factor (0.0) must turn an even number of the 16 entries of a head: 1 turns all"),
        ({"rope_scaling": LinearRope(2.0)}, "rope_scaling (linear) must be longrope in a Phi-3, or None"),
        ({"rope_scaling": LongRope((1.0,), (1.0,), 9)}, "short_factor of longrope scaling has 1 numbers and must have 8"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        Config(100, 64, 2, 4, 2, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which is not supported for phi3 (only 'silu' is)"),
        ({"partial_rotary_factor": "x"}, "partial_rotary_factor is 'x' and must be a number: copy it again"),
        ({"rope_parameters": {"partial_rotary_factor": "x"}}, "partial_rotary_factor is 'x' and must be a number: copy it again"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": SHORT}},
            "rope_parameters: longrope rotary scaling lacks long",
        ),
    ],
)
def test_fields_that_are_not_computed_are_refused_by_name(fields, message):
    with pytest.raises(CheckpointError, match="^" + re.escape("config.json: " + message)):
        Config.from_hf(BARE | fields)


def test_beyond_the_original_context_longrope_is_that_of_transformers(tmp_path):
    config = PRESETS["tiny-longrope"]
    theirs = theirs_of(config)
    ours = ours_of(theirs, tmp_path)
    for time in (96, 97, 200):
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


@pytest.mark.parametrize(
    ("name", "size"), [("phi-3-mini-4k", 3_821_079_552), ("phi-3-medium-4k", 13_960_238_080), ("phi-4", 14_659_507_200)]
)
def test_published_presets_have_the_size_of_their_files(name, size):
    assert io.build("phi3", PRESETS[name]).n_parameters() == size
