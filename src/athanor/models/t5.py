"""T5 (Raffel et al. 2020), versions 1.0 and 1.1: pre-norm encoder and decoder whose only positions are biases of the scores.

Legend: B batch, S time of a source, T of an answer, D width (d_model), V vocabulary, H heads, K head width, F feed-forward width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from athanor.core.errors import CheckpointError, ConfigError
from athanor.models.base import EncoderDecoder
from athanor.models.fields import Fields
from athanor.models.keys import Entry, Fused
from athanor.nn.attention import Attention, CrossAttention
from athanor.nn.cache import KV
from athanor.nn.context import Context
from athanor.nn.feedforward import FeedForward, GatedFeedForward
from athanor.nn.norms import RMSNorm
from athanor.nn.relative import RelativeBias
from athanor.nn.sdpa import Scoring

# By `feed_forward_proj`: whether there is a gate, and the activation.
_FEED_FORWARD = {
    "relu": (False, "relu"),
    "gelu": (False, "gelu"),
    "gated-gelu": (True, "gelu_new"),
    "gated-silu": (True, "silu"),
    "gated-relu": (True, "relu"),
}


@dataclass(frozen=True)
class Config:
    """Shape of a T5.

    vocab_size        V
    d_model           D
    n_layers          blocks of the encoder
    n_decoder_layers  blocks of the decoder; 0 is as many
    n_heads           H
    head_dim          K; H K need not be D
    d_ff              F
    feed_forward      "relu" (1.0), "gated-gelu" (1.1), or another of their kind
    n_buckets         of relative positions
    max_distance      from which on relative positions share a bucket
    norm_eps          added to the mean square in RMSNorm
    tied              whether the output embedding is the input embedding, and the decoder's result scaled by 1/sqrt(D) for it
    max_positions     longest source and answer that are taken; nothing in the model depends on it
    """

    vocab_size: int
    d_model: int = 256
    n_layers: int = 4
    n_decoder_layers: int = 0
    n_heads: int = 4
    head_dim: int = 64
    d_ff: int = 1024
    feed_forward: str = "relu"
    n_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    tied: bool = True
    max_positions: int = 512

    def __post_init__(self) -> None:
        if not self.n_decoder_layers:
            object.__setattr__(self, "n_decoder_layers", self.n_layers)
        sizes = ("vocab_size", "d_model", "n_layers", "n_decoder_layers", "n_heads", "head_dim", "d_ff", "max_positions")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.feed_forward not in _FEED_FORWARD:
            raise ConfigError(f"feed_forward ({self.feed_forward!r}) must be one of {', '.join(_FEED_FORWARD)}")
        if self.n_buckets < 4 or self.n_buckets % 4:
            raise ConfigError(f"n_buckets ({self.n_buckets}) must be a positive multiple of 4: 32 is usual")
        if self.max_distance <= self.n_buckets // 2:
            raise ConfigError(
                f"max_distance ({self.max_distance}) must be above n_buckets / 2 ({self.n_buckets // 2}), up to which each"
                " distance has its own bucket: 128 is usual"
            )
        if not self.norm_eps > 0:
            raise ConfigError(f"norm_eps ({self.norm_eps}) must be positive: 1e-6 is usual")

    def to_hf(self) -> dict[str, Any]:
        """The fields of Hugging Face's T5Config."""
        return {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "is_encoder_decoder": True,
            "vocab_size": self.vocab_size,
            "d_model": self.d_model,
            "num_layers": self.n_layers,
            "num_decoder_layers": self.n_decoder_layers,
            "num_heads": self.n_heads,
            "d_kv": self.head_dim,
            "d_ff": self.d_ff,
            "feed_forward_proj": self.feed_forward,
            "relative_attention_num_buckets": self.n_buckets,
            "relative_attention_max_distance": self.max_distance,
            "layer_norm_epsilon": self.norm_eps,
            "tie_word_embeddings": self.tied,
            "n_positions": self.max_positions,
        }

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Config:
        """From the fields of config.json. Raises CheckpointError for what this file does not compute."""
        fields = Fields(values, "t5", ALIASES | {"head_dim": "d_kv"})
        fields.only("feed_forward_proj", *_FEED_FORWARD)
        feed_forward = fields.str("feed_forward_proj", "relu")
        gated, activation = _FEED_FORWARD[feed_forward]
        for name, said in (("dense_act_fn", activation), ("is_gated_act", gated)):
            if fields.get(name, said) != said:
                raise CheckpointError(
                    f"config.json: {name} is {fields.get(name)!r} and must be {said!r} where feed_forward_proj is"
                    f" {feed_forward!r} (or absent, for 'relu'): remove the one that is wrong"
                )
        tied = fields.bool("tie_word_embeddings", True)
        if "scale_decoder_outputs" in values:  # transformers 5 writes the other as true always, and reads null here as false
            tied = fields.bool("scale_decoder_outputs", False)
        return cls(**common(fields), feed_forward=feed_forward, tied=tied)


