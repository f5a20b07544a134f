"""The pre-norm decoder that most decoder-only families are variants of; an architecture's file says what is different in it.

Legend: B batch, T time, D width (d_model), V vocabulary, H query heads, G key/value heads, K head width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from athanor.core.errors import CheckpointError, ConfigError
from athanor.models.base import CausalLM
from athanor.models.fields import Fields
from athanor.models.keys import Entry, Fused
from athanor.nn import rope
from athanor.nn.attention import Attention, Turn
from athanor.nn.context import Context
from athanor.nn.feedforward import GatedFeedForward
from athanor.nn.norms import RMSNorm
from athanor.nn.positions import Rotary
from athanor.nn.sdpa import PLAIN, Scoring

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Config:
    """Shape of a decoder.

    vocab_size     V
    d_model        D
    n_layers       decoder layers
    n_heads        H, query heads; divides d_model where head_dim is not given
    n_kv_heads     G, key/value heads; divides n_heads
    d_ff           F, width of the feed-forward block
    max_positions  longest sequence
    rope_theta     base of the rotary frequencies
    norm_eps       added to the mean square in RMSNorm
    tied           whether the output embedding is the input embedding
    head_dim       K; 0 is d_model / n_heads
    rope_scaling   what is done to the rotary frequencies for long contexts (`rope.py`)
    """

    vocab_size: int
    d_model: int = 192
    n_layers: int = 4
    n_heads: int = 3
    n_kv_heads: int = 1
    d_ff: int = 512
    max_positions: int = 1024
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = True
    head_dim: int = 0
    rope_scaling: rope.Scaling | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "max_positions"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} ({value}) must be at least 1")
        if not self.head_dim:
            self._derive_head_dim()
        if self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(f"head_dim ({self.head_dim}) must be even and positive for rotary positions: 64 is usual")
        if self.n_heads % self.n_kv_heads:
            fits = [g for g in range(1, self.n_heads + 1) if self.n_heads % g == 0]
            raise ConfigError(
                f"n_kv_heads ({self.n_kv_heads}) must divide n_heads ({self.n_heads}): use one of {', '.join(map(str, fits))}"
            )
        if not self.rope_theta > 0:
            raise ConfigError(f"rope_theta ({self.rope_theta}) must be positive: 10000 is usual")
        if not self.norm_eps > 0:
            raise ConfigError(f"norm_eps ({self.norm_eps}) must be positive: 1e-5 is usual")
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.rotary_dim, self.rope_theta, self.max_positions)

    @property
    def rotary_dim(self) -> int:
        """How many entries of a head are turned."""
        return self.head_dim

    @property
    def cached_positions(self) -> int:
        """Longest sequence that can be generated from a cache: frequencies must not change meanwhile."""
        by = self.rope_scaling
        border = by.original_max_position_embeddings if isinstance(by, rope.ByLength) and not by.constant else self.max_positions
        return min(border, self.max_positions)

    def scoring(self, layer: int) -> Scoring:
        """How layer `layer` scores keys."""
        return PLAIN

    def _derive_head_dim(self) -> None:
        d, h = self.d_model, self.n_heads
        if d % 2:
            raise ConfigError(f"d_model ({d}) must be even for rotary positions: use {d + 1}")
        if d % h:
            fits = [n for n in range(1, d + 1) if d % n == 0 and d // n % 2 == 0]
            near = sorted(sorted(fits, key=lambda n: abs(n - h))[:2])
            raise ConfigError(f"n_heads ({h}) must divide d_model ({d}): use {' or '.join(map(str, near))}")
        if d // h % 2:
            raise ConfigError(
                f"d_model / n_heads ({d} / {h} = {d // h}) must be even for rotary positions: use a d_model of {d + h}"
            )
        object.__setattr__(self, "head_dim", d // h)

    def to_hf(self) -> dict[str, Any]:
        """The fields that Hugging Face's decoders have in common, for readers old (rope_theta, rope_scaling) and new."""
        by = self.rope_scaling
        scaling = {} if by is None else by.to_hf()
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.d_ff,
            "max_position_embeddings": (
                by.original_max_position_embeddings if isinstance(by, rope.DynamicRope) else self.max_positions
            ),
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"} | scaling,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
        } | ({"rope_scaling": scaling} if scaling else {})


