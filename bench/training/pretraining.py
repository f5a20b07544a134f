"""Packed rows of one length: time and memory of a step on both sides."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from athanor.core.device import Precision, peak_memory, tune_allocator
from athanor.types import Batch
from training.rounds import ratio, repeated, take_turns
from training.sides import LOSS_TOLERANCE, Shape, agree, our_model, our_step, their_model, their_step

NORM_TOLERANCE = 0.02  # of the gradient norm: bfloat16 rounds differently in differently fused code
WANTED = 1.1


def rows(shape: Shape) -> tuple[Tensor, Tensor]:
    """ids and labels (rows, length): every row one document, every position supervised."""
    generator = torch.Generator().manual_seed(1)
    window = torch.randint(0, shape.config.vocab_size, (shape.rows, shape.length + 1), generator=generator)
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def as_batch(shape: Shape, ids: Tensor, labels: Tensor) -> Batch:
    return Batch(ids.flatten(), labels.flatten(), torch.full((shape.rows,), shape.length), origin="random rows")


def pretraining(shape: Shape, precision: Precision, seconds: float) -> dict[str, Any]:
    """Packed rows: our step beside transformers'."""
    ours = our_model(shape.config)
    theirs = their_model(shape.config, ours)
    ids, labels = rows(shape)
    athanor, transformers = our_step(ours, precision), their_step(theirs, precision)
    batch = as_batch(shape, ids, labels)
    (our_loss, our_norm), (their_loss, their_norm) = athanor(batch), transformers(ids, labels)
    agree("the loss of the first step", our_loss, their_loss, LOSS_TOLERANCE)
    agree("the gradient norm of the first step", our_norm, their_norm, NORM_TOLERANCE * their_norm)

    def one(step: Callable[[], Any]) -> int:
        step()
        return shape.tokens

    contenders = {
        "athanor": repeated(partial(one, partial(athanor, batch))),
        "transformers": repeated(partial(one, partial(transformers, ids, labels))),
    }
    rates = take_turns(contenders, seconds)
    return {
        "parameters": ours.n_parameters(),
        "row": shape.length,
        "tokens_per_step": shape.tokens,
        "loss": {"athanor": our_loss, "transformers": their_loss},
        "tokens_per_second": rates,
        "ratio": ratio(rates["athanor"], rates["transformers"]),
        "wanted": WANTED,
    }


def step_memory(side: str, shape: Shape, precision: Precision) -> int:
    """Bytes that two steps add to the peak of this process, the model being there: gradients, optimiser, activations."""
    tune_allocator()
    ids, labels = rows(shape)
    if side == "athanor":
        step: Callable[[], Any] = partial(our_step(our_model(shape.config), precision), as_batch(shape, ids, labels))
    else:
        step = partial(their_step(their_model(shape.config), precision), ids, labels)
    before = peak_memory()
    step()
    step()
    return peak_memory() - before


def memory(shapes: Mapping[str, Shape], precision: Precision) -> dict[str, dict[str, int]]:
    """`step_memory` of every shape and side, each in a process of its own.

    To be called first: Linux starts a new process off with the peak of the one that it came from.
    """
    found: dict[str, dict[str, int]] = {name: {} for name in shapes}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name, shape in shapes.items():
            for side in ("athanor", "transformers"):
                found[name][side] = pool.apply(step_memory, (side, shape, precision))
    return found
