"""Mixtral: what its file refuses, and the losses of its routers; the rest is in test_parity.py."""

from dataclasses import replace

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from athanor.compress.apply import compress
from athanor.compress.linear import QuantLinear
from athanor.core.errors import CheckpointError, ConfigError
from athanor.models import io, mixtral
from athanor.nn import moe
from tests.models.reference import ours_of, random_ids, theirs_of

TINY = mixtral.PRESETS["tiny"]


def test_the_published_config_is_the_preset():
    published = {
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32000,
    }  # fmt: skip
    assert mixtral.Config.from_hf(published) == mixtral.PRESETS["mixtral-8x7b"]
    assert 46.6e9 < io.build("mixtral", mixtral.PRESETS["mixtral-8x7b"]).n_parameters() < 46.8e9


def test_the_load_balance_loss_is_theirs_with_its_gradient(tmp_path):
    theirs = theirs_of(TINY)
    ours = ours_of(theirs, tmp_path).train()
    ids = random_ids(TINY, 3, 19)
    expected = theirs(ids, output_router_logits=True, labels=ids).aux_loss
    ours(ids)
    found = moe.aux_losses(ours)["load_balance"]
    torch.testing.assert_close(found, expected)
    expected.backward()
    found.backward()
    for mine, yours in zip(ours.blocks, theirs.model.layers, strict=True):
        torch.testing.assert_close(mine.feed_forward.router.weight.grad, yours.mlp.gate.weight.grad, atol=1e-6, rtol=1e-4)
    assert isinstance(theirs, MixtralForCausalLM)
    load, dropped = moe.usage(ours)
    assert load.shape == (2, 4)
    assert load.sum(1).tolist() == [3 * 19 * 2] * 2
    assert not dropped.any()


def test_compression_leaves_experts_and_routers_to_bfloat16():
    model = io.build("mixtral", TINY, seed=0).eval()
    small = compress(model, 8)
    names = {name.split(".", 2)[2] for name, m in small.named_modules() if isinstance(m, QuantLinear)}
    assert names == {"attention.qkv", "attention.out"}
    stack = model.blocks[0].feed_forward.experts.gate_up.weight
    assert torch.equal(small.blocks[0].feed_forward.experts.gate_up.weight, stack.bfloat16().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_experts": 0}, r"n_experts \(0\) must be at least 1: 8 is usual"),
        ({"top_k": 5}, r"top_k \(5\) must be from 1 to n_experts \(4\): 2 is usual"),
        ({"top_k": 0}, r"top_k \(0\) must be from 1 to n_experts \(4\)"),
    ],
)
def test_mistakes_in_a_config_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)


def test_fields_that_an_old_file_lacks_have_the_values_of_transformers():
    needed = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"
    )  # fmt: skip
    fields = {k: v for k, v in TINY.to_hf().items() if k in needed}
    config = mixtral.Config.from_hf(fields)
    assert config == mixtral.Config.from_hf(MixtralConfig(**fields).to_dict())
    assert config.rope_theta == 1_000_000.0
    assert mixtral.Config.from_hf(fields | {"num_experts": 5}).n_experts == MixtralConfig(num_experts=5).num_local_experts == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("router_jitter_noise", 0.1),
        ("num_local_experts", "8"),
        ("num_experts", 5),
        ("layer_types", ["full_attention"] * 2),
    ],
)
def test_what_is_not_computed_is_refused(field, value):
    with pytest.raises(CheckpointError, match=field):
        mixtral.Config.from_hf(TINY.to_hf() | {field: value})
