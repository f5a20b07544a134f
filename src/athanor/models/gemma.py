"""Gemma 2 and the text models of Gemma 3 (Gemma Team 2024, 2025).

The decoder with a norm before and after each half of a block, norms whose files hold how far the factor is from one, embeddings
multiplied by sqrt(D), GELU instead of SiLU, and windows in most layers. Gemma 2 caps scores and logits; Gemma 3 has a norm over
each query and key head instead, and rotary positions of two bases: one for the layers with a window, one for the others.

Legend: B batch, T time, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from athanor.core.errors import CheckpointError, ConfigError
from athanor.models import decoder
from athanor.models.decoder import FULL, SLIDING
from athanor.models.fields import Fields
from athanor.models.keys import Entry
from athanor.nn.attention import Attention, Turn
from athanor.nn.context import Context
from athanor.nn.feedforward import GatedFeedForward
from athanor.nn.norms import RMSNorm
from athanor.nn.positions import Rotary
from athanor.nn.rope import LinearRope
from athanor.nn.sdpa import Scoring

MODEL_TYPES = ("gemma2", "gemma3_text")
_NAMES = {2: ("gemma2", "Gemma2ForCausalLM"), 3: ("gemma3_text", "Gemma3ForCausalLM")}


@dataclass(frozen=True)
class Config(decoder.Layered):
    """Shape of a Gemma: what every decoder with windows in some of its layers has (`decoder.Layered`), and

    version            2 or 3
    query_scale        scores are divided by its root; 0 is head_dim
    attention_softcap  c where scores are c tanh(s / c); None for no cap (always in version 3)
    output_softcap     the same of the logits
    local_theta        base of the rotary frequencies in layers with a window (version 3)
    """

    version: int = 2
    query_scale: int = 0
    attention_softcap: float | None = None
    output_softcap: float | None = None
    local_theta: float = 10_000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version not in _NAMES:
            raise ConfigError(f"version ({self.version}) of a Gemma must be 2 or 3")
        if not self.query_scale:
            object.__setattr__(self, "query_scale", self.head_dim)
        for name in ("query_scale", "attention_softcap", "output_softcap", "local_theta"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} ({value}) must be positive")
        if self.version == 3 and self.attention_softcap is not None:
            raise ConfigError(f"attention_softcap ({self.attention_softcap}) belongs to Gemma 2: leave it out in version 3")
        if self.version == 2 and self.local_theta != 10_000.0:
            raise ConfigError(f"local_theta ({self.local_theta}) belongs to Gemma 3: leave it out in version 2")

    def scoring(self, layer: int) -> Scoring:
        return Scoring(self.query_scale**-0.5, self.attention_softcap, self.window if self.slides(layer) else None)

    def to_hf(self) -> dict[str, Any]:
        fields = super().to_hf()
        del fields["hidden_act"]
        model_type, architecture = _NAMES[self.version]
        if self.version == 3:
            sliding = {"rope_theta": self.local_theta, "rope_type": "default"}
            fields["rope_parameters"] = {SLIDING: sliding, FULL: fields["rope_parameters"]}
            fields["rope_local_base_freq"] = self.local_theta
        return fields | {
            "architectures": [architecture],
            "model_type": model_type,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": self.query_scale,
            "attn_logit_softcapping": self.attention_softcap,
            "final_logit_softcapping": self.output_softcap,
            # transformers makes the mask of layers that slide even where there are none.
            "sliding_window": self.max_positions if self.window is None else self.window,
            "layer_types": list(self.layer_types),
            "attention_bias": False,
        }

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Config:
        """From the fields of config.json. Raises CheckpointError for what this file does not compute."""
        model_type = values.get("model_type", "gemma2")
        if model_type not in MODEL_TYPES:
            raise CheckpointError(
                f"config.json: model_type is {model_type!r}, and Gemma 1 is not supported (only {' and '.join(MODEL_TYPES)} are):"
                " use another checkpoint"
            )
        version = 2 if model_type == "gemma2" else 3
        fields = Fields(values, _NAMES[version][0])
        fields.only("hidden_activation", "gelu_pytorch_tanh")
        fields.only("attention_bias", False)
        fields.only("use_bidirectional_attention", False)
        local = 10_000.0
        if version == 3:
            local, values = _global_rope(values, fields)
        # Caps and windows that a file does not speak of have the values of the first models; null is none.
        known = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} if version == 2 else {}
        caps = [
            fields.float(name, None) if name in values else known.get(name)
            for name in ("attn_logit_softcapping", "final_logit_softcapping")
        ]  # fmt: skip
        if version == 3 and caps[0] is not None:
            fields.only("attn_logit_softcapping", None)
        shape = decoder.common(Fields(values, _NAMES[version][0]), 8192 if version == 2 else 131072)
        shape |= {"head_dim": fields.width("head_dim", 256), "tied": fields.bool("tie_word_embeddings", True)}
        n, every = shape["n_layers"], 2 if version == 2 else fields.int("sliding_window_pattern", 6)
        if every < 1:
            raise CheckpointError(f"config.json: sliding_window_pattern is {every} and must be at least 1: 6 is usual")
        kinds = decoder.layers_of(fields, tuple(SLIDING if (i + 1) % every else FULL for i in range(n)))
        window = fields.int_or_none("sliding_window", 4096)
        return cls(
            **shape,
            window=window if SLIDING in kinds else None,
            layer_types=kinds,
            version=version,
            query_scale=fields.int("query_pre_attn_scalar", 256),
            attention_softcap=caps[0],
            output_softcap=caps[1],
            local_theta=local,
        )


def _global_rope(values: Mapping[str, Any], fields: Fields) -> tuple[float, Mapping[str, Any]]:
    """The base of layers with a window, and the fields with the rotary settings of the others in the place of both."""
    both = fields.table("rope_parameters", {})
    for name in both:
        if name not in (FULL, SLIDING):
            raise CheckpointError(
                f"config.json: rope_parameters has {name!r} and may have {FULL!r} and {SLIDING!r}, each with its own:"
                " copy it again"
            )
    wide, near = (Fields(both, "gemma3_text").table(name, {}) for name in (FULL, SLIDING))
    sliding = Fields({"rope_parameters": near}, "gemma3_text").rope(fields.float("rope_local_base_freq", 10_000.0))
    local = sliding.pop("rope_theta")
    if sliding["rope_type"] != "default":
        raise CheckpointError(
            f"config.json: rope_parameters scales {SLIDING} by {sliding['rope_type']!r}, which is not supported for gemma3_text"
            " (only 'default' is): use another checkpoint"
        )
    decoder.scaling(sliding, None, 0)  # refuses what plain frequencies have no use for
    old = fields.table("rope_scaling", {})
    if old.get("type", "default") != "default" and "rope_type" not in old:
        raise CheckpointError(
            f"config.json: rope_scaling has the type {old['type']!r}, which transformers passes over in a gemma3_text: call the"
            " field rope_type, or leave rope_scaling out"
        )
    settled = Fields({**values, "rope_parameters": wide}, "gemma3_text").rope(1_000_000.0)
    return local, {**values, "rope_parameters": settled, "rope_scaling": None}


_TINY = Config(320, 32, 2, 4, 2, 48, 128, 10_000.0, 1e-6, head_dim=16, window=5, layer_types=(SLIDING, FULL))

PRESETS = {
    "tiny-2": replace(_TINY, attention_softcap=2.0, output_softcap=3.0),
    "tiny-2-plain": replace(_TINY, n_kv_heads=4, query_scale=7, window=9, layer_types=(), head_dim=8, tied=False),
    "tiny-3": replace(_TINY, version=3, rope_theta=1_000_000.0, local_theta=100.0),
    "tiny-3-capped": replace(_TINY, version=3, n_kv_heads=1, rope_scaling=LinearRope(8.0), output_softcap=4.0),
    "gemma-2-2b": Config(
        256000, 2304, 26, 8, 4, 9216, 8192, 10_000.0, 1e-6, head_dim=256, window=4096, layer_types=(SLIDING, FULL) * 13,
        attention_softcap=50.0, output_softcap=30.0,
    ),
    "gemma-2-9b": Config(
        256000, 3584, 42, 16, 8, 14336, 8192, 10_000.0, 1e-6, head_dim=256, window=4096, layer_types=(SLIDING, FULL) * 21,
        attention_softcap=50.0, output_softcap=30.0,
    ),
    "gemma-3-270m": Config(
        262144, 640, 18, 4, 1, 2048, 32768, 1_000_000.0, 1e-6, head_dim=256, window=512,
        layer_types=((SLIDING,) * 5 + (FULL,)) * 3, version=3,
    ),
    "gemma-3-1b": Config(
        262144, 1152, 26, 4, 1, 6912, 32768, 1_000_000.0, 1e-6, head_dim=256, window=512,
        layer_types=((SLIDING,) * 5 + (FULL,)) * 4 + (SLIDING,) * 2, version=3,
    ),
}  # fmt: skip


class _Block(nn.Module):
    """x + norm(attention(norm(x))), then x + norm(feed_forward(norm(x)))."""

    def __init__(self, config: Config, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        d, eps = config.d_model, config.norm_eps
        self.attention_norm = RMSNorm(d, eps, offset=1.0)
        self.attention = attention
        self.attention_out_norm = RMSNorm(d, eps, offset=1.0)
        self.feed_forward_norm = RMSNorm(d, eps, offset=1.0)
        self.feed_forward = feed_forward
        self.feed_forward_out_norm = RMSNorm(d, eps, offset=1.0)

    def forward(self, x: Tensor, ctx: Context, layer: int, turn: Turn) -> Tensor:
        x = x + self.attention_out_norm(self.attention(self.attention_norm(x), ctx, layer, turn))
        return x + self.feed_forward_out_norm(self.feed_forward(self.feed_forward_norm(x)))


class Model(decoder.Decoder):
    """The model; see the module docstring."""

    model_type = "gemma2"
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.norm = RMSNorm(config.d_model, config.norm_eps, offset=1.0)
        self.local_rotary = Rotary(config.head_dim, config.max_positions, config.local_theta) if config.version == 3 else None
        self.model_type = _NAMES[config.version][0]  # type: ignore[misc]

    def block(self, layer: int) -> nn.Module:
        return _Block(self.config, self.make_attention(layer), self.make_feed_forward(layer))

    def make_attention(self, layer: int) -> nn.Module:
        c = self.config
        norm = c.norm_eps if c.version == 3 else None
        return Attention(
            c.d_model, c.n_heads, c.n_kv_heads, c.head_dim, qk_norm=norm, qk_offset=1.0, scoring=c.scoring(layer)
        )  # fmt: skip

    def make_feed_forward(self, layer: int) -> nn.Module:
        return GatedFeedForward(self.config.d_model, self.config.d_ff, "gelu_pytorch_tanh")

    def embed(self, ids: Tensor) -> Tensor:
        # The factor is rounded to the dtype of the weights, as it was in training.
        scale = torch.tensor(self.config.d_model**0.5, dtype=self.embedding.weight.dtype, device="cpu")
        embedded: Tensor = self.embedding(ids) * float(scale)
        return embedded

    def turns(self, ctx: Context) -> Sequence[Turn]:
        if self.local_rotary is None:
            return super().turns(ctx)
        both = [x.at(ctx.positions, ctx.extent, ctx.cached) for x in (self.rotary, self.local_rotary)]
        return [both[self.config.slides(layer)] for layer in range(self.config.n_layers)]

    @property
    def output_softcap(self) -> float | None:
        return self.config.output_softcap

    def block_keys(self, layer: int, ours: str, theirs: str) -> dict[str, str | Entry]:
        keys = super().block_keys(layer, ours, theirs) | {
            ours + "attention_out_norm": theirs + "post_attention_layernorm",
            ours + "feed_forward_norm": theirs + "pre_feedforward_layernorm",
            ours + "feed_forward_out_norm": theirs + "post_feedforward_layernorm",
        }
        if self.config.version == 3:
            keys[ours + "attention.query_norm"] = theirs + "self_attn.q_norm"
            keys[ours + "attention.key_norm"] = theirs + "self_attn.k_norm"
        return keys
