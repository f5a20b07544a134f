"""BERT (Devlin et al. 2019): an encoder of post-norm blocks with learned positions, segments, and heads for masked tokens and
next sentences.

Legend: B batch, T time, D width (d_model), V vocabulary, H heads, K head width, F feed-forward width, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from athanor.core.errors import ConfigError
from athanor.models.base import Encoder
from athanor.models.fields import Fields
from athanor.models.keys import Entry, Fused, entry
from athanor.nn.attention import Attention
from athanor.nn.context import Context
from athanor.nn.feedforward import ACTIVATIONS, FeedForward
from athanor.nn.linear import Linear


@dataclass(frozen=True)
class Config:
    """Shape of a BERT.

    vocab_size     V
    d_model        D
    n_layers       blocks
    n_heads        H; divides d_model
    d_ff           F
    max_positions  longest sequence, its [CLS] and [SEP] among it
    n_segments     kinds of segments
    norm_eps       added to the variance in LayerNorm
    activation     of the feed-forward block and of the masked-token head
    tied           whether the output embedding is the input embedding
    """

    vocab_size: int
    d_model: int = 256
    n_layers: int = 4
    n_heads: int = 4
    d_ff: int = 1024
    max_positions: int = 512
    n_segments: int = 2
    norm_eps: float = 1e-12
    activation: str = "gelu"
    tied: bool = True

    absolute_positions: ClassVar[bool] = True  # learned tables: padding to the left shifts them for others, never for us

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "max_positions", "n_segments"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.d_model % self.n_heads:
            fits = [h for h in range(1, self.d_model + 1) if self.d_model % h == 0]
            near = sorted(sorted(fits, key=lambda h: abs(h - self.n_heads))[:2])
            raise ConfigError(f"n_heads ({self.n_heads}) must divide d_model ({self.d_model}): use {' or '.join(map(str, near))}")
        if not self.norm_eps > 0:
            raise ConfigError(f"norm_eps ({self.norm_eps}) must be positive: 1e-12 is usual")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation ({self.activation!r}) must be one of {', '.join(ACTIVATIONS)}")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    def to_hf(self) -> dict[str, Any]:
        """The fields of Hugging Face's BertConfig."""
        return {
            "architectures": ["BertForMaskedLM"],
            "model_type": "bert",
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "intermediate_size": self.d_ff,
            "max_position_embeddings": self.max_positions,
            "type_vocab_size": self.n_segments,
            "layer_norm_eps": self.norm_eps,
            "hidden_act": self.activation,
            "tie_word_embeddings": self.tied,
        }

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Config:
        """From the fields of config.json. Raises CheckpointError for what this file does not compute."""
        return cls(**common(Fields(values, "bert")))


def common(fields: Fields) -> dict[str, Any]:
    """The arguments of `Config` from the fields that BERT and its descendants have in common."""
    fields.only("position_embedding_type", "absolute")
    fields.only("is_decoder", False)
    fields.only("add_cross_attention", False)
    fields.only("hidden_act", *ACTIVATIONS)
    return {
        "vocab_size": fields.int("vocab_size"),
        "d_model": fields.width("hidden_size"),
        "n_layers": fields.count("num_hidden_layers"),
        "n_heads": fields.count("num_attention_heads"),
        "d_ff": fields.int("intermediate_size"),
        "max_positions": fields.int("max_position_embeddings", 512),
        "n_segments": fields.int("type_vocab_size", 2),
        "norm_eps": fields.float("layer_norm_eps", 1e-12),
        "activation": fields.str("hidden_act", "gelu"),
        "tied": fields.bool("tie_word_embeddings", True),
    }


class Block(nn.Module):
    """norm(x + attention(x)), then norm(x + feed_forward(x))."""

    def __init__(self, config: Config, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.attention_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config.d_model, config.d_ff, config.activation)
        self.feed_forward_norm = nn.LayerNorm(config.d_model, config.norm_eps)

    def forward(self, x: Tensor, ctx: Context, layer: int) -> Tensor:
        x = self.attention_norm(x + self.attention(x, ctx, layer))
        return self.feed_forward_norm(x + self.feed_forward(x))


class MaskedTokens(nn.Module):
    """norm(activation(dense(x))), and the bias of the output."""

    def __init__(self, config: Config, activation: str) -> None:
        super().__init__()
        self.dense = Linear(config.d_model, config.d_model)
        self.norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(x)))


