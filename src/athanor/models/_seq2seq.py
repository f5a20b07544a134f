"""What encoder-decoders with absolute positions have in common: BART, Pegasus and the Transformer of 2017.

Legend: B batch, S time of a source, T of an answer, D width (d_model), V vocabulary, H heads, K head width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from athanor.core.errors import ConfigError
from athanor.models.base import EncoderDecoder
from athanor.models.fields import Fields
from athanor.models.keys import Entry, Fused
from athanor.nn.attention import Attention, CrossAttention
from athanor.nn.cache import KV
from athanor.nn.context import Context
from athanor.nn.feedforward import ACTIVATIONS, FeedForward


@dataclass(frozen=True)
class Config:
    """Shape of an encoder-decoder.

    vocab_size       V
    d_model          D
    n_layers         blocks of the encoder
    n_heads          H of the encoder; divides d_model
    d_ff             F of the encoder
    n_decoder_layers, n_decoder_heads, d_decoder_ff  of the decoder; 0 is as in the encoder
    max_positions    longest source and answer
    activation       of the feed-forward blocks
    scaled           whether embeddings are multiplied by sqrt(D)
    tied             whether the output embedding is the input embedding
    """

    vocab_size: int
    d_model: int = 256
    n_layers: int = 4
    n_heads: int = 4
    d_ff: int = 1024
    n_decoder_layers: int = 0
    n_decoder_heads: int = 0
    d_decoder_ff: int = 0
    max_positions: int = 1024
    activation: str = "gelu"
    scaled: bool = False
    tied: bool = True

    absolute_positions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for ours, other in (("n_decoder_layers", "n_layers"), ("n_decoder_heads", "n_heads"), ("d_decoder_ff", "d_ff")):
            if not getattr(self, ours):
                object.__setattr__(self, ours, getattr(self, other))
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "n_decoder_layers", "n_decoder_heads", "d_decoder_ff")
        for name in (*sizes, "max_positions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be at least 1")
        for name in ("n_heads", "n_decoder_heads"):
            heads = getattr(self, name)
            if self.d_model % heads:
                fits = [h for h in range(1, self.d_model + 1) if self.d_model % h == 0]
                near = sorted(sorted(fits, key=lambda h: abs(h - heads))[:2])
                raise ConfigError(f"{name} ({heads}) must divide d_model ({self.d_model}): use {' or '.join(map(str, near))}")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation ({self.activation!r}) must be one of {', '.join(ACTIVATIONS)}")

    def to_hf(self) -> dict[str, Any]:
        """The fields of Hugging Face's config.json that BART and its like have in common."""
        return {
            "is_encoder_decoder": True,
            "vocab_size": self.vocab_size,
            "d_model": self.d_model,
            "encoder_layers": self.n_layers,
            "encoder_attention_heads": self.n_heads,
            "encoder_ffn_dim": self.d_ff,
            "decoder_layers": self.n_decoder_layers,
            "decoder_attention_heads": self.n_decoder_heads,
            "decoder_ffn_dim": self.d_decoder_ff,
            "max_position_embeddings": self.max_positions,
            "activation_function": self.activation,
            "scale_embedding": self.scaled,
            "tie_word_embeddings": self.tied,
        }


# Of BART and Pegasus.
ALIASES = {
    "hidden_size": "d_model", "num_hidden_layers": "encoder_layers", "num_attention_heads": "encoder_attention_heads",
}  # fmt: skip


def common(fields: Fields) -> dict[str, Any]:
    """The arguments of `Config` from the fields that BART and its like have in common."""
    fields.only("activation_function", *ACTIVATIONS)
    return {
        "vocab_size": fields.int("vocab_size"),
        "d_model": fields.width("d_model"),
        "n_layers": fields.count("encoder_layers"),
        "n_heads": fields.count("encoder_attention_heads"),
        "d_ff": fields.int("encoder_ffn_dim"),
        "n_decoder_layers": fields.count("decoder_layers"),
        "n_decoder_heads": fields.count("decoder_attention_heads"),
        "d_decoder_ff": fields.int("decoder_ffn_dim"),
        "max_positions": fields.int("max_position_embeddings", 1024),
        "activation": fields.str("activation_function", "gelu"),
        "scaled": fields.bool("scale_embedding", False),
        "tied": fields.bool("tie_word_embeddings", True),
    }


