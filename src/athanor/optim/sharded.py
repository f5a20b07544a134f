"""Tensors that several processes hold parts of (DTensor): what an optimiser needs to work on whole matrices all the same."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is one of the tensors that are spread over processes."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it, sharing memory; the tensor itself where it is an ordinary one."""
    if not isinstance(tensor, DTensor):
        return tensor
    held: Tensor = tensor.to_local()
    return held


def gradient(parameter: Tensor) -> Tensor:
    """The gradient of a parameter, spread over processes as the parameter is."""
    assert parameter.grad is not None
    grad = parameter.grad
    if isinstance(parameter, DTensor) and isinstance(grad, DTensor) and grad.placements != parameter.placements:
        grad = grad.redistribute(parameter.device_mesh, parameter.placements)
    return grad


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The tensor of which processes hold `part`, spread as `like` is; `part` itself where that is an ordinary tensor.

    Every process takes part, so all must ask for the same tensors in the same order.
    """
    if not isinstance(like, DTensor):
        return part
    shape, stride = like.size(), like.stride()
    spread = DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)
    gathered: Tensor = spread.full_tensor()
    return gathered


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """The inverse of `whole`: what this process holds of a tensor that every process has whole. Nothing is communicated."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    spread = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return local(spread.redistribute(mesh, like.placements))


def mean_square(tensor: Tensor) -> Tensor:
    """The mean of the squares of an ordinary tensor, a scalar; 0 of an empty one."""
    return tensor.square().mean() if tensor.numel() else torch.zeros((), device=tensor.device)
