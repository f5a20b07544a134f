"""DeepSeek-V3 (DeepSeek-AI 2024): latent attention, many small experts under a router balanced by a bias, experts shared by all
tokens, and heads that predict the tokens after the next.

Legend as in `decoder.py`; k which of the tokens after the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from athanor.core.errors import ConfigError
from athanor.models import decoder
from athanor.models.fields import Fields
from athanor.models.keys import Entry, Fused, Rows
from athanor.models.mixtral import check_experts, expert_keys
from athanor.nn import moe
from athanor.nn.cache import KV
from athanor.nn.context import Context
from athanor.nn.feedforward import GatedFeedForward
from athanor.nn.latent import LatentAttention
from athanor.nn.linear import Linear
from athanor.nn.norms import RMSNorm
from athanor.nn.rope import YarnRope


@dataclass(frozen=True)
class Config(decoder.Config):
    """Shape of a DeepSeek-V3: what every decoder has (`decoder.Config`; n_kv_heads is n_heads, head_dim the width R of what is
    turned, d_ff of layers without experts), and

    query_rank      Q, width of the latent of queries; None for none
    latent_rank     C, width of the latent of keys and values
    nope_dim        P, width of what is not turned in queries and keys
    value_dim       V, width of values
    attention_bias  whether the projections to latents and the output of attention have biases
    interleaved     whether a file holds the two entries of a turned pair side by side
    n_experts       experts of a layer
    top_k           how many of them compute a token
    d_expert        F, inner width of an expert
    n_shared        how many more compute every token
    n_groups        groups of experts; divides n_experts
    top_groups      how many of them a token may choose from
    normalise       whether the weights of a token's experts sum to `scale`
    scale           factor of what the chosen experts add
    first_dense     so many layers at the beginning have no experts
    n_ahead         heads that predict the tokens after the next (`mtp_hidden`)
    """

    n_kv_heads: int = 0
    query_rank: int | None = 1536
    latent_rank: int = 512
    nope_dim: int = 128
    value_dim: int = 128
    attention_bias: bool = False
    interleaved: bool = True
    n_experts: int = 256
    top_k: int = 8
    d_expert: int = 2048
    n_shared: int = 1
    n_groups: int = 1
    top_groups: int = 1
    normalise: bool = True
    scale: float = 1.0
    first_dense: int = 0
    n_ahead: int = 0

    def __post_init__(self) -> None:
        if not self.n_kv_heads:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        super().__post_init__()
        if self.n_kv_heads != self.n_heads:
            raise ConfigError(
                f"n_kv_heads ({self.n_kv_heads}) must be n_heads ({self.n_heads}), since a latent gives every head its own keys:"
                " leave it out"
            )
        check_experts(self.n_experts, self.top_k)
        for name in ("latent_rank", "nope_dim", "value_dim", "d_expert", "n_shared"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.query_rank is not None and self.query_rank < 1:
            raise ConfigError(f"query_rank ({self.query_rank}) must be at least 1, or None for queries straight from the input")
        for name in ("first_dense", "n_ahead"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be at least 0")
        moe.check_groups(self.n_experts, self.top_k, self.n_groups, self.top_groups)

    @property
    def sharpness(self) -> float:
        """What YaRN multiplies scores with: m(mscale_all_dim)^2 of `YarnRope`."""
        by = self.rope_scaling
        if not isinstance(by, YarnRope) or not by.mscale_all_dim:
            return 1.0
        return (0.1 * by.mscale_all_dim * math.log(by.factor) + 1.0) ** 2

    def to_hf(self) -> dict[str, Any]:
        return super().to_hf() | {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "q_lora_rank": self.query_rank,
            "kv_lora_rank": self.latent_rank,
            "qk_rope_head_dim": self.head_dim,
            "qk_nope_head_dim": self.nope_dim,
            "v_head_dim": self.value_dim,
            "attention_bias": self.attention_bias,
            "rope_interleave": self.interleaved,
            "n_routed_experts": self.n_experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.d_expert,
            "n_shared_experts": self.n_shared,
            "n_group": self.n_groups,
            "topk_group": self.top_groups,
            "norm_topk_prob": self.normalise,
            "routed_scaling_factor": self.scale,
            "first_k_dense_replace": self.first_dense,
            "num_nextn_predict_layers": self.n_ahead,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        }

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Config:
        """From the fields of config.json. Raises CheckpointError for what this file does not compute."""
        fields = Fields(values, "deepseek_v3", _ALIASES)
        for name, known in _ONLY.items():
            fields.only(name, known)
        return cls(
            **decoder.common(fields, 4096) | {"head_dim": fields.width("qk_rope_head_dim", 64)},
            query_rank=fields.width("q_lora_rank", None) if "q_lora_rank" in values else 1536,
            latent_rank=fields.width("kv_lora_rank", 512),
            nope_dim=fields.width("qk_nope_head_dim", 128),
            value_dim=fields.width("v_head_dim", 128),
            attention_bias=fields.bool("attention_bias", False),
            interleaved=fields.bool("rope_interleave", True),
            n_experts=fields.count("n_routed_experts", 256),
            top_k=fields.int("num_experts_per_tok", 8),
            d_expert=fields.int("moe_intermediate_size", 2048),
            n_shared=fields.int("n_shared_experts", 1),
            n_groups=fields.int("n_group", 8),
            top_groups=fields.int("topk_group", 4),
            normalise=fields.bool("norm_topk_prob", True),
            scale=fields.float("routed_scaling_factor", 2.5),
            first_dense=fields.int("first_k_dense_replace", 3),
            n_ahead=fields.count("num_nextn_predict_layers", 0),
        )


_ALIASES = {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}
# Fields that can say something else in files of relatives.
_ONLY = {"hidden_act": "silu", "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}

_TINY = Config(
    320, 32, 2, 4, d_ff=48, max_positions=128, norm_eps=1e-6, tied=False, head_dim=8, query_rank=24, latent_rank=16, nope_dim=12,
    value_dim=10, n_experts=8, top_k=3, d_expert=16, n_groups=4, top_groups=2, scale=2.5, first_dense=1,
)  # fmt: skip
_YARN = YarnRope(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)

PRESETS = {
    "tiny": _TINY,
    "tiny-plain": replace(_TINY, query_rank=None, interleaved=False, first_dense=0, n_groups=1, top_groups=1, tied=True),
    "tiny-bias": replace(_TINY, attention_bias=True, normalise=False, n_shared=2, first_dense=0),
    "tiny-ahead": replace(_TINY, n_ahead=1, top_groups=4),
    "tiny-yarn": replace(_TINY, rope_scaling=YarnRope(4.0, 32, mscale=1.0, mscale_all_dim=0.7), value_dim=16),
    "deepseek-v3": Config(
        129280, 7168, 61, 128, d_ff=18432, max_positions=163840, norm_eps=1e-6, tied=False, head_dim=64, rope_scaling=_YARN,
        n_groups=8, top_groups=4, scale=2.5, first_dense=3, n_ahead=1,
    ),
    "moonlight-16b-a3b": Config(
        163840, 2048, 27, 16, d_ff=11264, max_positions=8192, rope_theta=50_000.0, norm_eps=1e-5, tied=False, head_dim=64,
        query_rank=None, n_experts=64, top_k=6, d_expert=1408, n_shared=2, scale=2.446, first_dense=1,
    ),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Turned(Fused):
    """`Fused`, with rows in another order in the file: ours[i] = theirs[index[i]]."""

    index: Tensor

    def written(self, leaf: str, tensor: Tensor) -> Tensor:
        return tensor[self.index.argsort().to(tensor.device)]

    def settle(self, leaf: str, tensor: Tensor) -> None:
        tensor.copy_(tensor[self.index])


class _Ahead(nn.Module):
    """h' = block(P [norm(embedding of the token that is known by then); norm(h)]), and a norm (section 2.2)."""

    def __init__(self, model: Model, layer: int) -> None:
        super().__init__()
        c = model.config
        self.token_norm = RMSNorm(c.d_model, c.norm_eps)
        self.hidden_norm = RMSNorm(c.d_model, c.norm_eps)
        self.project = Linear(2 * c.d_model, c.d_model, bias=False)
        self.block = model.block(layer)
        self.norm = RMSNorm(c.d_model, c.norm_eps)

    def forward(self, embedded: Tensor, hidden: Tensor, ctx: Context, layer: int, turn: tuple[Tensor, Tensor]) -> Tensor:
        x = self.project(torch.cat((self.token_norm(embedded), self.hidden_norm(hidden)), -1))
        return self.norm(self.block(x, ctx, layer, turn))


