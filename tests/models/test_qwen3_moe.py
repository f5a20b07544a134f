"""Qwen 3 with experts: fields old and new, and which layers have experts; the rest is in test_parity.py."""

from dataclasses import replace

import pytest
from transformers import Qwen3MoeConfig

from athanor.core.errors import CheckpointError, ConfigError
from athanor.models import io, qwen3_moe
from athanor.nn.moe import MixtureOfExperts

TINY = qwen3_moe.PRESETS["tiny"]


def test_the_published_config_is_the_preset():
    published = {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
        "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
        "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    }  # fmt: skip
    assert qwen3_moe.Config.from_hf(published) == qwen3_moe.PRESETS["qwen3-30b-a3b"]
    assert 30.4e9 < io.build("qwen3_moe", qwen3_moe.PRESETS["qwen3-30b-a3b"]).n_parameters() < 30.6e9


def test_the_number_of_experts_has_two_names():
    fields = TINY.to_hf()
    fields["num_local_experts"] = fields.pop("num_experts")
    assert qwen3_moe.Config.from_hf(fields) == TINY


@pytest.mark.parametrize(
    ("fields", "window"), [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 5}, 5)]
)  # fmt: skip
def test_windows_are_read_as_transformers_reads_them(fields, window):
    base = {k: v for k, v in TINY.to_hf().items() if k != "sliding_window"} | {"use_sliding_window": True}
    assert qwen3_moe.Config.from_hf(base | fields).window == window == Qwen3MoeConfig(**base | fields).sliding_window


@pytest.mark.parametrize(
    ("change", "sparse"),
    [({}, [True] * 4), ({"sparse_step": 2}, [False, True] * 2), ({"dense_layers": (0, 3)}, [False, True, True, False])],
)
def test_which_layers_have_experts(change, sparse):
    model = io.build("qwen3_moe", replace(TINY, n_layers=4, **change))
    assert [isinstance(block.feed_forward, MixtureOfExperts) for block in model.blocks] == sparse


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 9}, r"top_k \(9\) must be from 1 to n_experts \(8\)"),
        ({"d_expert": 0}, r"d_expert \(0\) must be at least 1"),
        ({"sparse_step": 0}, r"sparse_step \(0\) must be at least 1"),
        ({"dense_layers": (2,)}, "dense_layers names layer 2, and there are layers 0 to 1: leave it out"),
    ],
)
def test_mistakes_in_a_config_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)


def test_what_is_not_computed_is_refused():
    with pytest.raises(CheckpointError, match=r"mlp_only_layers is \[0.5\] and must be a list of layers: copy it again"):
        qwen3_moe.Config.from_hf(TINY.to_hf() | {"mlp_only_layers": [0.5]})
    for name, value in (("hidden_act", "relu"), ("layer_types", ["sliding_attention"] * 2)):
        with pytest.raises(CheckpointError, match=f"{name} is .*, which is not supported for qwen3_moe"):
            qwen3_moe.Config.from_hf(TINY.to_hf() | {name: value})
    with pytest.raises(
        CheckpointError, match="num_local_experts is 4 and num_experts, which means the same in a qwen3_moe, is 8"
    ):
        qwen3_moe.Config.from_hf(TINY.to_hf() | {"num_local_experts": 4})