# Of T5 and Switch Transformers.
ALIASES = {"hidden_size": "d_model", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}


def common(fields: Fields) -> dict[str, Any]:
    """The arguments of `Config` from the fields that T5 and Switch Transformers have in common."""
    if not re.search("EncoderModel|ForTokenClassification", str(fields.get("architectures", ""))):  # they have no decoder
        fields.only("is_encoder_decoder", True)
    return {
        "vocab_size": fields.int("vocab_size"),
        "d_model": fields.width("d_model"),
        "n_layers": fields.count("num_layers"),
        "n_decoder_layers": fields.count("num_decoder_layers", 0),
        "n_heads": fields.count("num_heads"),
        "head_dim": fields.width("d_kv"),
        "d_ff": fields.int("d_ff"),
        "n_buckets": fields.int("relative_attention_num_buckets", 32),
        "max_distance": fields.int("relative_attention_max_distance", 128),
        "norm_eps": fields.float("layer_norm_epsilon", 1e-6),
        "max_positions": fields.int("n_positions", 512),
    }


class Block(nn.Module):
    """x + attention(norm(x)), in a decoder x + cross(norm(x)), then x + feed_forward(norm(x)).

    Args:
        config: of the model.
        feed_forward: of this block.
        decoder: whether it reads a memory.
    """

    def __init__(self, config: Config, feed_forward: nn.Module, decoder: bool) -> None:
        super().__init__()
        c = config
        self.attention_norm = RMSNorm(c.d_model, c.norm_eps)
        self.attention = Attention(c.d_model, c.n_heads, c.n_heads, c.head_dim)
        self.cross_norm = RMSNorm(c.d_model, c.norm_eps) if decoder else None
        self.cross = CrossAttention(c.d_model, c.n_heads, c.head_dim, scoring=Scoring(scale=1.0)) if decoder else None
        self.feed_forward_norm = RMSNorm(c.d_model, c.norm_eps)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, ctx: Context, layer: int, scoring: Scoring) -> Tensor:
        x = x + self.attention(self.attention_norm(x), ctx, layer, scoring=scoring)
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.cross(self.cross_norm(x), ctx, layer)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Stack(nn.Module):
    """Blocks that share one table of relative positions, and a final norm."""

    def __init__(self, config: Config, blocks: Sequence[nn.Module], decoder: bool) -> None:
        super().__init__()
        self.relative = RelativeBias(config.n_buckets, config.n_heads, config.max_distance, both_sides=not decoder)
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.d_model, config.norm_eps)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:  # (B, T, D) -> (B, T, D)
        scoring = Scoring(scale=1.0, bias=self.relative.for_call())
        for layer, block in enumerate(self.blocks):
            x = block(x, ctx, layer, scoring)
        return self.norm(x)


