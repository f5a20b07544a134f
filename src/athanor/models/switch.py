"""Switch Transformers (Fedus et al. 2021): a T5 in which some feed-forward blocks are mixtures whose router chooses one expert.

An expert takes at most `capacity` tokens of a sequence, the first to come; the residual stream carries the others past it. That
is a rule of whole sequences: where keys and values are cached, the tokens that are yet to come are unknown and nothing is
dropped, as in transformers, whose generation sees one token at a time. So a cached pass is an uncached one as long as no expert
is chosen by more than `capacity` tokens of an answer.

Legend: B batch, T time, D width (d_model), E experts, F inner width of a feed-forward block and of an expert, S sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from athanor.core.errors import CheckpointError, ConfigError
from athanor.models import t5
from athanor.models.fields import Fields
from athanor.models.keys import Entry, Experts
from athanor.nn import moe
from athanor.nn.context import Context, Sequences
from athanor.nn.feedforward import FeedForward
from athanor.nn.sdpa import Scoring

MODEL_TYPES = ("switch_transformers",)
_ACTIVATIONS = ("relu", "gelu")


@dataclass(frozen=True)
class Config(t5.Config):
    """Shape of a Switch Transformer: that of a T5 without gates, tied (`t5.Config`; d_ff is F of one expert too), and

    n_experts                E
    capacity                 tokens that one expert takes of one sequence
    n_sparse_layers          how often the encoder has experts: in the second of each n_layers // n_sparse_layers blocks
    n_sparse_decoder_layers  the same of the decoder
    router_bias              whether a router's logits have a bias
    jitter                   noise of what the router reads while training: see `SoftmaxRouter`
    z_loss                   how much the routers' z-loss counts for in training
    balance_loss             how much the loss that balances their loads does
    """

    n_experts: int = 8
    capacity: int = 64
    n_sparse_layers: int = 2
    n_sparse_decoder_layers: int = 2
    router_bias: bool = False
    jitter: float = 0.01
    z_loss: float = 0.001
    balance_loss: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feed_forward not in _ACTIVATIONS:
            raise ConfigError(
                f"feed_forward ({self.feed_forward!r}) must be one of {', '.join(_ACTIVATIONS)}: experts have no gate"
            )
        if not self.tied:
            raise ConfigError("tied (False) must be True: the files of Switch Transformers hold one embedding")
        for name, usual in (("n_experts", 8), ("capacity", 64)):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be at least 1: {usual} is usual")
        for name, blocks in (("n_sparse_layers", "n_layers"), ("n_sparse_decoder_layers", "n_decoder_layers")):
            if not 1 <= getattr(self, name) <= getattr(self, blocks):
                raise ConfigError(
                    f"{name} ({getattr(self, name)}) must be from 1 to {blocks} ({getattr(self, blocks)}): half of them is usual"
                )
        if not 0 <= self.jitter < 1:
            raise ConfigError(f"jitter ({self.jitter}) must lie in [0, 1): 0.01 is usual")
        for name in ("z_loss", "balance_loss"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} ({getattr(self, name)}) must not be negative: 0.001 is usual")

    def step(self, decoder: bool) -> int:
        """Of so many blocks the second has experts; 1 where all have."""
        return self.n_decoder_layers // self.n_sparse_decoder_layers if decoder else self.n_layers // self.n_sparse_layers

    def sparse(self, layer: int, decoder: bool) -> bool:
        """Whether block `layer` of the encoder or the decoder has experts."""
        step = self.step(decoder)
        return step == 1 or layer % step == 1

    def to_hf(self) -> dict[str, Any]:
        """The fields of Hugging Face's SwitchTransformersConfig."""
        common = {name: value for name, value in super().to_hf().items() if name != "feed_forward_proj"}
        return common | {
            "architectures": ["SwitchTransformersForConditionalGeneration"],
            "model_type": "switch_transformers",
            "dense_act_fn": self.feed_forward,
            "num_experts": self.n_experts,
            "expert_capacity": self.capacity,
            "num_sparse_encoder_layers": self.n_sparse_layers,
            "num_sparse_decoder_layers": self.n_sparse_decoder_layers,
            "encoder_sparse_step": self.step(decoder=False),
            "decoder_sparse_step": self.step(decoder=True),
            "router_bias": self.router_bias,
            "router_jitter_noise": self.jitter,
            "router_z_loss_coef": self.z_loss,
            "router_aux_loss_coef": self.balance_loss,
        }

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Config:
        """From the fields of config.json. Raises CheckpointError for what this file does not compute."""
        fields = Fields(values, "switch_transformers", t5.ALIASES)
        fields.only("dense_act_fn", *_ACTIVATIONS)
        fields.only("router_dtype", "float32")
        fields.only("tie_word_embeddings", True)  # transformers leaves even the two stacks' embeddings apart otherwise
        config = cls(
            **t5.common(fields),
            feed_forward=fields.str("dense_act_fn", "relu"),
            n_experts=fields.int("num_experts", 8),
            capacity=fields.int("expert_capacity", 64),
            n_sparse_layers=fields.int("num_sparse_encoder_layers", 3),
            n_sparse_decoder_layers=fields.int("num_sparse_decoder_layers", 3),
            router_bias=fields.bool("router_bias", False),
            jitter=fields.float("router_jitter_noise", 0.01),
            z_loss=fields.float("router_z_loss_coef", 0.001),
            balance_loss=fields.float("router_aux_loss_coef", 0.001),
        )
        for name, stack, decoder in (("encoder_sparse_step", "encoder", False), ("decoder_sparse_step", "decoder", True)):
            step = fields.int(name, config.step(decoder))
            if step != config.step(decoder):
                raise CheckpointError(
                    f"config.json: {name} is {step}, and by the numbers of its layers and its sparse layers the {stack} has"
                    f" experts in every {config.step(decoder)}: copy it again"
                )
        return config


