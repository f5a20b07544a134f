"""LLaMA (Touvron et al. 2023): pre-norm decoder with RMSNorm, rotary positions, grouped-query attention and SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from athanor.models import decoder
from athanor.models.fields import Fields
from athanor.nn.attention import Attention
from athanor.nn.feedforward import GatedFeedForward
from athanor.nn.rope import DynamicRope, LinearRope, Llama3Rope, YarnRope


@dataclass(frozen=True)
class Config(decoder.Config):
    """Shape of a LLaMA: what every decoder has (`decoder.Config`), and

    attention_bias  whether the four projections of attention have biases
    mlp_bias        whether the three of the feed-forward block have
    """

    attention_bias: bool = False
    mlp_bias: bool = False

    def to_hf(self) -> dict[str, Any]:
        own = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        return super().to_hf() | own | {"attention_bias": self.attention_bias, "mlp_bias": self.mlp_bias}

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Config:
        """From the fields of config.json. Raises CheckpointError for what this file does not compute."""
        fields = Fields(values, "llama")
        fields.only("hidden_act", "silu")
        biases = {name: fields.bool(name, False) for name in ("attention_bias", "mlp_bias")}
        return cls(**decoder.common(fields), **biases)


_TINY = Config(320, 32, 2, 4, 2, 48, 128)

PRESETS = {
    "tiny": _TINY,
    "tiny-untied": Config(320, 32, 2, 4, 1, 48, 128, norm_eps=1e-3, rope_theta=500.0, tied=False),
    "tiny-wide-heads": Config(320, 32, 2, 4, 4, 48, 128, head_dim=16),
    "tiny-biases": replace(_TINY, attention_bias=True, mlp_bias=True),
    "tiny-linear": replace(_TINY, rope_scaling=LinearRope(4.0)),
    "tiny-dynamic": replace(_TINY, rope_scaling=DynamicRope(2.0, 96), max_positions=192),
    "tiny-yarn": replace(_TINY, rope_scaling=YarnRope(4.0, 32), head_dim=16),
    "tiny-llama3": replace(_TINY, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 16), head_dim=16),
    "llama-1.1b": Config(32000, 2048, 22, 32, 4, 5632, 2048, tied=False),  # the TinyLlama project's
    "llama-2-7b": Config(32000, 4096, 32, 32, 32, 11008, 4096, tied=False),
    "llama-3-8b": Config(128256, 4096, 32, 32, 8, 14336, 8192, rope_theta=500_000.0, tied=False),
    "llama-3.1-8b": Config(
        128256, 4096, 32, 32, 8, 14336, 131072, 500_000.0, tied=False, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 8192)
    ),
}


class Model(decoder.Decoder):
    """The model; see the module docstring."""

    model_type = "llama"
    config: Config

    def make_attention(self, layer: int) -> nn.Module:
        c = self.config
        return Attention(
            c.d_model, c.n_heads, c.n_kv_heads, c.head_dim, bias=c.attention_bias, out_bias=c.attention_bias
        )  # fmt: skip

    def make_feed_forward(self, layer: int) -> nn.Module:
        return GatedFeedForward(self.config.d_model, self.config.d_ff, bias=self.config.mlp_bias)
