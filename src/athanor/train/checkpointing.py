"""Activation checkpointing: what the backward pass needs of a block is computed again instead of kept (Chen et al. 2016).

| how       | kept of a block                                        | computed again                                    |
| --------- | ------------------------------------------------------ | ------------------------------------------------- |
| full      | its input                                              | everything                                        |
| selective | its input and what products with weights give          | the rest: norms, activations, attention, experts  |

Losses and gradients are the same, bit by bit, random numbers included. Two things stay behind: recurrent layers multiply inside
of their kernels, so `selective` computes them again whole; and where the blocks of a stack share the biases of relative positions
(T5), the first of them, which makes these, keeps all it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as checkpointed

from athanor.core.errors import ConfigError, nearest
from athanor.nn.feedforward import FeedForward, GatedFeedForward
from athanor.nn.moe import MixtureOfExperts
from athanor.nn.recurrent import Recurrent
from athanor.nn.sdpa import Scoring

How = Literal["full", "selective"]
_LISTS = ("blocks", "layers")  # by these names models have their blocks


def stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of blocks of a model of any architecture, an encoder's before a decoder's. Raises ConfigError without any."""
    named = model.named_modules()
    found = [m for name, m in named if name.rpartition(".")[2] in _LISTS and isinstance(m, nn.ModuleList) and len(m)]
    if not found:
        raise ConfigError(f"{type(model).__module__} has no blocks, so there is nothing to do block by block: leave this out")
    return found


def checkpoint(model: nn.Module, how: How) -> None:
    """Make the blocks of a model, in place, keep less for the backward pass. Where no gradients are wanted nothing changes.

    Raises:
        ConfigError: an unknown `how`; a model without blocks, or whose blocks are checkpointed or compiled already.
    """
    if how not in get_args(How):
        known = get_args(How)
        raise ConfigError(f"checkpointing ({how!r}) must be {' or '.join(known)}{nearest(how, known)}")
    for stack in stacks(model):
        for block in stack:
            if isinstance(block.forward, Lean):
                raise ConfigError("the blocks of this model are checkpointed already: do it once")
            if block._compiled_call_impl is not None:
                raise ConfigError("the blocks of this model are compiled already: checkpoint them first, then compile")
            block.forward = Lean(block, how, block is stack[0])
            for module in block.modules():
                if isinstance(module, (FeedForward, GatedFeedForward)):
                    module.recompute = False  # once is enough


class Lean:
    """The forward of a block that keeps less."""

    def __init__(self, block: nn.Module, how: How, first: bool) -> None:
        self.block, self.whole, self.first = block, block.forward, first
        self.selective = how == "selective" and not isinstance(block, Recurrent)

    def __call__(self, *args: Any, **options: Any) -> Any:
        everything = (*args, *options.values())
        if not torch.is_grad_enabled() or (self.first and any(isinstance(x, Scoring) and x.bias is not None for x in everything)):
            return self.whole(*args, **options)
        return checkpointed(self.whole, *args, use_reentrant=False, context_fn=self._contexts, **options)

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Around the first computation, and around the second."""
        first: AbstractContextManager[Any] = nullcontext()
        second: AbstractContextManager[Any] = nullcontext()
        if self.selective:
            first, second = create_selective_checkpoint_contexts(_policy)
        return first, _again(self.block, second)


@contextmanager
def _again(block: nn.Module, inner: AbstractContextManager[Any]) -> Iterator[None]:
    """A second computation counts no tokens of experts: what a block remembers of its first one stays."""
    mixtures = [m for m in block.modules() if isinstance(m, MixtureOfExperts)]
    before = [(m, m.last, m.load.clone(), m.dropped.clone()) for m in mixtures]
    try:
        with inner:
            yield
    finally:
        for m, last, load, dropped in before:
            m.last = last
            m.load.copy_(load)
            m.dropped.copy_(dropped)


def _kept() -> set[Any]:
    ops = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        ops.add(torch.ops.mkldnn._linear_pointwise.default)
    return ops


_KEPT = _kept()


def _policy(ctx: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    # Batched products are those of attention, whose scores are what takes most room; grouped ones are changed in place later.
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