class Model(EncoderDecoder):
    """The model; see the module docstring."""

    model_type = "t5"
    harmless = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)
    float16 = False  # transformers clamps what the blocks add, and keeps half of each feed-forward block in float32
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        c = config
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.encoder = Stack(c, [self.block(i, decoder=False) for i in range(c.n_layers)], decoder=False)
        self.decoder = Stack(c, [self.block(i, decoder=True) for i in range(c.n_decoder_layers)], decoder=True)
        self.head = None if c.tied else nn.Linear(c.d_model, c.vocab_size, bias=False)

    def block(self, layer: int, decoder: bool) -> nn.Module:
        """A fresh block of the encoder or of the decoder."""
        gated, activation = _FEED_FORWARD[self.config.feed_forward]
        kind = GatedFeedForward if gated else FeedForward
        return Block(self.config, kind(self.config.d_model, self.config.d_ff, activation, bias=False), decoder)

    def become(self, architecture: str, holds: Callable[[str], bool]) -> None:
        if architecture.endswith("EncoderModel"):
            raise CheckpointError(
                f"config.json: architectures names {architecture!r}, which has no decoder, and a {self.model_type} is read whole:"
                " use a checkpoint of the whole model, whose encoder `encode` runs alone"
            )
        super().become(architecture, holds)
        if not holds("lm_head.weight"):  # transformers 5 ties the output even where it does not scale for it
            self.head = None
        if self.token_ids.decoder_start is None:  # answers of this family begin with padding
            self.token_ids = replace(self.token_ids, decoder_start=self.token_ids.pad)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights: normal, with the standard deviations of the authors' code.

        | weight                  | standard deviation        |
        | ----------------------- | ------------------------- |
        | embeddings              | 1 (an untied output: 1/sqrt(D)) |
        | query                   | 1/sqrt(D K)               |
        | key, value, up, gate    | 1/sqrt(D)                 |
        | attention's output      | 1/sqrt(H K)               |
        | down                    | 1/sqrt(F)                 |
        | relative positions      | 1/sqrt(D)                 |
        """
        c = self.config
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                p.fill_(1.0)
                continue
            std = c.d_model**-0.5
            if name.startswith("embedding"):
                std = 1.0
            elif name.endswith("out.weight"):
                std = (c.n_heads * c.head_dim) ** -0.5
            elif name.endswith(("down.weight", "down")):
                std = c.d_ff**-0.5
            p.normal_(std=std, generator=generator)
            if name.endswith("qkv.weight"):
                p[: c.n_heads * c.head_dim] *= c.head_dim**-0.5
            elif name.endswith("query.weight"):
                p.mul_(c.head_dim**-0.5)

    def encode(self, ids: Tensor, ctx: Context) -> Tensor:  # (B, S) -> (B, S, D)
        encoded: Tensor = self.encoder(self.embedding(ids), ctx)
        return encoded

    def hidden(self, ids: Tensor, ctx: Context) -> Tensor:  # (B, T) -> (B, T, D)
        hidden: Tensor = self.decoder(self.embedding(ids), ctx)
        return hidden

    def to_output(self, hidden: Tensor) -> Tensor:
        return hidden * self.config.d_model**-0.5 if self.config.tied else hidden

    @property
    def output_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def cache_layers(self) -> list[KV]:
        return [KV(self.config.n_heads, self.config.head_dim, self.config.head_dim)] * self.config.n_decoder_layers

    def cross_layers(self) -> list[KV]:
        return self.cache_layers()

    def keys(self) -> dict[str, str | Entry]:
        out: dict[str, str | Entry] = {"embedding": "shared", "head": "lm_head"}
        for stack, n in (("encoder", self.config.n_layers), ("decoder", self.config.n_decoder_layers)):
            out[f"{stack}.relative"] = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
            out[f"{stack}.norm"] = f"{stack}.final_layer_norm"
            for i in range(n):
                out |= self.block_keys(i, f"{stack}.blocks.{i}.", f"{stack}.block.{i}.layer.", stack == "decoder")
        return out

    def block_keys(self, layer: int, ours: str, theirs: str, decoder: bool) -> dict[str, str | Entry]:
        """The key map of one block; `theirs` ends before the number of the sub-layer."""
        inner = self.config.n_heads * self.config.head_dim
        of_self, last = theirs + "0.SelfAttention.", theirs + ("2." if decoder else "1.")
        out: dict[str, str | Entry] = {
            ours + "attention_norm": theirs + "0.layer_norm",
            ours + "attention.qkv": Fused(tuple(of_self + x for x in "qkv"), (inner,) * 3),
            ours + "attention.out": of_self + "o",
            ours + "feed_forward_norm": last + "layer_norm",
        }
        if decoder:
            across = theirs + "1.EncDecAttention."
            out |= {
                ours + "cross_norm": theirs + "1.layer_norm",
                ours + "cross.query": across + "q",
                ours + "cross.kv": Fused((across + "k", across + "v"), (inner,) * 2),
                ours + "cross.out": across + "o",
            }
        return out | self.feed_forward_keys(layer, ours + "feed_forward.", last)

    def feed_forward_keys(self, layer: int, ours: str, theirs: str) -> dict[str, str | Entry]:
        """The key map of the feed-forward block of one block."""
        dense = theirs + "DenseReluDense."
        if _FEED_FORWARD[self.config.feed_forward][0]:
            up: dict[str, str | Entry] = {ours + "gate_up": Fused((dense + "wi_0", dense + "wi_1"), (self.config.d_ff,) * 2)}
        else:
            up = {ours + "up": dense + "wi"}
        return up | {ours + "down": dense + "wo"}

    def tied_keys(self) -> dict[str, str]:
        twins = {f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")}
        return twins | ({"lm_head.weight": "shared.weight"} if self.head is None else {})


_TINY = Config(320, 32, 2, 0, 4, 8, 48, max_positions=128, n_buckets=8, max_distance=16)

PRESETS = {
    "tiny": _TINY,
    "tiny-gated": replace(
        _TINY, n_layers=3, n_decoder_layers=2, head_dim=12, feed_forward="gated-gelu", norm_eps=1e-3, n_buckets=12
    ),
    "t5-small": Config(32128, 512, 6, 6, 8, 64, 2048),
    "t5-base": Config(32128, 768, 12, 12, 12, 64, 3072),
    "t5-v1.1-small": Config(32128, 512, 8, 8, 6, 64, 1024, "gated-gelu", tied=False),
    "flan-t5-base": Config(32128, 768, 12, 12, 12, 64, 2048, "gated-gelu", tied=False),
}
