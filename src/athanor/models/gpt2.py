"""GPT-2 (Radford et al. 2019): pre-norm decoder with LayerNorm, learned positions and biases everywhere.

Legend: B batch, T time, D width (d_model), V vocabulary, H heads, F feed-forward width.
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
from athanor.models.keys import Entry, Transposed
from athanor.nn.attention import Attention
from athanor.nn.context import Context
from athanor.nn.feedforward import ACTIVATIONS, FeedForward


@dataclass(frozen=True)
class Config:
    """Shape of a GPT-2.

    vocab_size     V
    d_model        D
    n_layers       decoder layers
    n_heads        H; divides d_model
    max_positions  longest sequence
    d_ff           F; 0 is 4 D
    norm_eps       added to the variance in LayerNorm
    activation     of the feed-forward block
    tied           whether the output embedding is the input embedding
    """

    vocab_size: int
    d_model: int = 768
    n_layers: int = 12
    n_heads: int = 12
    max_positions: int = 1024
    d_ff: int = 0
    norm_eps: float = 1e-5
    activation: str = "gelu_new"
    tied: bool = True

    def __post_init__(self) -> None:
        if not self.d_ff:
            object.__setattr__(self, "d_ff", 4 * self.d_model)
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "max_positions", "d_ff"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.d_model % self.n_heads:
            fits = [n for n in range(1, self.d_model + 1) if self.d_model % n == 0]
            near = sorted(sorted(fits, key=lambda n: abs(n - self.n_heads))[:2])
            raise ConfigError(
                f"n_heads ({self.n_heads}) must divide d_model ({self.d_model}): use {' or '.join(map(str, near))}"
            )  # fmt: skip
        if not self.norm_eps > 0:
            raise ConfigError(f"norm_eps ({self.norm_eps}) must be positive: 1e-5 is usual")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation ({self.activation!r}) must be one of {', '.join(ACTIVATIONS)}: gelu_new is usual")

    @property
    def n_kv_heads(self) -> int:
        return self.n_heads

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": self.vocab_size,
            "n_embd": self.d_model,
            "n_layer": self.n_layers,
            "n_head": self.n_heads,
            "n_positions": self.max_positions,
            "n_inner": self.d_ff,
            "layer_norm_epsilon": self.norm_eps,
            "activation_function": self.activation,
            "tie_word_embeddings": self.tied,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
            # By default ids that a smaller vocabulary does not have.
            "bos_token_id": None,
            "eos_token_id": None,
        }

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Config:
        """From the fields of config.json. Raises CheckpointError for what this file does not compute."""
        fields = Fields(values, "gpt2", _ALIASES)
        fields.only("activation_function", "gelu_new", *ACTIVATIONS)
        fields.only("scale_attn_weights", True)
        for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
            fields.only(name, False)
        return cls(
            fields.int("vocab_size"),
            fields.width("n_embd"),
            fields.count("n_layer"),
            fields.count("n_head"),
            fields.int("n_positions", 1024),
            fields.int("n_inner", 0),
            fields.float("layer_norm_epsilon", 1e-5),
            fields.str("activation_function", "gelu_new"),
            fields.bool("tie_word_embeddings", True),
        )


_ALIASES = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}  # fmt: skip

_TINY = Config(320, 32, 2, 4, 128)

PRESETS = {
    "tiny": _TINY,
    "tiny-untied": replace(_TINY, n_heads=2, d_ff=48, norm_eps=1e-3, activation="relu", tied=False),
    "gpt2": Config(50257),
    "gpt2-medium": Config(50257, 1024, 24, 16),
    "gpt2-large": Config(50257, 1280, 36, 20),
    "gpt2-xl": Config(50257, 1600, 48, 25),
}


class _Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = config
        self.attention_norm = nn.LayerNorm(c.d_model, c.norm_eps)
        self.attention = Attention(c.d_model, c.n_heads, c.n_heads, c.head_dim, bias=True, out_bias=True)
        self.feed_forward_norm = nn.LayerNorm(c.d_model, c.norm_eps)
        self.feed_forward = FeedForward(c.d_model, c.d_ff, c.activation)

    def forward(self, x: Tensor, ctx: Context, layer: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), ctx, layer)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Model(CausalLM):
    """The model; see the module docstring."""

    model_type = "gpt2"
    prefix = "transformer."
    harmless = (r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",)  # the causal mask, which older files hold
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_positions, config.d_model)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.d_model, config.vocab_size, bias=False)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights, as the paper says (section 2.3).

        | weight                       | distribution                                  |
        | ---------------------------- | --------------------------------------------- |
        | attention.out, down          | normal, std 0.02 / sqrt(2 n_layers)           |
        | positions                    | normal, std 0.01                              |
        | other matrices, embeddings   | normal, std 0.02                              |
        | norms                        | one                                           |
        | biases                       | zero                                          |
        """
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif name.endswith("norm.weight"):
                p.fill_(1.0)
            else:
                std = 0.01 if name.startswith("positions") else 0.02
                if name.endswith(("out.weight", "down.weight")):
                    std /= (2 * self.config.n_layers) ** 0.5
                p.normal_(std=std, generator=generator)

    def hidden(self, ids: Tensor, ctx: Context) -> Tensor:  # (B, T) -> (B, T, D)
        at = ctx.positions[:1] if ctx.positions.stride(0) == 0 else ctx.positions
        x = self.embedding(ids) + self.positions(at)
        for layer, block in enumerate(self.blocks):
            x = block(x, ctx, layer)
        out: Tensor = self.norm(x)
        return out

    @property
    def output_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def keys(self) -> dict[str, str | Entry]:
        out: dict[str, str | Entry] = {
            "embedding": "transformer.wte",
            "positions": "transformer.wpe",
            "norm": "transformer.ln_f",
        }
        if self.head is not None:
            out["head"] = "lm_head"
        for i in range(self.config.n_layers):
            ours, theirs = f"blocks.{i}.", f"transformer.h.{i}."
            out |= {
                ours + "attention_norm": theirs + "ln_1",
                ours + "attention.qkv": Transposed(theirs + "attn.c_attn"),
                ours + "attention.out": Transposed(theirs + "attn.c_proj"),
                ours + "feed_forward_norm": theirs + "ln_2",
                ours + "feed_forward.up": Transposed(theirs + "mlp.c_fc"),
                ours + "feed_forward.down": Transposed(theirs + "mlp.c_proj"),
            }
        return out

    def tied_keys(self) -> dict[str, str]:
        return {"lm_head.weight": "transformer.wte.weight"} if self.head is None else {}