@dataclass(frozen=True)
class Windowed(Config):
    """Shape of a decoder whose attention may see only the last positions.

    window  how many, its own among them; None for all
    """

    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window ({self.window}) must be at least 1, or None for attention to all of the past")

    def scoring(self, layer: int) -> Scoring:
        return Scoring(window=self.window)


@dataclass(frozen=True)
class Layered(Windowed):
    """Shape of a decoder some of whose layers have a window.

    layer_types  of each layer "sliding_attention" or "full_attention"; () is sliding for all where there is a window
    """

    layer_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layer_types:
            object.__setattr__(self, "layer_types", (FULL if self.window is None else SLIDING,) * self.n_layers)
        if len(self.layer_types) != self.n_layers:
            raise ConfigError(
                f"layer_types names {len(self.layer_types)} layers and n_layers is {self.n_layers}: name each layer"
            )
        for kind in self.layer_types:
            if kind not in (FULL, SLIDING):
                raise ConfigError(f"layer_types has {kind!r} and may have {FULL!r} and {SLIDING!r}: use one of these")
        if self.window is None and SLIDING in self.layer_types:
            raise ConfigError(f"layer_types has {SLIDING!r} and window is None: say how many positions such a layer sees")

    def slides(self, layer: int) -> bool:
        """Whether layer `layer` has a window."""
        return self.layer_types[layer] == SLIDING

    def scoring(self, layer: int) -> Scoring:
        return Scoring(window=self.window) if self.slides(layer) else PLAIN


