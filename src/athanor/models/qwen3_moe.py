"""Qwen 3 with mixtures of experts (Qwen Team 2025): Qwen 3 with many small experts in the layers that say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from athanor.core.errors import CheckpointError, ConfigError
from athanor.models import decoder
from athanor.models.fields import Fields
from athanor.models.keys import Entry
from athanor.models.mixtral import check_experts, expert_keys
from athanor.models.qwen2 import window_of
from athanor.nn import moe
from athanor.nn.attention import Attention
from athanor.nn.feedforward import GatedFeedForward
from athanor.nn.rope import YarnRope


@dataclass(frozen=True)
class Config(decoder.Windowed):
    """Shape of a Qwen 3 with experts: what every decoder with a window has (`decoder.Windowed`; d_ff is of layers without
    experts), and

    attention_bias  whether the four projections of attention have biases
    n_experts       experts of a layer
    top_k           how many of them compute a token
    d_expert        F, inner width of an expert
    normalise       whether the weights of a token's experts sum to one
    sparse_step     of so many layers the last has experts
    dense_layers    layers that have none all the same
    balance_loss    how much the loss that keeps experts equally busy counts for in training
    """

    attention_bias: bool = False
    n_experts: int = 128
    top_k: int = 8
    d_expert: int = 768
    normalise: bool = False
    sparse_step: int = 1
    dense_layers: tuple[int, ...] = ()
    balance_loss: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        check_experts(self.n_experts, self.top_k)
        for name in ("d_expert", "sparse_step"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be at least 1")
        for layer in self.dense_layers:
            if not 0 <= layer < self.n_layers:
                raise ConfigError(
                    f"dense_layers names layer {layer}, and there are layers 0 to {self.n_layers - 1}: leave it out"
                )

    def sparse(self, layer: int) -> bool:
        """Whether layer `layer` has experts."""
        return layer not in self.dense_layers and (layer + 1) % self.sparse_step == 0

    def to_hf(self) -> dict[str, Any]:
        own = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "attention_bias": self.attention_bias,
            "use_sliding_window": self.window is not None,
            "sliding_window": self.window,
            "num_experts": self.n_experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.d_expert,
            "norm_topk_prob": self.normalise,
            "decoder_sparse_step": self.sparse_step,
            "mlp_only_layers": list(self.dense_layers),
            "router_aux_loss_coef": self.balance_loss,
        }
        return super().to_hf() | own

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Config:
        """From the fields of config.json. Raises CheckpointError for what this file does not compute."""
        fields = Fields(values, "qwen3_moe", {"num_local_experts": "num_experts"})
        fields.only("hidden_act", "silu")
        fields.only("layer_types", None)
        dense = fields.get("mlp_only_layers", [])
        if not isinstance(dense, list) or not all(type(x) is int for x in dense):
            raise CheckpointError(f"config.json: mlp_only_layers is {dense!r} and must be a list of layers: copy it again")
        return cls(
            **decoder.common(fields, 32768),
            window=window_of(fields),
            attention_bias=fields.bool("attention_bias", False),
            n_experts=fields.count("num_experts", 128),
            top_k=fields.int("num_experts_per_tok", 8),
            d_expert=fields.int("moe_intermediate_size", 768),
            normalise=fields.bool("norm_topk_prob", False),
            sparse_step=fields.int("decoder_sparse_step", 1),
            dense_layers=tuple(dense),
            balance_loss=fields.float("router_aux_loss_coef", 0.001),
        )


_TINY = Config(320, 32, 2, 4, 2, 48, 128, 1_000_000.0, 1e-6, head_dim=16, n_experts=8, top_k=3, d_expert=24, normalise=True)
_30B = Config(
    151936, 2048, 48, 32, 4, 6144, 40960, 1_000_000.0, 1e-6, tied=False, head_dim=128, n_experts=128, top_k=8, d_expert=768,
    normalise=True,
)  # fmt: skip

PRESETS = {
    "tiny": _TINY,
    "tiny-window": replace(_TINY, tied=False, normalise=False, window=5, attention_bias=True, top_k=1, head_dim=8),
    "tiny-dense": replace(_TINY, dense_layers=(0,), n_experts=5, top_k=5),
    "tiny-step": replace(_TINY, sparse_step=2, normalise=False, n_kv_heads=4, rope_scaling=YarnRope(4.0, 32)),
    "qwen3-30b-a3b": _30B,
    "qwen3-235b-a22b": replace(_30B, d_model=4096, n_layers=94, n_heads=64, d_ff=12288, d_expert=1536),
}


class Model(decoder.Decoder):
    """The model; see the module docstring."""

    model_type = "qwen3_moe"
    config: Config

    def make_attention(self, layer: int) -> nn.Module:
        c, bias = self.config, self.config.attention_bias
        return Attention(
            c.d_model, c.n_heads, c.n_kv_heads, c.head_dim, bias=bias, out_bias=bias, qk_norm=c.norm_eps, scoring=c.scoring(layer)
        )

    def make_feed_forward(self, layer: int) -> nn.Module:
        c = self.config
        if not c.sparse(layer):
            return GatedFeedForward(c.d_model, c.d_ff)
        router = moe.SoftmaxRouter(c.d_model, c.n_experts, c.top_k, normalise=c.normalise)
        return moe.MixtureOfExperts(router, moe.Experts(c.n_experts, c.d_model, c.d_expert))

    def router_loss(self) -> Tensor | None:
        """balance_loss times the load-balance loss of all layers with experts. Raises ConfigError before a forward pass."""
        if not any(map(self.config.sparse, range(self.config.n_layers))):
            return None
        return self.config.balance_loss * moe.aux_losses(self)["load_balance"]

    def block_keys(self, layer: int, ours: str, theirs: str) -> dict[str, str | Entry]:
        c = self.config
        keys = super().block_keys(layer, ours, theirs)
        keys[ours + "attention.query_norm"] = theirs + "self_attn.q_norm"
        keys[ours + "attention.key_norm"] = theirs + "self_attn.k_norm"
        if not c.sparse(layer):
            return keys
        ours, theirs = ours + "feed_forward.", theirs + "mlp."
        kept = {name: place for name, place in keys.items() if not name.startswith(ours)}
        return kept | expert_keys(ours, theirs, ("gate_proj", "up_proj", "down_proj"), c.n_experts, c.d_expert, c.d_model)
