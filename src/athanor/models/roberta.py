"""RoBERTa (Liu et al. 2019): BERT without next sentences, whose positions count on from the padding token's id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from athanor.core.errors import ConfigError
from athanor.models import bert
from athanor.models.fields import Fields
from athanor.models.keys import Entry
from athanor.nn.context import Context

MODEL_TYPES = ("xlm-roberta", "camembert")
_CLASSES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert", "longformer": "Longformer"}


@dataclass(frozen=True)
class Config(bert.Config):
    """Shape of a RoBERTa: that of a BERT, and

    pad_id   of the padding token: the first token's position is pad_id + 1 in the table, that of a padding token within a text
             pad_id, and it is not counted
    variant  model_type of the files
    """

    n_segments: int = 1
    norm_eps: float = 1e-5
    pad_id: int = 1
    variant: str = "roberta"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in _CLASSES:
            raise ConfigError(f"variant ({self.variant!r}) must be one of {', '.join(_CLASSES)}")
        if self.pad_id < 0:
            raise ConfigError(f"pad_id ({self.pad_id}) must be a token id: 1 is usual")

    def to_hf(self) -> dict[str, Any]:
        return super().to_hf() | {
            "architectures": [f"{_CLASSES[self.variant]}ForMaskedLM"],
            "model_type": self.variant,
            "max_position_embeddings": self.max_positions + self.pad_id + 1,
            "pad_token_id": self.pad_id,
        }

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Config:
        """From the fields of config.json. Raises CheckpointError for what this file does not compute."""
        fields = Fields(values, values["model_type"])
        pad = fields.int("pad_token_id", 1)
        common = bert.common(fields)
        common["max_positions"] -= pad + 1
        return cls(**common, pad_id=pad, variant=values["model_type"])


class Model(bert.Model):
    """The model; see the module docstring."""

    model_type = "roberta"
    prefix = "roberta."
    head_activation = "gelu"
    harmless = (r"(?:roberta\.)?embeddings\.position_ids",)
    config: Config

    def __init__(self, config: Config) -> None:
        self.shift = config.pad_id + 1
        super().__init__(config)

    def rows(self, ids: Tensor, ctx: Context) -> Tensor:  # (B, T) -> (B, T)
        padding = (ids == self.config.pad_id).flatten()
        if ids.device.type == "cpu" and not bool(padding.any()):  # elsewhere to ask takes longer than to count
            return ctx.positions + self.shift
        counted = padding.cumsum(0)
        at = ctx.positions.flatten()
        start = torch.arange(len(at), device=at.device) - at  # of the token's sequence
        skipped = counted - (counted - padding.long())[start]
        return torch.where(padding, self.config.pad_id, at + self.shift - skipped).view_as(ids)

    def head_keys(self) -> dict[str, str | Entry]:
        return {
            "masked": "lm_head",
            "masked.dense": "lm_head.dense",
            "masked.norm": "lm_head.layer_norm",
            "output": "lm_head.decoder",
        }

    def tied_keys(self) -> dict[str, str]:
        twins = {"lm_head.decoder.bias": "lm_head.bias"}
        words = {"lm_head.decoder.weight": f"{self.prefix}embeddings.word_embeddings.weight"}
        return twins | (words if self.output is None else {})


_TINY = Config(320, 32, 2, 4, 48, 128)

PRESETS = {
    "tiny": _TINY,
    "tiny-xlm": replace(_TINY, variant="xlm-roberta", n_heads=2, pad_id=0, activation="gelu_new"),
    "tiny-untied": replace(_TINY, tied=False),
    "roberta-base": Config(50265, 768, 12, 12, 3072, 512),
    "roberta-large": Config(50265, 1024, 24, 16, 4096, 512),
    "xlm-roberta-base": Config(250002, 768, 12, 12, 3072, 512, variant="xlm-roberta"),
}