class Model(decoder.Decoder):
    """The model; see the module docstring. `ahead` is None where a file lacks the heads that its config speaks of."""

    model_type = "deepseek_v3"
    idle = ("ahead.*",)
    exact = (r".*\.mlp\.gate\.(?:weight|e_score_correction_bias)",)
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        n = config.n_layers
        self.ahead = nn.ModuleList(_Ahead(self, n + k) for k in range(config.n_ahead)) if config.n_ahead else None

    def become(self, architecture: str, holds: Callable[[str], bool]) -> None:
        super().become(architecture, holds)
        # transformers writes no such layers, and in its configs there is one of them unless told otherwise.
        if not holds(f"model.layers.{self.config.n_layers}.eh_proj.weight"):
            self.ahead = None

    def make_attention(self, layer: int) -> nn.Module:
        c = self.config
        return LatentAttention(
            c.d_model, c.n_heads, c.query_rank, c.latent_rank, c.head_dim, c.nope_dim, c.value_dim,
            bias=c.attention_bias, sharpness=c.sharpness,
        )  # fmt: skip

    def make_feed_forward(self, layer: int) -> nn.Module:
        c = self.config
        if layer < c.first_dense:
            return GatedFeedForward(c.d_model, c.d_ff)
        router = moe.SigmoidRouter(
            c.d_model, c.n_experts, c.top_k,
            n_groups=c.n_groups, top_groups=c.top_groups, normalise=c.normalise, scale=c.scale,
        )  # fmt: skip
        shared = GatedFeedForward(c.d_model, c.n_shared * c.d_expert)
        return moe.MixtureOfExperts(router, moe.Experts(c.n_experts, c.d_model, c.d_expert), shared)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights as in `Decoder.initialise`; the biases that balance are zero."""
        super().initialise(generator)
        for m in self.modules():
            if isinstance(m, moe.SigmoidRouter):
                m.e_score_correction_bias.zero_()

    def cache_layers(self) -> Sequence[KV]:
        return [block.attention.cache_layer() for block in self.blocks]  # type: ignore[union-attr, operator]  # LatentAttention

    def mtp_hidden(self, ids: Tensor, hidden: Tensor, ctx: Context) -> list[Tensor]:
        """For k = 1 .. n_ahead the hidden states whose logits predict, at token i, the token i + 1 + k (section 2.2).

        The k-th reads the (k-1)-th (`hidden` for the first) and the embedding of token i + k. The last k states of each sequence
        mean nothing, for the token is not known there; nothing else depends on them.

        Args:
            ids: (B, T), what `hidden` was computed of.
            hidden: (B, T, D), of the method `hidden`.
            ctx: the context that it was computed in; without a cache.

        Returns:
            (B, T, D) each.

        Raises:
            ConfigError: a model without such heads; a context with a cache.
        """
        heads = self._heads()
        if ctx.cached:
            raise ConfigError("the heads for the tokens after the next read whole sequences: use a context without a cache")
        found = []
        for k in range(1, len(heads) + 1):
            # Over the end of one sequence the first tokens of another come in, where states mean nothing.
            hidden = self.mtp_state(k, ids.roll(-k, 1), hidden, ctx)
            found.append(hidden)
        return found

    def mtp_state(self, k: int, later: Tensor, hidden: Tensor, ctx: Context) -> Tensor:
        """The states of the k-th head alone, in any context; in a cache, of `mtp_layers`, its layer is the k-th.

        Args:
            k: which, from 1 on.
            later: (B, T), at each position the token that stands k after it.
            hidden: (B, T, D), states of the head before; of the method `hidden` for the first.
            ctx: positions, and what may be seen of them.
        """
        turn = self.rotary.at(ctx.positions, ctx.extent, ctx.cached)
        state: Tensor = self._heads()[k - 1](self.embedding(later), hidden, ctx, k - 1, turn)
        return state

    def mtp_layers(self) -> Sequence[KV]:
        """What each head keeps of a token. Raises ConfigError for a model without heads."""
        return [head.block.attention.cache_layer() for head in self._heads()]  # type: ignore[union-attr, operator]

    def _heads(self) -> nn.ModuleList:
        if self.ahead is None:
            raise ConfigError(
                "this deepseek_v3 has no heads for the tokens after the next: build it with n_ahead above 0, or load a checkpoint"
                f" that holds model.layers.{self.config.n_layers}"
            )
        return self.ahead

    def keys(self) -> dict[str, str | Entry]:
        out = super().keys()
        for k in range(len(self.ahead or ())):
            ours, theirs = f"ahead.{k}.", f"model.layers.{self.config.n_layers + k}."
            out |= {
                ours + "token_norm": theirs + "enorm",
                ours + "hidden_norm": theirs + "hnorm",
                ours + "project": theirs + "eh_proj",
                ours + "norm": theirs + "shared_head.norm",
            }
            out |= self.block_keys(self.config.n_layers + k, ours + "block.", theirs)
        return out

    def tied_keys(self) -> dict[str, str]:
        return super().tied_keys() | {twin: name for name, twins in self._twins().items() for twin in twins}

    def _twins(self) -> dict[str, list[str]]:
        """Tensors that published files hold again for each head, by their names."""
        layers = [f"model.layers.{self.config.n_layers + k}." for k in range(len(self.ahead or ()))]
        embedding, head = "model.embed_tokens.weight", "lm_head.weight"
        twins = {embedding: [layer + "embed_tokens.weight" for layer in layers]}
        outputs = [layer + "shared_head.head.weight" for layer in layers]
        if self.head is None:
            twins[embedding] += outputs
        else:
            twins[head] = outputs
        return twins

    def to_hf(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = super().to_hf(state)
        for name, twins in self._twins().items():
            # What has no device yet asks what a file must hold: these it may.
            if name in out and not out[name].is_meta:
                out |= {twin: out[name].clone() for twin in twins}
        return out

    def block_keys(self, layer: int, ours: str, theirs: str) -> dict[str, str | Entry]:
        c = self.config
        attention, file = ours + "attention.", theirs + "self_attn."
        latent = (file + "kv_a_proj_with_mqa",) if c.query_rank is None else (file + "q_a_proj", file + "kv_a_proj_with_mqa")
        ranks = (c.query_rank or 0) + c.latent_rank
        rows = (*(() if c.query_rank is None else (c.query_rank,)), c.latent_rank + c.head_dim)
        keys: dict[str, str | Entry] = {
            ours + "attention_norm": theirs + "input_layernorm",
            ours + "feed_forward_norm": theirs + "post_attention_layernorm",
            attention + "latent": _Turned(latent, rows, torch.cat((torch.arange(ranks, device="cpu"), ranks + self._pairs()))),
            attention + "query": Rows(file + ("q_proj" if c.query_rank is None else "q_b_proj"), self._query_rows()),
            attention + "latent_norm": file + "kv_a_layernorm",
            attention + "key_value": file + "kv_b_proj",
            attention + "out": file + "o_proj",
        }
        if c.query_rank is not None:
            keys[attention + "query_norm"] = file + "q_a_layernorm"
        ours, theirs = ours + "feed_forward.", theirs + "mlp."
        if layer < c.first_dense:
            return keys | _gated(ours, theirs, c.d_ff)
        keys |= expert_keys(ours, theirs, ("gate_proj", "up_proj", "down_proj"), c.n_experts, c.d_expert, c.d_model)
        return keys | _gated(ours + "shared.", theirs + "shared_experts.", c.n_shared * c.d_expert)

    def _pairs(self) -> Tensor:
        """Where in a file the turned entries lie that we hold with the first of all pairs before the second: (R,)."""
        at = torch.arange(self.config.head_dim, device="cpu")
        return torch.cat((at[::2], at[1::2])) if self.config.interleaved else at

    def _query_rows(self) -> Tensor:
        """The same of all heads of queries, which in a file end with what is turned and here begin with it: (H (R + P),)."""
        c = self.config
        head = torch.cat((c.nope_dim + self._pairs(), torch.arange(c.nope_dim, device="cpu")))
        starts = torch.arange(c.n_heads, device="cpu") * (c.nope_dim + c.head_dim)
        return (starts.unsqueeze(1) + head).flatten()


def _gated(ours: str, theirs: str, width: int) -> dict[str, str | Entry]:
    return {
        ours + "gate_up": Fused((theirs + "gate_proj", theirs + "up_proj"), (width, width)),
        ours + "down": theirs + "down_proj",
    }
