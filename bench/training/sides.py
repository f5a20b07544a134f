"""The two sides: the same model, weights, optimiser and update, here and in transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from athanor.core.device import Precision
from athanor.core.errors import VerificationError
from athanor.models import llama
from athanor.objectives import next_token
from athanor.optim.build import OptimConfig, build
from athanor.train.step import train_step
from athanor.types import Batch

OPTIM = OptimConfig(name="adamw", lr=1e-4, weight_decay=0.0)
CLIP = 1.0
LOSS_TOLERANCE = 1e-3  # nats


@dataclass(frozen=True)
class Shape:
    """What is trained: a model, rows of `length` tokens, `rows` of them a step; `conversations` to tune on.

    They are ragged ones, and where `skills` is true in another set skills.
    """

    config: llama.Config
    length: int
    rows: int
    conversations: int
    skills: bool = False

    @property
    def tokens(self) -> int:
        return self.length * self.rows


def agree(what: str, ours: float, theirs: float, tolerance: float) -> None:
    """Raises VerificationError unless both sides computed the same number."""
    if not abs(ours - theirs) <= tolerance:
        raise VerificationError(
            f"{what} is {ours:.6f} here and {theirs:.6f} in transformers, but must agree within {tolerance:.3g} for their"
            " speeds to be comparable: see which of the two changed (tests/models/test_parity.py compares them layer by layer)"
        )


def our_model(config: llama.Config) -> llama.Model:
    """Weights of a fresh model, but no zeros: blocks that do nothing would agree whatever they compute."""
    generator = torch.Generator().manual_seed(0)
    model = llama.Model(config)
    model.initialise(generator)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                p.normal_(std=0.5 * p.shape[1] ** -0.5, generator=generator)
    return model.train()


def their_model(config: llama.Config, ours: llama.Model | None = None) -> Any:
    """transformers' model of the same shape, with the weights of `ours` where given."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    fields = {k: v for k, v in config.to_hf().items() if k != "model_type"}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**fields), dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    if ours is not None:
        left = model.load_state_dict(ours.to_hf(dict(ours.state_dict())), strict=False)
        assert not left.unexpected_keys and set(left.missing_keys) <= {"lm_head.weight"}, left  # tied: no tensor of its own
        assert sum(p.numel() for p in model.parameters()) == ours.n_parameters()
    return model.train()


def optimizers_of(model: llama.Model, precision: Precision) -> list[torch.optim.Optimizer]:
    """Ours for a model."""
    return build(model, OPTIM, bf16=precision == "bf16")


def our_step(model: llama.Model, precision: Precision) -> Callable[[Batch], tuple[float, float]]:
    """Batch -> loss and gradient norm of one update."""
    optimizers = optimizers_of(model, precision)

    def step(batch: Batch) -> tuple[float, float]:
        result = train_step(model, next_token.loss, [batch], optimizers, lr_factor=1.0, clip=CLIP, precision=precision)
        return result.loss, result.grad_norm

    return step
