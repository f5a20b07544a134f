"""A bidirectional LSTM with a conditional random field over tags (Huang, Xu and Yu 2015, arXiv 1508.01991; the word-level part of
Lample et al. 2016, arXiv 1603.01360).

Legend: B batch, T time, S sequences, N tokens, V vocabulary, E width of the embeddings, H width of one direction, K tags.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from athanor.core.errors import CheckpointError, ConfigError
from athanor.models.base import LanguageModel
from athanor.models.fields import Fields
from athanor.models.keys import Entry
from athanor.nn.context import Bidirectional, Context, Sequences
from athanor.nn.crf import CRF, iob2
from athanor.nn.recurrent import Recurrent
from athanor.nn.spans import rows_of


@dataclass(frozen=True)
class Config:
    """Shape of a tagger.

    vocab_size     V, words
    tags           their names, K
    d_embedding    E
    d_hidden       H
    n_layers       layers of the LSTM
    iob2           whether I-x may follow only B-x or I-x
    max_positions  longest sequence that is taken; nothing in the model depends on it
    """

    vocab_size: int
    tags: tuple[str, ...]
    d_embedding: int = 100
    d_hidden: int = 100
    n_layers: int = 1
    iob2: bool = False
    max_positions: int = 1_000_000

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_embedding", "d_hidden", "n_layers", "max_positions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be at least 1")
        if not self.tags:
            raise ConfigError("tags is empty: name at least one tag")
        twice = [tag for i, tag in enumerate(self.tags) if tag in self.tags[:i]]
        if twice:
            raise ConfigError(f"tags names {twice[0]!r} twice: each tag needs a name of its own")
        if self.iob2:
            iob2(self.tags)

    @property
    def n_tags(self) -> int:
        return len(self.tags)

    @property
    def d_model(self) -> int:
        return 2 * self.d_hidden

    def to_hf(self) -> dict[str, Any]:
        """The fields of config.json, named as Hugging Face names the like; transformers has no such model."""
        return {
            "architectures": ["BilstmCrf"],
            "model_type": "bilstm_crf",
            "vocab_size": self.vocab_size,
            "embedding_size": self.d_embedding,
            "hidden_size": self.d_hidden,
            "num_hidden_layers": self.n_layers,
            "iob2": self.iob2,
            "max_position_embeddings": self.max_positions,
            "id2label": {str(i): tag for i, tag in enumerate(self.tags)},
            "label2id": {tag: i for i, tag in enumerate(self.tags)},
        }

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Config:
        """From the fields of config.json. Raises CheckpointError where one is missing or of the wrong kind."""
        fields = Fields(values, "bilstm_crf")
        names = fields.get("id2label")
        numbers = [str(i) for i in range(len(names))] if isinstance(names, dict) else []
        if not numbers or names.keys() != set(numbers) or not all(isinstance(name, str) for name in names.values()):
            raise CheckpointError(
                f"config.json: id2label is {names!r} and must map the numbers from 0 on to names of tags: copy it again"
            )
        return cls(
            fields.int("vocab_size"),
            tuple(names[i] for i in numbers),
            fields.int("embedding_size"),
            fields.int("hidden_size"),
            fields.count("num_hidden_layers"),
            fields.bool("iob2", False),
            fields.int("max_position_embeddings", 1_000_000),
        )


_CONLL = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")

PRESETS = {
    "tiny": Config(320, ("A", "B", "C"), 24, 16, 2),
    "tiny-iob2": Config(320, ("O", "B-X", "I-X", "B-Y", "I-Y"), 24, 16, iob2=True),
    "huang-2015": Config(130_000, _CONLL, 50, 300),  # sections 3 and 4.2: embeddings of Senna, 300 hidden units
    "conll2003": Config(30_000, _CONLL, 100, 100, iob2=True),
}


class Model(LanguageModel):
    """The model; see the module docstring."""

    model_type = "bilstm_crf"
    kind = "tagger"
    task = "tags"
    lm_modules = ()
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        c = config
        self.embedding = nn.Embedding(c.vocab_size, c.d_embedding)
        widths = [c.d_embedding, *[2 * c.d_hidden] * (c.n_layers - 1)]
        self.layers = nn.ModuleList(Recurrent("lstm", width, c.d_hidden, both_ways=True) for width in widths)
        self.emission = nn.Linear(2 * c.d_hidden, c.n_tags)
        self.crf = CRF(c.n_tags, iob2(c.tags) if c.iob2 else None)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights.

        | weight                     | distribution                                             |
        | -------------------------- | -------------------------------------------------------- |
        | embedding                  | uniform in +-sqrt(3/E) (Ma and Hovy 2016, section 3.1)   |
        | emission                   | uniform in +-1/sqrt(2 H)                                 |
        | cells                      | as `Recurrent.initialise` says                           |
        | scores of the CRF, biases  | zero                                                     |
        """
        for layer in self._cells():
            layer.initialise(generator)
        for p in (self.emission.bias, *self.crf.parameters()):
            p.zero_()
        c = self.config
        for weight, bound in ((self.embedding.weight, (3 / c.d_embedding) ** 0.5), (self.emission.weight, c.d_model**-0.5)):
            weight.uniform_(-bound, bound, generator=generator)

    def _cells(self) -> list[Recurrent]:
        return [layer for layer in self.layers if isinstance(layer, Recurrent)]

    def hidden(self, ids: Tensor, ctx: Context) -> Tensor:  # (B, T) -> (B, T, 2 H)
        x: Tensor = self.embedding(ids)
        for layer, cell in enumerate(self._cells()):
            x = ctx.scan(layer, cell, x)
        return x

    def emissions(self, ids: Tensor, ctx: Context) -> Tensor:
        """Scores of each tag at each token: ids (B, T) int64 -> (B, T, K)."""
        scores: Tensor = self.emission(self.hidden(ids, ctx))
        return scores

    def log_likelihood(self, ids: Tensor, tags: Tensor, ctx: Sequences) -> Tensor:
        """log p(tags | ids) of each sequence, in nats: ids and tags (B, T) int64 -> (S,).

        Raises DataError for a tag that is none or that the constraints forbid; tags of padding are not read.
        """
        emissions, lengths = rows_of(self.emissions(ids, ctx), ctx)
        return self.crf.log_likelihood(emissions, rows_of(tags, ctx)[0], lengths)

    def decode(self, ids: Tensor, ctx: Sequences) -> list[list[int]]:
        """The most probable tags of each sequence, S lists; what the constraints forbid never comes out."""
        with torch.no_grad():
            return self.crf.viterbi(*rows_of(self.emissions(ids, ctx), ctx))[0]

    def marginals(self, ids: Tensor, ctx: Sequences) -> Tensor:
        """How probable each tag is at each token: (S, longest, K), zero after a sequence's end."""
        with torch.no_grad():
            return self.crf.marginals(*rows_of(self.emissions(ids, ctx), ctx))

    def forward(self, ids: Tensor) -> Tensor:
        """Emissions of whole sequences of one length: (B, T) -> (B, T, K)."""
        return self.emissions(ids, Bidirectional(ids.shape[0], ids.shape[1], ids.device))

    def keys(self) -> dict[str, str | Entry]:
        out: dict[str, str | Entry] = {"embedding": "embedding", "emission": "emission", "crf": "crf"}
        return out | {f"layers.{i}.kernel": f"layers.{i}" for i in range(self.config.n_layers)}
