"""Qwen 2 and 2.5 (Qwen Team 2024): the decoder with biases on queries, keys and values, and windows in its upper layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from athanor.models import decoder
from athanor.models.decoder import FULL, SLIDING
from athanor.models.fields import Fields
from athanor.nn.attention import Attention
from athanor.nn.rope import YarnRope


@dataclass(frozen=True)
class Config(decoder.Layered):
    """Shape of a Qwen 2: what every decoder with windows in some of its layers has (`decoder.Layered`)."""

    def to_hf(self) -> dict[str, Any]:
        own = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
        return super().to_hf() | own | window_fields(self)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Config:
        """From the fields of config.json. Raises CheckpointError for what this file does not compute."""
        fields = Fields(values, "qwen2")
        fields.only("hidden_act", "silu")
        shape = decoder.common(fields, 32768)
        return cls(**shape, **windows(fields, shape["n_layers"]))


def window_fields(config: decoder.Layered) -> dict[str, Any]:
    """The fields of both Qwens that say which layers have a window."""
    kinds = list(config.layer_types)
    return {
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "max_window_layers": kinds.index(SLIDING) if SLIDING in kinds else config.n_layers,
        "layer_types": kinds,
    }


def window_of(fields: Fields) -> int | None:
    """The window of all Qwens."""
    window: int | None = fields.int_or_none("sliding_window", 4096) if fields.bool("use_sliding_window", False) else None
    return window


def windows(fields: Fields, n_layers: int) -> dict[str, Any]:
    """The arguments of `decoder.Layered` from those fields; files from before `layer_types` name the first layer that slides."""
    window = window_of(fields)
    first = n_layers if window is None else fields.int("max_window_layers", 28)
    kinds = decoder.layers_of(fields, tuple(SLIDING if layer >= first else FULL for layer in range(n_layers)))
    return {"window": window, "layer_types": kinds}


_TINY = Config(320, 32, 2, 4, 2, 48, 128)

PRESETS = {
    "tiny": _TINY,
    "tiny-window": replace(_TINY, window=5, layer_types=(FULL, SLIDING), tied=False),
    "tiny-windows": replace(_TINY, window=7, n_kv_heads=1, norm_eps=1e-6, layer_types=()),
    "tiny-yarn": replace(_TINY, rope_scaling=YarnRope(4.0, 32, attention_factor=1.1), n_kv_heads=4),
    "qwen2.5-0.5b": Config(151936, 896, 24, 14, 2, 4864, 32768, 1_000_000.0, 1e-6),
    "qwen2.5-1.5b": Config(151936, 1536, 28, 12, 2, 8960, 131072, 1_000_000.0, 1e-6),
    "qwen2.5-7b": Config(152064, 3584, 28, 28, 4, 18944, 131072, 1_000_000.0, 1e-6, tied=False),
}


class Model(decoder.Decoder):
    """The model; see the module docstring."""

    model_type = "qwen2"
    config: Config

    def make_attention(self, layer: int) -> nn.Module:
        c = self.config
        return Attention(c.d_model, c.n_heads, c.n_kv_heads, c.head_dim, bias=True, scoring=c.scoring(layer))
