"""GPT-2: the config, files as they were first published, and presets."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from athanor.core.errors import CheckpointError, ConfigError
from athanor.models import io
from athanor.models.gpt2 import PRESETS, Config
from tests.models.reference import inputs, logits, ours_of, theirs_of

FIELDS = Config(100, 64, 2, 4, 128).to_hf()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 0}, "d_model (0) must be at least 1"),
        ({"n_layers": 0}, "n_layers (0) must be at least 1"),
        ({"n_heads": 0}, "n_heads (0) must be at least 1"),
        ({"d_model": 256, "n_heads": 6}, "n_heads (6) must divide d_model (256): use 4 or 8"),
        ({"norm_eps": 0.0}, "norm_eps (0.0) must be positive: 1e-5 is usual"),
        ({"activation": "tanh"}, "activation ('tanh') must be one of silu, swish, relu, gelu, gelu_new, gelu_pytorch_tanh"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        Config(**({"vocab_size": 100} | fields))


def test_fields_that_an_old_file_lacks_have_the_values_of_transformers():
    fields = {k: FIELDS[k] for k in ("vocab_size", "n_embd", "n_layer", "n_head")}
    assert Config.from_hf(fields) == Config.from_hf(GPT2Config(**fields).to_dict())
    assert Config.from_hf(fields | {"n_inner": None}).d_ff == 256


def test_other_names_of_fields_are_read_as_transformers_reads_them():
    names = {
        "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }  # fmt: skip
    assert names == GPT2Config.attribute_map
    fields = {k: v for k, v in FIELDS.items() if k not in names.values()} | {k: FIELDS[v] for k, v in names.items()}
    assert Config.from_hf(fields) == Config.from_hf(FIELDS)
    for other, name in names.items():
        message = f"config.json: {other} is 8 and {name}, which means the same in a gpt2, is {FIELDS[name]}: remove the one that"
        with pytest.raises(CheckpointError, match=f"^{message}"):
            Config.from_hf(FIELDS | {other: 8})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale_attn_weights": None}, "scale_attn_weights is None"),
        ({"activation_function": "tanh"}, "activation_function is 'tanh'"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(fields, message):
    with pytest.raises(CheckpointError, match="^" + re.escape(f"config.json: {message}, which is not supported for gpt2 (only")):
        Config.from_hf(FIELDS | fields)


def test_files_without_prefix_and_with_the_causal_mask_are_read(tmp_path):
    """As the first ones are."""
    config = PRESETS["tiny"]
    theirs = theirs_of(config)
    expected = ours_of(theirs, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    mask = torch.ones(128, 128).tril().view(1, 1, 128, 128)
    for layer in range(2):
        tensors |= {f"h.{layer}.attn.bias": mask.clone(), f"h.{layer}.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors, path, {"format": "pt"})
    found = io.load(tmp_path)
    given = inputs(config, "decoder")
    with torch.no_grad():
        assert torch.equal(logits(found, given), logits(expected, given))


def test_fresh_weights_are_those_of_the_paper():
    model = io.build("gpt2", Config(500, 256, 8, 4, 512), seed=0)
    block = model.blocks[3]
    for module, std in (
        (model.embedding, 0.02),
        (model.positions, 0.01),
        (block.attention.qkv, 0.02),
        (block.attention.out, 0.005),
        (block.feed_forward.up, 0.02),
        (block.feed_forward.down, 0.005),
    ):
        assert abs(float(module.weight.detach().std()) / std - 1) < 0.05


@pytest.mark.parametrize(
    ("name", "size"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_published_presets_have_the_size_of_their_files(name, size):
    assert io.build("gpt2", PRESETS[name]).n_parameters() == size
