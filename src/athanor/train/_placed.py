"""What a process holds of a run's tensors, under the names that they have in a checkpoint, and reading it back in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from athanor.core import dist
from athanor.core.errors import CheckpointError
from athanor.models.base import LanguageModel
from athanor.train._boxes import Box
from athanor.train._written import Checkpoint, listed
from athanor.train.parallel import base
from athanor.train.parallel.base import Alone
from athanor.train.pieces import Held, whole

Owned = tuple[torch.optim.Optimizer, dict[str, Any], nn.Parameter]  # an optimiser, its group, a parameter of that
_OWN = ("model", "optimizer", "rng")


def local(tensor: Tensor) -> Tensor:
    """What this process has in memory of a tensor, for no gradient to see."""
    return base.local(tensor).detach()


def tensors(model: nn.Module, strategy: Alone, extra: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[Tensor, Held]]]:
    """Weights and buffers as model.<name>, and `extra`: the local tensor and which part of the whole it is.

    Raises CheckpointError for a state that is no tensor.
    """
    state: dict[str, Tensor] = model.state_dict()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"the model's state {name!r} is a {type(tensor).__name__}: checkpoints hold tensors only")
        yield f"model.{name}", (local(tensor), strategy.held(name, tensor))
    for full, tensor in extra.items():
        kind, _, name = full.partition(".")
        assert name and kind not in _OWN, f"{full!r} must be <kind>.<name>, of a kind other than {', '.join(_OWN)}"
        mine = local(tensor)
        like = name in state and local(state[name]).shape == mine.shape
        yield full, (mine, strategy.held(name, state[name]) if like else whole(mine, writes=dist.is_main()))


def parameters(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Owned]:
    """The optimised parameters by name. Raises CheckpointError where an optimiser has one that is not the model's."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Owned] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) not in names:
                    raise CheckpointError(
                        f"{type(optimizer).__name__} trains a parameter of shape {tuple(p.shape)} that the model lacks, so a"
                        " checkpoint has no name for its state: make it part of the model"
                    )
                found[names[id(p)]] = (optimizer, group, p)
    return found


def owner(name: str) -> tuple[str, str]:
    """(parameter, key) of optimizer.<parameter>.<key>."""
    parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
    return parameter, key


def state_held(name: str, value: Tensor, owned: Owned, held: Held) -> Held:
    """Which part of the whole an optimiser's tensor is: held like its parameter where the shapes are equal, else a whole one.

    Tensors of the keys in the optimiser's attribute `whole_state`, where it has one, are of the whole parameter and the same on
    every process (factors of Adafactor). Of those that hold a part of the parameter, the one with its first element writes.
    """
    if not _of_whole(name, owned) and value.shape == local(owned[2]).shape:
        return held
    _refuse_part(name, tuple(value.shape), owned, held)
    first = any(not any(piece.whole) and Box(piece.whole, piece.size).volume for piece in held.pieces)
    return whole(value, writes=held.writes and first)


def _of_whole(name: str, owned: Owned) -> bool:
    return owner(name)[1] in getattr(owned[0], "whole_state", ())


def _refuse_part(name: str, shape: tuple[int, ...], owned: Owned, held: Held) -> None:
    """A tensor that is neither a scalar nor like its parameter says something of the whole only where its optimiser sees that."""
    sees_whole = _of_whole(name, owned) and tuple(owned[2].shape) == held.shape
    if any(n != 1 for n in shape) and not sees_whole and any(piece.size != held.shape for piece in held.pieces):
        raise CheckpointError(
            f"{name} of shape {shape} is neither a scalar nor of its parameter's shape {held.shape}, of which this process holds"
            " only a part: use an optimiser whose state is of these kinds, or a layout that splits no parameter"
        )


def check_held(name: str, tensor: Tensor, held: Held) -> None:
    """An invariant of strategies: pieces are all of the local tensor."""
    filled = sum(Box(piece.local, piece.size).volume for piece in held.pieces)
    assert filled == tensor.numel(), f"{name}: pieces have {filled} elements and the local tensor {tensor.numel()}"


def misfits(checkpoint: Checkpoint, wanted: Mapping[str, tuple[Tensor, Held]], floats: bool = False) -> list[str]:
    """What of `wanted` the checkpoint lacks, or has with another shape or dtype (between floating ones only if `floats`)."""
    stored = checkpoint.tensors
    missing, misshaped, mistyped = [], [], []
    for name, (tensor, held) in wanted.items():
        if name not in stored:
            missing.append(name)
        elif stored[name].shape != held.shape:
            misshaped.append(f"{name} is {stored[name].shape} and must be {held.shape}")
        elif not _converts(stored[name].dtype, tensor.dtype, floats):
            mistyped.append(f"{name} is {stored[name].dtype} and must be {tensor.dtype}")
    kinds = (("missing", missing), ("misshaped", misshaped), ("of another dtype", mistyped))
    return [f"{kind}: {listed(names)}" for kind, names in kinds if names]


