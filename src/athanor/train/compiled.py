"""torch.compile block by block: all blocks of a stack share their compiled graphs, so it costs less than compiling the model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from athanor.core.device import require_compiler
from athanor.core.errors import ConfigError
from athanor.nn.context import Packed
from athanor.nn.experts import Experts
from athanor.train.checkpointing import Lean, stacks


def compile_blocks(model: nn.Module, first: Callable[[], object], backend: str = "inductor") -> float:
    """Compile the blocks of a model in place, after `checkpoint` where they are checkpointed; names and weights stay.

    Compiling happens when blocks run, forward and backward, on the first batch of a kind; it takes from seconds to a minute,
    which longer training earns back (docs/log.md).

    Args:
        model: changed in place.
        first: what makes the blocks run as training will: a step's gradients, say.
        backend: of torch.compile.

    Returns:
        The seconds that `first` took.

    Raises:
        ConfigError: a model without blocks, or with blocks of selective checkpointing.
        MissingExtraError: there is no C++ compiler, and blocks on a CPU need one.
    """
    found = [block for stack in stacks(model) for block in stack]
    if backend == "inductor":
        require_compiler(next(model.parameters()).device, "train")
    if any(isinstance(block.forward, Lean) and block.forward.selective for block in found):
        raise ConfigError(
            "selective checkpointing looks at the operations of a block one by one, and a compiled block shows none:"
            " use full checkpointing, or do not compile"
        )
    _hide()
    for block in found:
        if isinstance(block.forward, Lean):
            block.forward.whole = torch.compile(block.forward.whole, backend=backend)
        else:
            block.compile(backend=backend)
    start = time.perf_counter()
    with warnings.catch_warnings():
        # Dynamo asks every tensor for its gradient, and torch warns that some have none.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor", category=UserWarning)
        first()
    return time.perf_counter() - start


@cache
def _hide() -> None:
    """Compilers are to see two things as one call each, for their shapes are others in every batch: attention over sequences of
    several lengths, which makes rectangles of them, and experts.

    Once in a process, and not where these are defined: asking for it imports PyTorch's compiler.
    """
    Packed.by_groups = torch.compiler.disable(Packed.by_groups)  # type: ignore[method-assign]  # the wrapper is called as the method is
    Experts.forward = torch.compiler.disable(Experts.forward)  # type: ignore[method-assign]  # and so is this one