def owners(ctx: Context, shape: torch.Size) -> Tensor:
    """The sequence of each token, (B, T), as capacities count them.

    Padding counts as one sequence more, so that it takes no room from tokens. With a cache each token is a sequence of its own.
    """
    place = torch.arange(shape.numel(), device=ctx.positions.device)
    if ctx.cached:
        return place.view(shape)
    starts, lengths = cast(Sequences, ctx).spans()
    owner = torch.searchsorted(starts, place, right=True) - 1
    # Before the first sequence `owner` is -1, and the last one ends before there.
    past = place >= (starts + lengths)[owner]
    return torch.where(past | (owner < 0), len(starts), owner).view(shape)


class Block(t5.Block):
    """That of a T5 whose feed-forward block is a mixture of experts."""

    feed_forward: moe.MixtureOfExperts

    def forward(self, x: Tensor, ctx: Context, layer: int, scoring: Scoring) -> Tensor:
        x = x + self.attention(self.attention_norm(x), ctx, layer, scoring=scoring)
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.cross(self.cross_norm(x), ctx, layer)
        return x + self.feed_forward(self.feed_forward_norm(x), owners(ctx, x.shape[:2]))


class Model(t5.Model):
    """The model; see the module docstring."""

    model_type = "switch_transformers"
    config: Config

    def block(self, layer: int, decoder: bool) -> nn.Module:
        c = self.config
        if not c.sparse(layer, decoder):
            return t5.Block(c, FeedForward(c.d_model, c.d_ff, c.feed_forward, bias=False), decoder)
        router = moe.SoftmaxRouter(c.d_model, c.n_experts, 1, exact=True, jitter=c.jitter, bias=c.router_bias)
        experts = moe.Experts(c.n_experts, c.d_model, c.d_ff, c.feed_forward, gated=False)
        return Block(c, moe.MixtureOfExperts(router, experts, capacity=c.capacity), decoder)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights: those of a T5, and the matrices of blocks sqrt(10) times as small (section 2.4); biases zero."""
        super().initialise(generator)
        for name, p in self.named_parameters():
            if name.endswith("router.bias"):
                p.zero_()
            elif ".blocks." in name and not name.endswith("norm.weight"):
                p.mul_(0.1**0.5)

    def router_loss(self) -> Tensor:
        """What training adds to the loss of the last forward pass, for the encoder and for the decoder:
        z_loss times the z-loss of their routers and balance_loss times what balances them (`moe.aux_losses`).

        Raises:
            ConfigError: before a forward pass.
        """
        c, both = self.config, [moe.aux_losses(stack) for stack in (self.encoder, self.decoder)]
        return torch.stack([c.z_loss * x["router_z"] + c.balance_loss * x["load_balance"] for x in both]).sum()

    def feed_forward_keys(self, layer: int, ours: str, theirs: str) -> dict[str, str | Entry]:
        c, theirs = self.config, theirs + "mlp."
        if not c.sparse(layer, decoder=ours.startswith("decoder")):
            return {ours + "up": theirs + "wi", ours + "down": theirs + "wo"}
        experts = [f"{theirs}experts.expert_{e}." for e in range(c.n_experts)]
        return {
            ours + "router": theirs + "router.classifier",
            ours + "experts.up": Experts(tuple((e + "wi",) for e in experts), (c.d_ff,)),
            ours + "experts.down": Experts(tuple((e + "wo",) for e in experts), (c.d_model,)),
        }


_TINY = Config(
    320, 32, 2, 0, 4, 8, 48, max_positions=128, n_buckets=8, max_distance=16, n_experts=4,
    n_sparse_layers=1, n_sparse_decoder_layers=1,
)  # fmt: skip
_BASE_8 = Config(32128, 768, 12, 12, 12, 64, 3072, n_sparse_layers=6, n_sparse_decoder_layers=6)

PRESETS = {
    "tiny": _TINY,
    "tiny-all": replace(_TINY, n_layers=3, n_decoder_layers=2, n_sparse_layers=3, n_sparse_decoder_layers=2, router_bias=True),
    "tiny-one": replace(_TINY, n_layers=3, n_decoder_layers=3, n_experts=1, n_sparse_decoder_layers=2, feed_forward="gelu"),
    "switch-base-8": _BASE_8,
    "switch-base-32": replace(_BASE_8, n_experts=32),
    "switch-base-128": replace(_BASE_8, n_experts=128),
}