def _converts(a: torch.dtype, b: torch.dtype, floats: bool) -> bool:
    return a == b or (floats and a.is_floating_point and b.is_floating_point)


def read(checkpoint: Checkpoint, name: str, tensor: Tensor, held: Held) -> None:
    """Fill a local tensor with its part of a stored one."""
    check_held(name, tensor, held)
    for piece in held.pieces:
        box = Box(piece.local, piece.size)
        checkpoint.read(name, Box(piece.whole, piece.size), tensor[box.within((0,) * tensor.ndim)])


@dataclass(frozen=True)
class Wanted:
    """A tensor of an optimiser's state to be read: whose it is, how it is held, whether it is like its parameter."""

    owned: Owned
    held: Held
    like: bool


def state_plan(checkpoint: Checkpoint, params: Mapping[str, Owned], strategy: Alone) -> dict[str, Wanted]:
    """The optimisers' tensors that this process wants, by name.

    Raises CheckpointError for one that a part of its parameter cannot have.
    """
    plan: dict[str, Wanted] = {}
    helds = {name: strategy.held(name, p) for name, (_, _, p) in params.items()}
    for name, stored in checkpoint.tensors.items():
        parameter, _ = owner(name)
        if not name.startswith("optimizer.") or parameter not in params:
            continue
        held = helds[parameter]
        like = stored.shape == held.shape and not _of_whole(name, params[parameter])
        if not like:
            _refuse_part(name, stored.shape, params[parameter], held)
            held = whole(torch.empty(stored.shape, device="meta"))
        plan[name] = Wanted(params[parameter], held, like)
    return plan


def read_states(checkpoint: Checkpoint, params: Mapping[str, Owned], plan: Mapping[str, Wanted]) -> None:
    """Give the optimisers the state of the checkpoint, in place of what they have."""
    for optimizer, _, _ in params.values():
        optimizer.state.clear()
    for name, wanted in plan.items():
        stored = checkpoint.tensors[name]
        optimizer, group, p = wanted.owned
        if wanted.like:
            value = torch.zeros_like(p, dtype=stored.dtype)
        else:  # where torch's optimisers have it
            on_device = stored.shape or group.get("fused") or group.get("capturable")
            value = torch.zeros(stored.shape, dtype=stored.dtype, device=p.device if on_device else "cpu")
        read(checkpoint, name, local(value), wanted.held)
        optimizer.state[p][owner(name)[1]] = value
    for name, number in checkpoint.manifest["numbers"].items():
        parameter, key = owner(name)
        if parameter in params:
            optimizer, _, p = params[parameter]
            optimizer.state[p][key] = number


def copy_from(source: LanguageModel, model_type: str, wanted: Mapping[str, tuple[Tensor, Held]], folder: Path) -> None:
    """Fill the local tensors of a model of `model_type` from a whole one, read from `folder`.

    Raises CheckpointError naming what does not fit.
    """
    there = {f"model.{name}": tensor for name, tensor in source.state_dict().items()}
    faults = []
    if source.model_type != model_type:
        faults.append(f"it is a {source.model_type} and must be a {model_type}")
    missing = sorted(name for name in wanted if name not in there)
    misshaped = [
        f"{name} is {tuple(there[name].shape)} and must be {held.shape}"
        for name, (_, held) in wanted.items()
        if name in there and tuple(there[name].shape) != held.shape
    ]
    everyone = {name for names in of_all(sorted(wanted)) for name in names}
    unexpected = sorted(there.keys() - everyone)
    kinds = (("missing", missing), ("misshaped", misshaped), ("unexpected", unexpected))
    faults += [f"{kind}: {listed(names)}" for kind, names in kinds if names]
    if faults:
        raise CheckpointError(f"{folder} does not fit the model: {'; '.join(faults)}. Use its own config")
    for name, (tensor, held) in wanted.items():
        check_held(name, tensor, held)
        for piece in held.pieces:
            inner, outer = Box(piece.local, piece.size), Box(piece.whole, piece.size)
            origin = (0,) * tensor.ndim
            tensor[inner.within(origin)].copy_(there[name][outer.within(origin)])


def from_first(value: Any) -> Any:
    """What process 0 has, on every process. Collective: for the main thread only."""
    if dist.world_size() == 1:
        return value
    import torch.distributed

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def of_all(value: Any) -> list[Any]:
    """What every process has, by rank. Collective: for the main thread only."""
    if dist.world_size() == 1:
        return [value]
    import torch.distributed

    found: list[Any] = [None] * dist.world_size()
    torch.distributed.all_gather_object(found, value)
    return found