class Block(nn.Module):
    """Attention, in a decoder attention to the memory, and a feed-forward block, each added to what it reads.

    The norm stands after each sum (post-norm, Vaswani et al. 2017) or before each sub-layer (pre-norm).
    """

    def __init__(self, dim: int, n_heads: int, hidden: int, activation: str, decoder: bool, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.attention = Attention(dim, n_heads, n_heads, dim // n_heads, bias=True, out_bias=True)
        self.attention_norm = nn.LayerNorm(dim)
        self.cross = CrossAttention(dim, n_heads, dim // n_heads, bias=True) if decoder else None
        self.cross_norm = nn.LayerNorm(dim) if decoder else None
        self.feed_forward = FeedForward(dim, hidden, activation)
        self.feed_forward_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, ctx: Context, layer: int) -> Tensor:  # (B, T, D) -> (B, T, D)
        if self.pre_norm:
            x = x + self.attention(self.attention_norm(x), ctx, layer)
            if self.cross is not None and self.cross_norm is not None:
                x = x + self.cross(self.cross_norm(x), ctx, layer)
            return x + self.feed_forward(self.feed_forward_norm(x))
        x = self.attention_norm(x + self.attention(x, ctx, layer))
        if self.cross is not None and self.cross_norm is not None:
            x = self.cross_norm(x + self.cross(x, ctx, layer))
        return self.feed_forward_norm(x + self.feed_forward(x))


class Stack(nn.Module):
    """Positions added to embeddings, a norm of the sum (BART), blocks, and a final norm (Pegasus).

    Args:
        config: of the model.
        positions: table of positions, called with positions (B, T) -> (B, T, D).
        decoder: whether it reads a memory.
        embedding_norm, pre_norm, final_norm: where the norms are.
    """

    def __init__(
        self,
        config: Config,
        positions: nn.Module,
        decoder: bool,
        *,
        embedding_norm: bool = False,
        pre_norm: bool = False,
        final_norm: bool = False,
    ) -> None:
        super().__init__()
        c = config
        n, heads, hidden = (c.n_decoder_layers, c.n_decoder_heads, c.d_decoder_ff) if decoder else (c.n_layers, c.n_heads, c.d_ff)
        self.positions = positions
        self.embedding_norm = nn.LayerNorm(c.d_model) if embedding_norm else None
        self.blocks = nn.ModuleList(Block(c.d_model, heads, hidden, c.activation, decoder, pre_norm) for _ in range(n))
        self.norm = nn.LayerNorm(c.d_model) if final_norm else None

    def forward(self, x: Tensor, ctx: Context) -> Tensor:  # (B, T, D) -> (B, T, D)
        x = x + self.positions(ctx.positions)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, ctx, layer)
        return x if self.norm is None else self.norm(x)


class Model(EncoderDecoder):
    """An encoder-decoder whose stacks a subclass makes."""

    prefix = "model."
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = self.stack(decoder=False)
        self.decoder = self.stack(decoder=True)
        self.head = None if config.tied else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.scale = config.d_model**0.5 if config.scaled else 1.0

    def stack(self, decoder: bool) -> Stack:
        """The encoder or the decoder."""
        raise NotImplementedError  # every family defines it

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights: matrices and embeddings normal with std 0.02, norms one, biases zero; sinusoids stay."""
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                p.fill_(1.0)
            elif name.endswith("bias"):
                p.zero_()
            elif p.requires_grad:
                p.normal_(std=0.02, generator=generator)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings, scaled: (B, T) -> (B, T, D)."""
        embedded: Tensor = self.embedding(ids)
        return embedded if self.scale == 1 else embedded * self.scale

    def encode(self, ids: Tensor, ctx: Context) -> Tensor:  # (B, S) -> (B, S, D)
        encoded: Tensor = self.encoder(self.embed(ids), ctx)
        return encoded

    def hidden(self, ids: Tensor, ctx: Context) -> Tensor:  # (B, T) -> (B, T, D)
        hidden: Tensor = self.decoder(self.embed(ids), ctx)
        return hidden

    @property
    def output_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def cache_layers(self) -> Sequence[KV]:
        width = self.config.d_model // self.config.n_decoder_heads
        return [KV(self.config.n_decoder_heads, width, width)] * self.config.n_decoder_layers

    def cross_layers(self) -> Sequence[KV]:
        return self.cache_layers()

    def keys(self) -> dict[str, str | Entry]:
        out: dict[str, str | Entry] = {"embedding": "model.shared", "head": "lm_head", "": ""}
        for stack, n in (("encoder", self.config.n_layers), ("decoder", self.config.n_decoder_layers)):
            theirs = f"model.{stack}."
            out[f"{stack}.positions"] = theirs + "embed_positions"
            out[f"{stack}.embedding_norm"] = theirs + "layernorm_embedding"
            out[f"{stack}.norm"] = theirs + "layer_norm"
            for i in range(n):
                out |= self.block_keys(f"{stack}.blocks.{i}.", f"{theirs}layers.{i}.")
        return out

    def block_keys(self, ours: str, theirs: str) -> dict[str, str | Entry]:
        """The key map of one block."""
        d = self.config.d_model
        of_self, across = theirs + "self_attn.", theirs + "encoder_attn."
        return {
            ours + "attention.qkv": Fused(tuple(f"{of_self}{x}_proj" for x in "qkv"), (d,) * 3),
            ours + "attention.out": of_self + "out_proj",
            ours + "attention_norm": theirs + "self_attn_layer_norm",
            ours + "cross.query": across + "q_proj",
            ours + "cross.kv": Fused((across + "k_proj", across + "v_proj"), (d,) * 2),
            ours + "cross.out": across + "out_proj",
            ours + "cross_norm": theirs + "encoder_attn_layer_norm",
            ours + "feed_forward.up": theirs + "fc1",
            ours + "feed_forward.down": theirs + "fc2",
            ours + "feed_forward_norm": theirs + "final_layer_norm",
        }

    def tied_keys(self) -> dict[str, str]:
        words = "model.shared.weight"
        twins = {f"model.{stack}.embed_tokens.weight": words for stack in ("encoder", "decoder")}
        return twins | ({"lm_head.weight": words} if self.head is None else {})
