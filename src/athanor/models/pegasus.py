"""Pegasus (Zhang et al. 2020): pre-norm encoder and decoder that share their embeddings, with positions that are not learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from athanor.core.errors import ConfigError
from athanor.models import _seq2seq, bart
from athanor.models.fields import Fields
from athanor.nn.positions import sinusoids


@dataclass(frozen=True)
class Config(bart.Config):
    """Shape of a Pegasus: what every encoder-decoder with absolute positions has (`_seq2seq.Config`), always tied."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % 2:
            raise ConfigError(f"d_model ({self.d_model}) must be even, for a sine and a cosine each: use {self.d_model + 1}")

    def to_hf(self) -> dict[str, Any]:
        """The fields of Hugging Face's PegasusConfig."""
        return {"architectures": ["PegasusForConditionalGeneration"], "model_type": "pegasus"} | _seq2seq.Config.to_hf(self)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Config:
        """From the fields of config.json. Raises CheckpointError for what this file does not compute."""
        fields = Fields(values, "pegasus", _seq2seq.ALIASES)
        fields.only("normalize_before", True)
        fields.only("add_final_layer_norm", True)
        fields.only("normalize_embedding", False)
        return cls(**_seq2seq.common(fields))


class Sinusoids(nn.Module):
    """A table of sines, then cosines, that stands in newer files though it is never learned."""

    def __init__(self, max_positions: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_positions, dim), requires_grad=False)
        self.fill()

    @torch.no_grad()
    def fill(self) -> None:
        """Compute the table."""
        rows, dim = self.weight.shape
        self.weight.copy_(sinusoids(rows, dim, interleaved=False))

    def forward(self, positions: Tensor) -> Tensor:  # (B, T) -> (B, T, D)
        return self.weight[positions]


class Computed(nn.Module):
    """The same table where a file lacks it."""

    table: Tensor

    def __init__(self, max_positions: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("table", sinusoids(max_positions, dim, interleaved=False), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:  # (B, T) -> (B, T, D)
        return self.table[positions]


class Model(bart.Model):
    """The model; see the module docstring."""

    model_type = "pegasus"
    config: Config

    def stack(self, decoder: bool) -> _seq2seq.Stack:
        positions = Sinusoids(self.config.max_positions, self.config.d_model)
        return _seq2seq.Stack(self.config, positions, decoder, pre_norm=True, final_norm=True)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights, as every encoder-decoder with absolute positions has, and the table of sinusoids."""
        super().initialise(generator)
        for module in self.modules():
            if isinstance(module, Sinusoids):
                module.fill()

    def become(self, architecture: str, holds: Callable[[str], bool]) -> None:
        super().become(architecture, holds)
        for name in ("encoder", "decoder"):
            if not holds(f"model.{name}.embed_positions.weight"):
                getattr(self, name).positions = Computed(self.config.max_positions, self.config.d_model)


_TINY = Config(320, 32, 2, 4, 48, max_positions=128, activation="relu")

PRESETS = {
    "tiny": _TINY,
    "tiny-scaled": replace(_TINY, n_heads=2, n_decoder_layers=3, n_decoder_heads=4, d_decoder_ff=40, scaled=True),
    "pegasus-large": Config(96103, 1024, 16, 16, 4096, activation="relu", scaled=True),
}
