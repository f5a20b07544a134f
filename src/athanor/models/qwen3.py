"""Qwen 3 (Qwen Team 2025): the decoder with an RMSNorm over each query and key head, and heads as wide as one likes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from athanor.models import decoder
from athanor.models.decoder import FULL, SLIDING
from athanor.models.fields import Fields
from athanor.models.keys import Entry
from athanor.models.qwen2 import window_fields, windows
from athanor.nn.attention import Attention
from athanor.nn.rope import YarnRope


@dataclass(frozen=True)
class Config(decoder.Layered):
    """Shape of a Qwen 3: what every decoder with windows in some of its layers has (`decoder.Layered`), and

    attention_bias  whether the four projections of attention have biases
    """

    attention_bias: bool = False

    def to_hf(self) -> dict[str, Any]:
        own = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": self.attention_bias}
        return super().to_hf() | own | window_fields(self)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Config:
        """From the fields of config.json. Raises CheckpointError for what this file does not compute."""
        fields = Fields(values, "qwen3")
        fields.only("hidden_act", "silu")
        shape = decoder.common(fields, 32768) | {"head_dim": fields.width("head_dim", 128)}
        bias = fields.bool("attention_bias", False)
        return cls(**shape, **windows(fields, shape["n_layers"]), attention_bias=bias)


_TINY = Config(320, 32, 2, 4, 2, 48, 128, 1_000_000.0, 1e-6, head_dim=16)

PRESETS = {
    "tiny": _TINY,
    "tiny-bias": replace(_TINY, attention_bias=True, tied=False, n_kv_heads=4, head_dim=8),
    "tiny-window": replace(_TINY, window=5, layer_types=(SLIDING, FULL), n_kv_heads=1),
    "tiny-yarn": replace(_TINY, rope_scaling=YarnRope(4.0, 32)),
    "qwen3-0.6b": Config(151936, 1024, 28, 16, 8, 3072, 40960, 1_000_000.0, 1e-6, head_dim=128),
    "qwen3-1.7b": Config(151936, 2048, 28, 16, 8, 6144, 40960, 1_000_000.0, 1e-6, head_dim=128),
    "qwen3-8b": Config(151936, 4096, 36, 32, 8, 12288, 40960, 1_000_000.0, 1e-6, tied=False, head_dim=128),
}


class Model(decoder.Decoder):
    """The model; see the module docstring."""

    model_type = "qwen3"
    config: Config

    def make_attention(self, layer: int) -> nn.Module:
        c, bias = self.config, self.config.attention_bias
        return Attention(
            c.d_model, c.n_heads, c.n_kv_heads, c.head_dim, bias=bias, out_bias=bias, qk_norm=c.norm_eps, scoring=c.scoring(layer)
        )

    def block_keys(self, layer: int, ours: str, theirs: str) -> dict[str, str | Entry]:
        norms = {
            ours + "attention.query_norm": theirs + "self_attn.q_norm",
            ours + "attention.key_norm": theirs + "self_attn.k_norm",
        }
        return super().block_keys(layer, ours, theirs) | norms
