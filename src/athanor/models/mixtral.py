"""Mixtral (Jiang et al. 2024): the decoder whose feed-forward blocks are mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from athanor.core.errors import ConfigError
from athanor.models import decoder
from athanor.models.fields import Fields
from athanor.models.keys import Entry, Experts
from athanor.nn import moe


@dataclass(frozen=True)
class Config(decoder.Windowed):
    """Shape of a Mixtral: what every decoder with a window has (`decoder.Windowed`; d_ff is F of one expert), and

    n_experts     experts of a layer
    top_k         how many of them compute a token
    balance_loss  how much the loss that keeps experts equally busy counts for in training
    """

    n_experts: int = 8
    top_k: int = 2
    balance_loss: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        check_experts(self.n_experts, self.top_k)

    def to_hf(self) -> dict[str, Any]:
        own = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": self.window}
        return (
            super().to_hf()
            | own
            | {
                "num_local_experts": self.n_experts,
                "num_experts_per_tok": self.top_k,
                "router_aux_loss_coef": self.balance_loss,
            }
        )

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Config:
        """From the fields of config.json. Raises CheckpointError for what this file does not compute."""
        fields = Fields(values, "mixtral", {"num_experts": "num_local_experts"})
        fields.only("hidden_act", "silu")
        fields.only("layer_types", None)
        fields.only("router_jitter_noise", 0.0)
        shape = decoder.common(fields, 131072, 1_000_000.0) | {"norm_eps": fields.float("rms_norm_eps", 1e-5)}
        return cls(
            **shape,
            window=fields.int("sliding_window", None),
            n_experts=fields.count("num_local_experts", 8),
            top_k=fields.int("num_experts_per_tok", 2),
            balance_loss=fields.float("router_aux_loss_coef", 0.001),
        )


def check_experts(n_experts: int, top_k: int) -> None:
    """Raise ConfigError where a token cannot have `top_k` of `n_experts` experts."""
    if n_experts < 1:
        raise ConfigError(f"n_experts ({n_experts}) must be at least 1: 8 is usual")
    if not 1 <= top_k <= n_experts:
        raise ConfigError(f"top_k ({top_k}) must be from 1 to n_experts ({n_experts}): 2 is usual")


def expert_keys(
    ours: str, theirs: str, names: tuple[str, str, str], n_experts: int, d_expert: int, d_model: int
) -> dict[str, str | Entry]:
    """The key map of a router and its experts, whose matrices (gate, up, down) are modules of these names in a file."""
    gate, up, down = names
    experts = [f"{theirs}experts.{e}." for e in range(n_experts)]
    return {
        ours + "router": theirs + "gate",
        ours + "experts.gate_up": Experts(tuple((e + gate, e + up) for e in experts), (d_expert, d_expert)),
        ours + "experts.down": Experts(tuple((e + down,) for e in experts), (d_model,)),
    }


_TINY = Config(320, 32, 2, 4, 2, 48, 128, 1_000_000.0, tied=False, n_experts=4)

PRESETS = {
    "tiny": _TINY,
    "tiny-window": replace(_TINY, tied=True, window=5, n_experts=3, top_k=3, n_kv_heads=4),
    "tiny-top1": replace(_TINY, n_experts=8, top_k=1, head_dim=16),
    "mixtral-8x7b": Config(32000, 4096, 32, 32, 8, 14336, 32768, 1_000_000.0, tied=False, balance_loss=0.02),
    "mixtral-8x22b": Config(32000, 6144, 56, 48, 8, 16384, 65536, 1_000_000.0, tied=False),
}


class Model(decoder.Decoder):
    """The model; see the module docstring."""

    model_type = "mixtral"
    config: Config

    def make_feed_forward(self, layer: int) -> nn.Module:
        c = self.config
        router = moe.SoftmaxRouter(c.d_model, c.n_experts, c.top_k, normalise=True)
        return moe.MixtureOfExperts(router, moe.Experts(c.n_experts, c.d_model, c.d_ff))

    def router_loss(self) -> Tensor:
        """balance_loss times the load-balance loss of all layers. Raises ConfigError before a forward pass."""
        return self.config.balance_loss * moe.aux_losses(self)["load_balance"]

    def block_keys(self, layer: int, ours: str, theirs: str) -> dict[str, str | Entry]:
        c = self.config
        keys = super().block_keys(layer, ours, theirs)
        ours, theirs = ours + "feed_forward.", theirs + "block_sparse_moe."
        kept = {name: place for name, place in keys.items() if not name.startswith(ours)}
        return kept | expert_keys(ours, theirs, ("w1", "w3", "w2"), c.n_experts, c.d_ff, c.d_model)