class Model(Encoder):
    """The model; see the module docstring. A file may hold the trunk alone, with or without its pooler, or either head.

    Attributes:
        pooler: D -> D, of the first token; None where the file has none.
        masked: head of masked tokens, or None.
        following: head of next sentences, or None.
    """

    model_type = "bert"
    prefix = "bert."
    lm_modules = ("masked", "output", "following")
    harmless: ClassVar[tuple[str, ...]] = (r"bert\.embeddings\.position_ids", r"embeddings\.position_ids")
    renamed = ((r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))
    shift = 0  # of positions in their table
    head_activation: str | None = None  # of the head of masked tokens, where it is not the config's
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        c = config
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.positions = nn.Embedding(c.max_positions + self.shift, c.d_model)
        self.segments = nn.Embedding(c.n_segments, c.d_model)
        self.embedding_norm = nn.LayerNorm(c.d_model, c.norm_eps)
        self.blocks = nn.ModuleList(Block(c, self.make_attention(layer)) for layer in range(c.n_layers))
        self.pooler: nn.Linear | None = None
        self.masked: MaskedTokens | None = MaskedTokens(c, self.head_activation or c.activation)
        self.output: nn.Linear | None = None if c.tied else nn.Linear(c.d_model, c.vocab_size)
        self.following: nn.Linear | None = None

    def make_attention(self, layer: int) -> nn.Module:
        """The attention of layer `layer`."""
        c = self.config
        return Attention(c.d_model, c.n_heads, c.n_heads, c.head_dim, bias=True, out_bias=True)

    def become(self, architecture: str, holds: Callable[[str], bool]) -> None:
        super().become(architecture, holds)
        if holds(f"{self.prefix}pooler.dense.weight"):
            self.pooler = nn.Linear(self.config.d_model, self.config.d_model)
        if holds("cls.seq_relationship.weight"):
            self.following = nn.Linear(self.config.d_model, 2)
        if self.output is not None and not holds(f"{entry(self.head_keys()['output']).names[0]}.bias"):
            self.output.register_parameter("bias", None)  # older files have one bias, the head's; `to_hf` writes it twice
        if architecture.endswith("ForNextSentencePrediction"):
            self.task = "following"
            self.masked = self.output = None

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights: matrices and embeddings normal with std 0.02, norms one, biases zero (section A.2 of the paper)."""
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                p.fill_(1.0)
            elif name.endswith("bias"):
                p.zero_()
            else:
                p.normal_(std=0.02, generator=generator)

    def hidden(self, ids: Tensor, ctx: Context, segments: Tensor | None = None) -> Tensor:  # (B, T) -> (B, T, D)
        at = self.rows(ids, ctx)
        kinds = self.segments.weight[0] if segments is None else self.segments(segments)
        x = self.embedding_norm(self.embedding(ids) + self.positions(at) + kinds)
        for layer, block in enumerate(self.blocks):
            x = block(x, ctx, layer)
        return x

    def rows(self, ids: Tensor, ctx: Context) -> Tensor:  # (B, T) -> (B, T)
        """Of each token its position in the table."""
        return ctx.positions

    def pooled(self, first: Tensor) -> Tensor:
        """tanh(pooler(h)) of the hidden state h of each sequence's first token: (S, D) -> (S, D)."""
        if self.pooler is None:
            raise ConfigError(f"this {self.model_type} was saved without its pooler: use `hidden`, or a checkpoint that has one")
        return self.pooler(first).tanh()

    def next_sentence(self, first: Tensor) -> Tensor:
        """Logits that the second segment follows the first, and that it does not: (S, D) -> (S, 2)."""
        if self.following is None:
            raise ConfigError(
                f"this {self.model_type} was saved without its head of next sentences: use a checkpoint that has one, such as"
                " BertForPreTraining"
            )
        return self.following(self.pooled(first))

    def to_output(self, hidden: Tensor) -> Tensor:
        assert self.masked is not None
        transformed: Tensor = self.masked(hidden)
        return transformed

    @property
    def output_weight(self) -> Tensor:
        return self.embedding.weight if self.output is None else self.output.weight

    @property
    def output_bias(self) -> Tensor | None:
        # An output of its own has a bias of its own too; transformers then leaves the head's in the file, and out of the sum.
        if self.output is not None and self.output.bias is not None:
            return self.output.bias
        assert self.masked is not None
        return self.masked.bias

    def keys(self) -> dict[str, str | Entry]:
        trunk = self.prefix
        out: dict[str, str | Entry] = {
            "embedding": trunk + "embeddings.word_embeddings",
            "positions": trunk + "embeddings.position_embeddings",
            "segments": trunk + "embeddings.token_type_embeddings",
            "embedding_norm": trunk + "embeddings.LayerNorm",
        }
        for i in range(self.config.n_layers):
            out |= self.block_keys(f"blocks.{i}.", f"{trunk}encoder.layer.{i}.")
        return out | {"pooler": trunk + "pooler.dense"} | self.head_keys()

    def block_keys(self, ours: str, theirs: str) -> dict[str, str | Entry]:
        """The key map of one block."""
        d = self.config.d_model
        of_self = theirs + "attention.self."
        return {
            ours + "attention.qkv": Fused((of_self + "query", of_self + "key", of_self + "value"), (d, d, d)),
            ours + "attention.out": theirs + "attention.output.dense",
            ours + "attention_norm": theirs + "attention.output.LayerNorm",
            ours + "feed_forward.up": theirs + "intermediate.dense",
            ours + "feed_forward.down": theirs + "output.dense",
            ours + "feed_forward_norm": theirs + "output.LayerNorm",
        }

    def head_keys(self) -> dict[str, str | Entry]:
        """The key map of the heads."""
        return {
            "masked": "cls.predictions",
            "masked.dense": "cls.predictions.transform.dense",
            "masked.norm": "cls.predictions.transform.LayerNorm",
            "output": "cls.predictions.decoder",
            "following": "cls.seq_relationship",
        }

    def to_hf(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = super().to_hf(state)
        twin = f"{entry(self.head_keys()['output']).names[0]}.bias"
        original = tensors.get(self.tied_keys()[twin])
        if self.output is not None and self.output.bias is None and original is not None:
            tensors[twin] = original.clone()  # transformers 5 takes an output's own bias for zero where it is missing
        return tensors

    def tied_keys(self) -> dict[str, str]:
        twins = {"cls.predictions.decoder.bias": "cls.predictions.bias"}
        words = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
        return twins | (words if self.output is None else {})


_TINY = Config(320, 32, 2, 4, 48, 128)

PRESETS = {
    "tiny": _TINY,
    "tiny-relu": Config(320, 32, 2, 2, 48, 128, n_segments=3, norm_eps=1e-3, activation="relu"),
    "tiny-untied": replace(_TINY, tied=False),
    "bert-base-uncased": Config(30522, 768, 12, 12, 3072),
    "bert-large-uncased": Config(30522, 1024, 24, 16, 4096),
    "bert-base-chinese": Config(21128, 768, 12, 12, 3072),
    "minilm-l6": Config(30522, 384, 6, 12, 1536),
}
