"""Backward passes that are written by hand give first derivatives; of second ones they would be silently wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_only(backward: Backward) -> Backward:
    """The backward pass of an `autograd.Function` which has no derivative of its own.

    PyTorch builds a graph of a backward pass only for `create_graph=True`. What was kept by the forward pass counts as constant
    there, so its gradients would lack terms without a word; `once_differentiable` refuses only where the gradient that comes in
    needs one itself.

    Raises:
        RuntimeError: a graph of the backward pass is asked for.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            name = type(ctx).__name__.removesuffix("Backward").lstrip("_")
            raise RuntimeError(
                f"{name} gives first derivatives only, and create_graph=True asks for more: leave it out, or take finite"
                " differences of the first ones"
            )
        return backward(ctx, *grads)

    return checked
