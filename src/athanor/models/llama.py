"""LLaMA (Touvron et al. 2023): pre-norm decoder with RMSNorm, rotary positions, grouped-query attention and SwiGLU.

Legend: B batch, T time, D width (d_model), V vocabulary, H query heads, G key/value heads, K head width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from athanor.core.errors import CheckpointError, ConfigError
from athanor.models.base import CausalLM, Fused
from athanor.nn.attention import Attention
from athanor.nn.context import Context
from athanor.nn.feedforward import SwiGLU
from athanor.nn.norms import RMSNorm
from athanor.nn.positions import Rotary


@dataclass(frozen=True)
class Config:
    """Shape of a LLaMA.

    vocab_size     V
    d_model        D
    n_layers       decoder layers
    n_heads        H, query heads; divides d_model
    n_kv_heads     G, key/value heads; divides n_heads
    d_ff           F, width of the feed-forward block
    max_positions  longest sequence
    rope_theta     base of the rotary frequencies
    norm_eps       added to the mean square in RMSNorm
    tied           whether the output embedding is the input embedding
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

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "max_positions"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} ({value}) must be at least 1")
        if self.d_model % 2:
            raise ConfigError(f"d_model ({self.d_model}) must be even for rotary positions: use {self.d_model + 1}")
        if self.d_model % self.n_heads:
            fits = [h for h in range(1, self.d_model + 1) if self.d_model % h == 0 and self.d_model // h % 2 == 0]
            near = sorted(fits, key=lambda h: abs(h - self.n_heads))[:2]
            raise ConfigError(
                f"n_heads ({self.n_heads}) must divide d_model ({self.d_model}): use {' or '.join(map(str, sorted(near)))}"
            )
        if self.n_heads % self.n_kv_heads:
            fits = [g for g in range(1, self.n_heads + 1) if self.n_heads % g == 0]
            raise ConfigError(
                f"n_kv_heads ({self.n_kv_heads}) must divide n_heads ({self.n_heads}): use one of {', '.join(map(str, fits))}"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"d_model / n_heads ({self.d_model} / {self.n_heads} = {self.head_dim}) must be even for rotary positions:"
                f" use a d_model of {self.d_model + self.n_heads}"
            )
        if not self.rope_theta > 0:
            raise ConfigError(f"rope_theta ({self.rope_theta}) must be positive: 10000 is usual")
        if not self.norm_eps > 0:
            raise ConfigError(f"norm_eps ({self.norm_eps}) must be positive: 1e-5 is usual")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    def to_hf(self) -> dict[str, Any]:
        """Fields of Hugging Face's LlamaConfig, for readers old (rope_theta) and new (rope_parameters)."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.d_ff,
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        }

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> Config:
        """From the fields of config.json. Raises CheckpointError for what this file does not compute."""
        try:
            heads = fields["num_attention_heads"]
            rope = fields.get("rope_parameters") or {}
            scaling = fields.get("rope_scaling") or {}
            unsupported = {
                "rope_parameters.rope_type": (rope.get("rope_type") or "default", "default"),
                "rope_scaling.rope_type": (scaling.get("rope_type") or scaling.get("type") or "default", "default"),
                "hidden_act": (fields.get("hidden_act", "silu"), "silu"),
                "attention_bias": (fields.get("attention_bias", False), False),
                "mlp_bias": (fields.get("mlp_bias", False), False),
                "head_dim": (fields.get("head_dim") or fields["hidden_size"] // heads, fields["hidden_size"] // heads),
            }
            for name, (value, known) in unsupported.items():
                if value != known:
                    raise CheckpointError(
                        f"config.json: {name} is {value!r}, which is not supported for llama (only {known!r} is):"
                        " use another checkpoint"
                    )
            return cls(
                vocab_size=fields["vocab_size"],
                d_model=fields["hidden_size"],
                n_layers=fields["num_hidden_layers"],
                n_heads=heads,
                n_kv_heads=fields.get("num_key_value_heads") or heads,
                d_ff=fields["intermediate_size"],
                max_positions=fields.get("max_position_embeddings", 2048),
                rope_theta=float(rope.get("rope_theta") or fields.get("rope_theta") or 10_000.0),
                norm_eps=fields.get("rms_norm_eps", 1e-6),
                tied=fields.get("tie_word_embeddings", False),
            )
        except KeyError as error:
            raise CheckpointError(f"config.json lacks {error.args[0]!r}, which a llama needs: copy it again") from None
        except (ArithmeticError, AttributeError, ConfigError, TypeError, ValueError) as error:
            raise CheckpointError(f"config.json does not describe a llama ({error}): copy it again") from error


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config.d_model, config.n_heads, config.n_kv_heads, config.head_dim)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = SwiGLU(config.d_model, config.d_ff)

    def forward(self, x: Tensor, ctx: Context, layer: int, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), ctx, layer, cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Model(CausalLM):
    """The model; see the module docstring."""

    model_type: ClassVar[str] = "llama"
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.rotary = Rotary(config.head_dim, config.max_positions, config.rope_theta)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.d_model, config.vocab_size, bias=False)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights.

        | weight                       | distribution                                                         |
        | ---------------------------- | -------------------------------------------------------------------- |
        | embeddings, output           | normal, std 0.02                                                     |
        | qkv, gate_up                 | normal, std 1/sqrt(D)                                                |
        | attention.out, down          | zero: every block starts as the identity                             |
        | norms                        | one                                                                  |
        """
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                p.fill_(1.0)
            elif name.endswith(("out.weight", "down.weight")):
                p.zero_()
            else:
                std = 0.02 if name.startswith(("embedding", "head")) else self.config.d_model**-0.5
                p.normal_(std=std, generator=generator)

    def hidden(self, ids: Tensor, ctx: Context) -> Tensor:  # (B, T) -> (B, T, D)
        x = self.embedding(ids)
        cos, sin = self.rotary.at(ctx.positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, ctx, layer, cos, sin)
        return self.norm(x)

    @property
    def output_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def keys(self) -> dict[str, str | Fused]:
        c = self.config
        q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        out: dict[str, str | Fused] = {"embedding": "model.embed_tokens", "norm": "model.norm"}
        if not c.tied:
            out["head"] = "lm_head"
        for i in range(c.n_layers):
            ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
            out |= {
                ours + "attention_norm": theirs + "input_layernorm",
                ours + "attention.qkv": Fused(tuple(f"{theirs}self_attn.{x}_proj" for x in "qkv"), (q, kv, kv)),
                ours + "attention.out": theirs + "self_attn.o_proj",
                ours + "feed_forward_norm": theirs + "post_attention_layernorm",
                ours + "feed_forward.gate_up": Fused((theirs + "mlp.gate_proj", theirs + "mlp.up_proj"), (c.d_ff, c.d_ff)),
                ours + "feed_forward.down": theirs + "mlp.down_proj",
            }
        return out