def common(fields: Fields, positions: int = 2048, theta: float = 10_000.0) -> dict[str, Any]:
    """The arguments of `Config` from the fields that Hugging Face's decoders have in common.

    Args:
        fields: of config.json.
        positions: `max_position_embeddings` of files that do not say.
        theta: `rope_theta` of files that do not say.
    """
    heads = fields.count("num_attention_heads")
    positions = fields.int("max_position_embeddings", positions)
    rotary = fields.rope(theta)
    theta = rotary.pop("rope_theta")
    by = scaling(rotary, fields.int("original_max_position_embeddings", None), positions)
    return {
        "vocab_size": fields.int("vocab_size"),
        "d_model": fields.width("hidden_size"),
        "n_layers": fields.count("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": fields.count("num_key_value_heads", heads),
        "d_ff": fields.int("intermediate_size"),
        "max_positions": by.longest if isinstance(by, rope.DynamicRope) else positions,
        "rope_theta": theta,
        "norm_eps": fields.float("rms_norm_eps", 1e-6),
        "tied": fields.bool("tie_word_embeddings", False),
        "head_dim": fields.width("head_dim", 0),
        "rope_scaling": by,
    }


def scaling(rotary: Mapping[str, Any], original: int | None, positions: int) -> rope.Scaling | None:
    """What `Fields.rope` found, without theta, as a scaling. Raises CheckpointError for one that is not known.

    Args:
        rotary: the settings.
        original: `original_max_position_embeddings` beside them.
        positions: `max_position_embeddings`.
    """
    values = {k: v for k, v in rotary.items() if (k, v) != ("partial_rotary_factor", 1)}
    kind = values["rope_type"]
    if kind == "dynamic":  # for these the original context is `max_position_embeddings`, whatever else is said
        values["original_max_position_embeddings"] = positions
    elif kind in ("yarn", "llama3", "longrope"):
        values["original_max_position_embeddings"] = original or values.get("original_max_position_embeddings") or positions
    try:
        return rope.scaling(values)
    except ConfigError as error:
        raise CheckpointError(f"config.json: rope_parameters: {error}") from error


def layers_of(fields: Fields, otherwise: tuple[str, ...]) -> tuple[str, ...]:
    """`layer_types`, or what older files mean that do not have it."""
    given = fields.get("layer_types", None)
    if given is None:
        return otherwise
    if not isinstance(given, list):
        raise CheckpointError(f"config.json: layer_types is {given!r} and must be a list: copy it again")
    return tuple(given)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: Config, attention: nn.Module | None = None, feed_forward: nn.Module | None = None) -> None:
        super().__init__()
        c = config
        self.attention_norm = RMSNorm(c.d_model, c.norm_eps)
        self.attention = attention or Attention(c.d_model, c.n_heads, c.n_kv_heads, c.head_dim)
        self.feed_forward_norm = RMSNorm(c.d_model, c.norm_eps)
        self.feed_forward = feed_forward or GatedFeedForward(c.d_model, c.d_ff)

    def forward(self, x: Tensor, ctx: Context, layer: int, turn: Turn) -> Tensor:
        x = x + self.attention(self.attention_norm(x), ctx, layer, turn)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(CausalLM):
    """Embedding, blocks, norm, output embedding. A family overrides `block` and `block_keys`, and what else is different."""

    # Frequencies, which older files hold.
    harmless = (r"(?:model\.)?(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.rotary = self.make_rotary()
        self.blocks = nn.ModuleList(self.block(layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.d_model, config.vocab_size, bias=False)

    def block(self, layer: int) -> nn.Module:
        """A fresh block for layer `layer`."""
        return Block(self.config, self.make_attention(layer), self.make_feed_forward(layer))

    def make_attention(self, layer: int) -> nn.Module:
        """The attention of layer `layer`."""
        c = self.config
        return Attention(c.d_model, c.n_heads, c.n_kv_heads, c.head_dim, scoring=c.scoring(layer))

    def make_feed_forward(self, layer: int) -> nn.Module:
        """The feed-forward block of layer `layer`."""
        return GatedFeedForward(self.config.d_model, self.config.d_ff)

    def make_rotary(self) -> Rotary:
        """The rotary tables."""
        c = self.config
        return rope.rotary(c.rotary_dim, c.max_positions, c.rope_theta, c.rope_scaling)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights.

        | weight                       | distribution                                                         |
        | ---------------------------- | -------------------------------------------------------------------- |
        | embeddings, output           | normal, std 0.02                                                     |
        | attention.out, down          | zero: every block starts as the identity                             |
        | other matrices               | normal, std 1/sqrt(D)                                                |
        | norms                        | what multiplies by one                                               |
        | biases                       | zero                                                                 |
        """
        norms = {m.weight: 1.0 - m.offset for m in self.modules() if isinstance(m, RMSNorm)}
        for name, p in self.named_parameters():
            if p in norms:
                p.fill_(norms[p])
            elif name.endswith(("out.weight", "down.weight", "down", "bias")):
                p.zero_()
            else:
                std = 0.02 if name.startswith(("embedding", "head")) else self.config.d_model**-0.5
                p.normal_(std=std, generator=generator)

    def hidden(self, ids: Tensor, ctx: Context) -> Tensor:  # (B, T) -> (B, T, D)
        x = self.embed(ids)
        for layer, (block, turn) in enumerate(zip(self.blocks, self.turns(ctx), strict=True)):
            x = block(x, ctx, layer, turn)
        return self.norm(x)

    def embed(self, ids: Tensor) -> Tensor:
        """What the first block reads: (B, T) -> (B, T, D)."""
        embedded: Tensor = self.embedding(ids)
        return embedded

    def turns(self, ctx: Context) -> Sequence[Turn]:
        """The rotary tables of each layer."""
        return [self.rotary.at(ctx.positions, ctx.extent, ctx.cached)] * self.config.n_layers

    @property
    def output_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def keys(self) -> dict[str, str | Entry]:
        out: dict[str, str | Entry] = {"embedding": "model.embed_tokens", "norm": "model.norm"}
        if self.head is not None:
            out["head"] = "lm_head"
        for i in range(self.config.n_layers):
            out |= self.block_keys(i, f"blocks.{i}.", f"model.layers.{i}.")
        return out

    def tied_keys(self) -> dict[str, str]:
        return {"lm_head.weight": "model.embed_tokens.weight"} if self.head is None else {}

    def block_keys(self, layer: int, ours: str, theirs: str) -> dict[str, str | Entry]:
        """The key map of one block."""
        c = self.config
        q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        return {
            ours + "attention_norm": theirs + "input_layernorm",
            ours + "attention.qkv": Fused(tuple(f"{theirs}self_attn.{x}_proj" for x in "qkv"), (q, kv, kv)),
            ours + "attention.out": theirs + "self_attn.o_proj",
            ours + "feed_forward_norm": theirs + "post_attention_layernorm",
            ours + "feed_forward.gate_up": Fused((theirs + "mlp.gate_proj", theirs + "mlp.up_proj"), (c.d_ff, c.d_ff)),
            ours + "feed_forward.down": theirs + "mlp.down_proj",
        }
