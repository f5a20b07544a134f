"""Bytes of tensors that are alive, counted operation by operation, of real tensors and of tensors without data.

A step that runs on fake tensors (`torch._subclasses.FakeTensorMode`: shapes and dtypes, no memory) makes and frees what the real
step makes and frees: it is the real code. So its peak is not a formula that has to follow the code, and a model of any size is
planned on any machine. What is left out is what no tensor holds: scratch inside kernels, and holes in the allocator's heap.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from athanor.nn import sdpa

_aten = torch.ops.aten
# What a rehearsal raises where shapes hang on values that only data would say.
UNFORESEEN = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True)
class Block:
    """Memory of one tensor and of its views.

    size   bytes
    part   what was being done when it was made (`Live.part`)
    width  the last dimension of the tensor that was made
    """

    size: int
    part: str
    width: int


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on, for as long as they live. Views and in-place results count once.

    Attributes:
        now, peak: bytes.
        blocks: what is alive, by a number of its own.
        at_peak: what was alive at the peak.
        part: written on what is made from now on.
        weights: numbers of weights; casts of these are called "casts", whatever the part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.blocks: dict[int, Block] = {}
        self.at_peak: dict[int, Block] = {}
        self.weights: set[int] = set()
        self.part = "working"
        self._numbers: dict[int, int] = {}  # of storages, by their address, which is used again
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._run(func, args, kwargs or {})
        part = self.part
        if func is _aten._to_copy.default and self.number(args[0]) in self.weights:
            part = "casts"
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.see(tensor, part)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def number(self, tensor: Tensor) -> int | None:
        """The number of a tensor's memory; None for what was not seen."""
        return self._numbers.get(tensor.untyped_storage()._cdata)

    def see(self, tensor: Tensor, part: str) -> int:
        """Count a tensor, if it is a new one; its number."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._numbers:
            return self._numbers[key]
        self._next += 1
        number = self._numbers[key] = self._next
        size = 0 if tensor.device.type == "meta" and not isinstance(tensor, FakeTensor) else storage.nbytes()
        self.blocks[number] = Block(size, part, tensor.shape[-1] if tensor.ndim else 1)
        self.now += size
        weakref.finalize(storage, self._drop, key, number)
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, dict(self.blocks)
        return number

    def _drop(self, key: int, number: int) -> None:
        del self._numbers[key]
        self.now -= self.blocks.pop(number).size

    def restart(self) -> None:
        """The peak is what is alive now."""
        self.peak, self.at_peak = self.now, dict(self.blocks)


class Rehearsal(Live):
    """`Live` over fake tensors, with an answer to what only data could say: a loss is finite, every mask is true, every count 0.

    What is computed of real tensors alone (lengths, labels) is computed.
    """

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if given and not any(isinstance(x, FakeTensor) for x in given) and all(x.device.type == "cpu" for x in given):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is _aten._local_scalar_dense.default:
            kind = args[0].dtype
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else 0
        if func is _aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        if func is _aten.bincount.default:  # of experts, whose number is the least length
            return args[0].new_empty(args[-1] if len(args) > 2 else kwargs.get("minlength", 1), dtype=torch.int64)
        if func is _aten._grouped_mm.default:  # its shape rule knows bfloat16 alone, the CPU's kernel more
            a, b = args[:2]
            groups = (args[2] if len(args) > 2 else kwargs["offs"]).shape if a.ndim == b.ndim == 2 else ()
            return a.new_empty((*groups, a.shape[-2], b.shape[-1]))
        return func(*args, **kwargs)


@contextmanager
def rehearsing(fused: bool = False) -> Iterator[Rehearsal]:
    """Within it tensors have no data, and what is made is counted. Masks that were kept do not cross its border.

    `fused`: attention of every length takes the fused kernel, as it does on GPUs.
    """
    sdpa.forget_masks()
    explicit = sdpa._EXPLICIT_MAX
    try:
        sdpa._EXPLICIT_MAX = -1 if fused else explicit
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), Rehearsal() as live:
            # Asked by optimisers whether two tensors are one: here they never are.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield live
    finally:
        sdpa._EXPLICIT_MAX = explicit
        sdpa.forget_masks()


def shadow(model: nn.Module, live: Live, convert: Callable[[Tensor], torch.dtype] | None = None) -> Any:
    """A copy of `model` whose parameters and buffers are new tensors on the CPU: of no data, within `rehearsing`.

    Args:
        model: on any device or none; unchanged.
        convert: parameter -> the dtype that its copy has; its own by default.
    """
    memo: dict[int, Any] = {}
    live.part = "weights"
    for p in model.parameters():
        dtype = convert(p) if convert else p.dtype
        twin = nn.Parameter(torch.empty(p.shape, dtype=dtype, device="cpu"), requires_grad=p.requires_grad)
        memo[id(p)] = twin
        live.weights.add(live.see(twin, "weights"))
    for b in model.buffers():
        memo[id(b)] = torch.empty(b.shape, dtype=b.dtype, device="cpu")
    with unset_fake_temporarily():  # small tables that are neither are copied as they are
        return copy.deepcopy(model, memo)


@dataclass(frozen=True)
class Composition:
    """What is alive at the peak of a step.

    peak    bytes
    blocks  of which it is made; `part` is one of PARTS
    """

    peak: int
    blocks: tuple[Block, ...]

    def of(self, part: str) -> int:
        """Bytes of one part."""
        return sum(block.size for block in self.blocks if block.part == part)


PARTS = ("weights", "gradients", "optimizer", "casts", "activations", "loss", "working")


def compose(live: Live, parameters: Sequence[Tensor], state: Set[int]) -> Composition:
    """The peak of `live`: gradients are told by the parameters that have them now, `state` are numbers of the optimiser's."""
    gradients = {live.number(p.grad) for p in parameters if p.grad is not None}

    def part(number: int, block: Block) -> str:
        return "gradients" if number in gradients else "optimizer" if number in state else block.part

    blocks = tuple(Block(b.size, part(n, b), b.width) for n, b in live.at_peak.items())
    return Composition(live.peak, blocks)
