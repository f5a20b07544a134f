"""Mistral (Jiang et al. 2023): the decoder with a window of attention in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from athanor.models import decoder
from athanor.models.fields import Fields
from athanor.nn.rope import LinearRope


@dataclass(frozen=True)
class Config(decoder.Windowed):
    """Shape of a Mistral: what every decoder with a window has (`decoder.Windowed`)."""

    def to_hf(self) -> dict[str, Any]:
        own = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": self.window}
        return super().to_hf() | own

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Config:
        """From the fields of config.json. Raises CheckpointError for what this file does not compute."""
        fields = Fields(values, "mistral")
        fields.only("hidden_act", "silu")
        fields.only("layer_types", None)
        window = fields.int_or_none("sliding_window", 4096)
        return cls(**decoder.common(fields, 131072), window=window)


_TINY = Config(320, 32, 2, 4, 2, 48, 128)

PRESETS = {
    "tiny": replace(_TINY, window=6, tied=False),
    "tiny-tied": replace(_TINY, n_kv_heads=1, head_dim=16, window=3),
    "tiny-full": replace(_TINY, norm_eps=1e-3, rope_scaling=LinearRope(2.0)),
    "mistral-7b-v0.1": Config(32000, 4096, 32, 32, 8, 14336, 32768, tied=False, window=4096),
    "mistral-7b-v0.3": Config(32768, 4096, 32, 32, 8, 14336, 32768, 1_000_000.0, tied=False),
    "mistral-nemo-12b": Config(131072, 5120, 40, 32, 8, 14336, 131072, 1_000_000.0, tied=False, head_dim=128),
}


class Model(decoder.Decoder):
    """The model; see the module docstring."""

    model_type = "mistral"
    config: Config
