"""LLaMA (Touvron et al. 2023): pre-norm decoder with RMSNorm, rotary positions, grouped-query attention and SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from athanor.models import decoder
from athanor.models.fields import Fields


@dataclass(frozen=True)
class Config(decoder.Config):
    """Shape of a LLaMA: what every decoder has (`decoder.Config`)."""

    def to_hf(self) -> dict[str, Any]:
        own = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False}
        return super().to_hf() | own

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Config:
        """From the fields of config.json. Raises CheckpointError for what this file does not compute."""
        fields = Fields(values, "llama")
        fields.only("hidden_act", "silu")
        fields.only("attention_bias", False)
        fields.only("mlp_bias", False)
        return cls(**decoder.common(fields))


PRESETS = {
    "tiny": Config(320, 32, 2, 4, 2, 48, 128),
    "tiny-untied": Config(320, 32, 2, 4, 1, 48, 128, norm_eps=1e-3, rope_theta=500.0, tied=False),
    "tiny-wide-heads": Config(320, 32, 2, 4, 4, 48, 128, head_dim=16),
}


class Model(decoder.Decoder):
    """The model; see the module docstring."""

    model_type = "llama"
    config: Config
