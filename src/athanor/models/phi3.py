"""Phi-3 (Abdin et al. 2024): the decoder whose files fuse projections too; long variants scale rotary positions by LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from athanor.core.errors import CheckpointError, ConfigError
from athanor.models import decoder
from athanor.models.fields import Fields
from athanor.models.keys import Entry
from athanor.nn.rope import LongRope


@dataclass(frozen=True)
class Config(decoder.Windowed):
    """Shape of a Phi-3: what every decoder with a window has (`decoder.Windowed`), and

    rotary_factor  how much of each head is turned
    """

    rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim * self.n_heads != self.d_model:
            raise ConfigError(
                f"head_dim ({self.head_dim}) must be d_model / n_heads ({self.d_model} / {self.n_heads}) in a Phi-3: leave it out"
            )
        if not 0 < self.rotary_factor <= 1 or self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ConfigError(
                f"rotary_factor ({self.rotary_factor}) must turn an even number of the {self.head_dim} entries of a head:"
                " 1 turns all"
            )
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, LongRope):
            raise ConfigError(f"rope_scaling ({self.rope_scaling.rope_type}) must be longrope in a Phi-3, or None")

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_factor)

    def to_hf(self) -> dict[str, Any]:
        fields = super().to_hf()
        del fields["head_dim"]
        by = self.rope_scaling
        original = by.original_max_position_embeddings if isinstance(by, LongRope) else self.max_positions
        rotary = fields["rope_parameters"] | {"partial_rotary_factor": self.rotary_factor}
        return fields | {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            # By default ids that a smaller vocabulary does not have.
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "sliding_window": self.window,
            "original_max_position_embeddings": original,
            "partial_rotary_factor": self.rotary_factor,
            "rope_parameters": rotary,
        }

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Config:
        """From the fields of config.json. Raises CheckpointError for what this file does not compute."""
        fields = Fields(values, "phi3")
        fields.only("hidden_act", "silu")
        rotary = fields.rope()
        factor = rotary.pop("partial_rotary_factor", None)
        factor = fields.float("partial_rotary_factor", 1.0) if factor is None else factor
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            raise CheckpointError(f"config.json: partial_rotary_factor is {factor!r} and must be a number: copy it again")
        if rotary["rope_type"] in ("su", "yarn"):  # what LongRoPE was called before
            rotary["rope_type"] = "longrope"
        original = fields.int("original_max_position_embeddings", 4096)
        norm_eps, window = fields.float("rms_norm_eps", 1e-5), fields.int("sliding_window", None)
        settled = {"rope_parameters": rotary, "rope_scaling": None, "original_max_position_embeddings": original}
        shape = decoder.common(Fields({**values, **settled}, "phi3"), 4096)
        return cls(**shape | {"norm_eps": norm_eps}, window=window, rotary_factor=float(factor))


_TINY = Config(320, 32, 2, 4, 2, 48, 128)
_SHORT, _LONG = (1.0, 1.5, 2.0, 2.5), (2.0, 4.0, 8.0, 16.0)

PRESETS = {
    "tiny": replace(_TINY, tied=False),
    "tiny-partial": replace(_TINY, rotary_factor=0.5, n_kv_heads=4, window=6),
    "tiny-longrope": replace(_TINY, rope_scaling=LongRope(_SHORT, _LONG, 96), max_positions=384),
    "phi-3-mini-4k": Config(32064, 3072, 32, 32, 32, 8192, 4096, tied=False, window=2047),
    "phi-3-medium-4k": Config(32064, 5120, 40, 40, 10, 17920, 4096, tied=False, window=2047),
    "phi-4": Config(100352, 5120, 40, 40, 10, 17920, 16384, 250_000.0, tied=False),
}


class Model(decoder.Decoder):
    """The model; see the module docstring."""

    model_type = "phi3"
    config: Config

    def block_keys(self, layer: int, ours: str, theirs: str) -> dict[str, str | Entry]:
        fused: dict[str, str | Entry] = {
            ours + "attention.qkv": theirs + "self_attn.qkv_proj",
            ours + "feed_forward.gate_up": theirs + "mlp.gate_up_proj",
        }
        return super().block_keys(layer, ours, theirs) | fused
