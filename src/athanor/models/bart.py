"""BART (Lewis et al. 2020): post-norm encoder and decoder with learned positions, pre-trained to undo noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from athanor.core.errors import ConfigError
from athanor.models import _seq2seq
from athanor.models.fields import Fields

_OFFSET = 2  # the table's first rows are never used


@dataclass(frozen=True)
class Config(_seq2seq.Config):
    """Shape of a BART: what every encoder-decoder with absolute positions has (`_seq2seq.Config`), always tied."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tied:
            raise ConfigError(
                "tied (False) must be True: transformers leaves the embeddings of both stacks apart otherwise, and this model has"
                " one for both"
            )

    def to_hf(self) -> dict[str, Any]:
        """The fields of Hugging Face's BartConfig."""
        return {"architectures": ["BartForConditionalGeneration"], "model_type": "bart"} | super().to_hf()

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Config:
        """From the fields of config.json. Raises CheckpointError for what this file does not compute."""
        fields = Fields(values, "bart", _seq2seq.ALIASES)
        for name in ("normalize_before", "add_final_layer_norm"):
            fields.only(name, False)
        fields.only("normalize_embedding", True)
        return cls(**_seq2seq.common(fields))


class Positions(nn.Embedding):
    """A learned table whose rows begin at an offset."""

    def forward(self, positions: Tensor) -> Tensor:  # (B, T) -> (B, T, D)
        return super().forward(positions + _OFFSET)


class Model(_seq2seq.Model):
    """The model; see the module docstring."""

    model_type = "bart"
    harmless = (r"(?:model\.)?(?:encoder|decoder)\.version",)
    lm_modules = ("head", "final_logits_bias")
    config: Config
    final_logits_bias: Tensor | None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))

    def stack(self, decoder: bool) -> _seq2seq.Stack:
        positions = Positions(self.config.max_positions + _OFFSET, self.config.d_model)
        return _seq2seq.Stack(self.config, positions, decoder, embedding_norm=True)

    def become(self, architecture: str, holds: Callable[[str], bool]) -> None:
        super().become(architecture, holds)
        if self.final_logits_bias is not None and not holds("final_logits_bias"):
            self.final_logits_bias = None

    @property
    def output_bias(self) -> Tensor | None:
        return None if self.final_logits_bias is None else self.final_logits_bias[0]


_TINY = Config(320, 32, 2, 4, 48, max_positions=128)

PRESETS = {
    "tiny": _TINY,
    "tiny-uneven": replace(_TINY, n_decoder_layers=3, n_decoder_heads=2, d_decoder_ff=40, scaled=True, activation="relu"),
    "bart-base": Config(50265, 768, 6, 12, 3072),
    "bart-large": Config(50265, 1024, 12, 16, 4096),
}
