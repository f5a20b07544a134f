"""The Transformer of 2017 (Vaswani et al., arXiv 1706.03762): sinusoidal positions, norms after each sum, one embedding for
sources, answers and output, label smoothing.

transformers has no such model; the tensors of a file are named as BART's are. Legend: B batch, T time, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from athanor.core.errors import ConfigError
from athanor.models import _seq2seq
from athanor.models.fields import Fields
from athanor.nn.positions import sinusoids


@dataclass(frozen=True)
class Config(_seq2seq.Config):
    """Shape of a Transformer: what every encoder-decoder with absolute positions has (`_seq2seq.Config`), and

    label_smoothing  how much of a target's probability training spreads over the vocabulary (section 5.4)
    """

    activation: str = "relu"
    scaled: bool = True
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % 2:
            raise ConfigError(f"d_model ({self.d_model}) must be even, for a sine and a cosine each: use {self.d_model + 1}")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing ({self.label_smoothing}) must lie in [0, 1): 0.1 is usual, 0 is none")

    def to_hf(self) -> dict[str, Any]:
        """The fields of config.json, named as BART's."""
        own = {"architectures": ["Transformer"], "model_type": "transformer", "label_smoothing": self.label_smoothing}
        return own | super().to_hf()

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Config:
        """From the fields of config.json. Raises CheckpointError where one is missing or of the wrong kind."""
        paper = {"activation_function": "relu", "scale_embedding": True}  # where a file says nothing
        fields = Fields(paper | {k: v for k, v in values.items() if v is not None}, "transformer")
        return cls(**_seq2seq.common(fields), label_smoothing=fields.float("label_smoothing", 0.1))


class Positions(nn.Module):
    """Sines and cosines side by side (section 3.5), in no file."""

    table: Tensor

    def __init__(self, max_positions: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("table", sinusoids(max_positions, dim), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:  # (B, T) -> (B, T, D)
        return self.table[positions]


class Model(_seq2seq.Model):
    """The model; see the module docstring. Answers begin with `token_ids.decoder_start`, or with the beginning of a text."""

    model_type = "transformer"
    config: Config

    def stack(self, decoder: bool) -> _seq2seq.Stack:
        return _seq2seq.Stack(self.config, Positions(self.config.max_positions, self.config.d_model), decoder)

    def become(self, architecture: str, holds: Callable[[str], bool]) -> None:
        super().become(architecture, holds)
        if self.token_ids.decoder_start is None:
            self.token_ids = replace(self.token_ids, decoder_start=self.token_ids.bos)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights: matrices uniform as Glorot and Bengio (2010) say, embeddings normal with std 1/sqrt(D), norms one,
        biases zero."""
        d = self.config.d_model
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                p.fill_(1.0)
            elif name.endswith("bias"):
                p.zero_()
            elif name.startswith(("embedding", "head")):
                p.normal_(std=d**-0.5, generator=generator)
            else:
                rows = d if name.endswith(("qkv.weight", "kv.weight")) else p.shape[0]  # several matrices in one
                bound = (6 / (rows + p.shape[1])) ** 0.5
                p.uniform_(-bound, bound, generator=generator)

    @property
    def label_smoothing(self) -> float:
        return self.config.label_smoothing


_TINY = Config(320, 32, 2, 4, 48, max_positions=128)

PRESETS = {
    "tiny": _TINY,
    "tiny-untied": replace(_TINY, tied=False, n_decoder_layers=3, n_decoder_heads=2, d_decoder_ff=40, activation="gelu"),
    "base": Config(37000, 512, 6, 8, 2048),  # Table 3; the vocabulary of section 5.1
    "big": Config(37000, 1024, 6, 16, 4096),
}
