"""Dropout for any architecture, by hooks: models have none of their own (Srivastava et al. 2014)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from athanor.core.errors import ConfigError
from athanor.nn.recurrent import Recurrent
from athanor.train.checkpointing import stacks

_BRANCHES = ("attention", "cross", "feed_forward")  # by these names blocks have what they add to the residual stream


def dropout(model: nn.Module, p: float) -> Callable[[], None]:
    """Residual dropout: while training, entries are set to zero with probability p and the others divided by 1 - p.

    It works on what blocks add to the residual stream, that is on what attention, cross attention and feed-forward blocks (all
    experts of a mixture together) give, and on what the first block of a stack reads: the embeddings, with positions and norm
    where there are (Vaswani et al. 2017, section 5.4). Of recurrent models it works on what each layer reads and on what the last
    one gives, never from step to step (Zaremba et al. 2014). Random numbers are those of torch's global generator.

    Args:
        model: changed in place; its weights and what it computes in evaluation stay as they are.
        p: in [0, 1); 0 does nothing.

    Returns:
        A function that takes the dropout away.

    Raises:
        ConfigError: p out of range; a model without blocks.
    """
    if not 0 <= p < 1:
        raise ConfigError(f"dropout ({p}) must lie in [0, 1): 0.1 is usual")
    readers, givers = [], []
    for stack in stacks(model):
        readers.append(stack[0])
        if isinstance(stack[0], Recurrent):
            readers += stack[1:]
            givers.append(stack[-1])
        parts = [getattr(block, name, None) for block in stack for name in _BRANCHES]
        givers += [part for part in parts if isinstance(part, nn.Module)]
    handles: list[RemovableHandle] = []
    if p:
        handles += [module.register_forward_pre_hook(partial(_input, p)) for module in readers]
        handles += [module.register_forward_hook(partial(_output, p)) for module in givers]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _input(p: float, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    return (F.dropout(args[0], p), *args[1:]) if module.training else None


def _output(p: float, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
    if not module.training:
        return None
    if isinstance(out, Tensor):
        return F.dropout(out, p)
    return (F.dropout(out[0], p), *out[1:])  # of a recurrent layer, with its state
