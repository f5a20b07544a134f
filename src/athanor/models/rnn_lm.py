"""A recurrent language model: an embedding, layers of one cell (RNN, LSTM or GRU), and an output embedding, which may be tied.

Sources: Mikolov et al. 2010; Zaremba, Sutskever and Vinyals 2014 (arXiv 1409.2329); tied embeddings, with a projection where the
widths differ: Press and Wolf 2017, Inan et al. 2017.
Legend: B batch, T time, V vocabulary, E width of the embeddings, D hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from athanor.core.errors import ConfigError
from athanor.models.base import CausalLM
from athanor.models.fields import Fields
from athanor.models.keys import Entry
from athanor.nn.cache import State
from athanor.nn.context import Context
from athanor.nn.recurrent import CELLS, Recurrent


@dataclass(frozen=True)
class Config:
    """Shape of a recurrent language model.

    vocab_size     V
    d_hidden       D
    n_layers       recurrent layers
    cell           "rnn", "lstm" or "gru"
    d_embedding    E; 0 is D. Where it is not D, a tied output embedding is reached through a projection from D to E
    tied           whether the output embedding is the input embedding
    max_positions  longest sequence that is taken; nothing in the model depends on it
    """

    vocab_size: int
    d_hidden: int = 256
    n_layers: int = 2
    cell: str = "lstm"
    d_embedding: int = 0
    tied: bool = True
    max_positions: int = 1_000_000

    def __post_init__(self) -> None:
        if not self.d_embedding:
            object.__setattr__(self, "d_embedding", self.d_hidden)
        for name in ("vocab_size", "d_hidden", "n_layers", "d_embedding", "max_positions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.cell not in CELLS:
            raise ConfigError(f"cell ({self.cell!r}) must be one of {', '.join(CELLS)}: lstm is usual")

    @property
    def d_model(self) -> int:
        return self.d_hidden

    def to_hf(self) -> dict[str, Any]:
        """The fields of config.json, named as Hugging Face names the like; transformers has no such model."""
        return {
            "architectures": ["RnnLM"],
            "model_type": "rnn_lm",
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_hidden,
            "embedding_size": self.d_embedding,
            "num_hidden_layers": self.n_layers,
            "cell": self.cell,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.max_positions,
        }

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Config:
        """From the fields of config.json. Raises CheckpointError where one is missing or of the wrong kind."""
        fields = Fields(values, "rnn_lm")
        return cls(
            fields.int("vocab_size"),
            fields.int("hidden_size"),
            fields.count("num_hidden_layers"),
            fields.str("cell"),
            fields.int("embedding_size", 0),
            fields.bool("tie_word_embeddings", True),
            fields.int("max_position_embeddings", 1_000_000),
        )


_TINY = Config(320, 32)
_WIKITEXT_2 = 33278  # words of its vocabulary

PRESETS = {
    "tiny": _TINY,
    "tiny-untied": replace(_TINY, tied=False),
    "tiny-projected": replace(_TINY, d_embedding=24),
    "tiny-gru": replace(_TINY, cell="gru"),
    "tiny-gru-untied": replace(_TINY, cell="gru", d_embedding=20, tied=False),
    "tiny-rnn": replace(_TINY, cell="rnn"),
    "tiny-rnn-untied": replace(_TINY, cell="rnn", n_layers=3, tied=False),
    "lstm-200": Config(_WIKITEXT_2, 200, tied=False),  # the "small" and "medium" ones of Zaremba et al., section 4.1
    "lstm-650": Config(_WIKITEXT_2, 650, tied=False),
    "lstm-650-tied": Config(_WIKITEXT_2, 650),
}


class Model(CausalLM):
    """The model; see the module docstring. Logits have a bias."""

    model_type = "rnn_lm"
    prefix = "rnn."
    lm_modules = ("projection", "output", "bias")
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        c = config
        self.embedding = nn.Embedding(c.vocab_size, c.d_embedding)
        widths = [c.d_embedding, *[c.d_hidden] * (c.n_layers - 1)]
        self.layers = nn.ModuleList(Recurrent(c.cell, width, c.d_hidden) for width in widths)
        projects = c.tied and c.d_embedding != c.d_hidden
        self.projection = nn.Linear(c.d_hidden, c.d_embedding, bias=False) if projects else None
        self.output = None if c.tied else nn.Linear(c.d_hidden, c.vocab_size, bias=False)
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(c.vocab_size))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights.

        | weight                     | distribution                                  |
        | -------------------------- | --------------------------------------------- |
        | embedding, output          | uniform in +-0.1                              |
        | projection                 | uniform in +-1/sqrt(D)                        |
        | cells                      | as `Recurrent.initialise` says                |
        | bias of the output         | zero                                          |
        """
        for layer in self._cells():
            layer.initialise(generator)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif not name.startswith("layers."):
                bound = 0.1 if name.startswith(("embedding", "output")) else self.config.d_hidden**-0.5
                p.uniform_(-bound, bound, generator=generator)

    def _cells(self) -> list[Recurrent]:
        return [layer for layer in self.layers if isinstance(layer, Recurrent)]

    def hidden(self, ids: Tensor, ctx: Context) -> Tensor:  # (B, T) -> (B, T, D)
        x: Tensor = self.embedding(ids)
        for layer, cell in enumerate(self._cells()):
            x = ctx.scan(layer, cell, x)
        return x

    def to_output(self, hidden: Tensor) -> Tensor:
        return hidden if self.projection is None else self.projection(hidden)

    @property
    def output_weight(self) -> Tensor:
        return self.embedding.weight if self.output is None else self.output.weight

    @property
    def output_bias(self) -> Tensor | None:
        return self.bias

    def cache_layers(self) -> list[State]:
        return [State(layer.state_width) for layer in self._cells()]

    def keys(self) -> dict[str, str | Entry]:
        out: dict[str, str | Entry] = {"embedding": "rnn.embedding", "projection": "projection", "output": "output", "": ""}
        return out | {f"layers.{i}.kernel": f"rnn.layers.{i}" for i in range(self.config.n_layers)}

    def tied_keys(self) -> dict[str, str]:
        return {"output.weight": "rnn.embedding.weight"} if self.output is None and self.projection is None else {}
