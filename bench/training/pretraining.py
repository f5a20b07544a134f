"""Packed rows of one length: time of a step on both sides."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import torch
from torch import Tensor

from athanor.core.device import Precision
from athanor.objectives import next_token
from athanor.train.compiled import compile_blocks
from athanor.train.step import gradients
from athanor.types import IGNORE, Batch
from training.rounds import Round, Timing, ratio, repeated, take_turns
from training.sides import LOSS_TOLERANCE, Shape, agree, optimizers_of, our_model, our_step, their_model
from training.trainer import Record, by_position, first_step, trainer

NORM_TOLERANCE = 0.02  # of the gradient norm: bfloat16 rounds differently in differently fused code
WANTED = 1.15
PEER = "Trainer, bf16"


def rows(shape: Shape) -> Tensor:
    """ids (rows, length): every row one document."""
    return torch.randint(0, shape.config.vocab_size, (shape.rows, shape.length), generator=torch.Generator().manual_seed(1))


def as_batch(ids: Tensor) -> Batch:
    """For our side: the last token of a row predicts nothing."""
    labels = torch.full_like(ids, IGNORE)
    labels[:, :-1] = ids[:, 1:]
    return Batch(ids.flatten(), labels.flatten(), torch.full((len(ids),), ids.shape[1]), origin="random rows")


def as_records(ids: Tensor) -> list[Record]:
    """For Trainer, which shifts the labels itself."""
    return [{"input_ids": row, "labels": row} for row in ids.tolist()]


def pretraining(shape: Shape, precision: Precision, timing: Timing, compiled: bool) -> dict[str, Any]:
    """Packed rows: our step beside Trainer's, and where asked both compiled; ratios are to the plain Trainer."""
    ours = our_model(shape.config)
    theirs = their_model(shape.config, ours)
    ids = rows(shape)
    batch, records = as_batch(ids), as_records(ids)
    epoch = [records] * 64  # of one batch over and over
    bf16 = precision == "bf16"
    settings: dict[str, Any] = {"bf16": bf16, "per_device_train_batch_size": shape.rows}
    step = our_step(ours, precision)
    waits: dict[str, list[float]] = {}  # first steps of compiled contenders, seconds

    def compile_ours() -> Round:
        model = our_model(shape.config)
        optimizers = optimizers_of(model, precision)
        first = partial(gradients, model, next_token.loss, [batch], optimizers, precision=precision)
        waits["athanor, compiled"] = [compile_blocks(model, first)]
        return repeated(partial(one, our_step(model, precision)), timing.clock)

    def one(update: Any) -> int:
        update(batch)
        return shape.tokens

    with tempfile.TemporaryDirectory() as folder:
        our_loss, our_norm = step(batch)
        their_loss, their_norm = first_step(theirs, records, by_position, folder, **settings)
        agree("the loss of the first step", our_loss, their_loss, LOSS_TOLERANCE)
        agree("the gradient norm of the first step", our_norm, their_norm, NORM_TOLERANCE * their_norm)
        contenders = {
            "athanor": repeated(partial(one, step), timing.clock),
            PEER: trainer(theirs, epoch, by_position, folder, timing.clock, bf16=bf16),
        }
        if compiled:
            contenders["athanor, compiled"] = compile_ours()
            waits[f"{PEER}, torch_compile"] = firsts = []
            peer = their_model(shape.config, ours)
            contenders[f"{PEER}, torch_compile"] = trainer(
                peer, epoch, by_position, folder, timing.clock, bf16=bf16, torch_compile=True, firsts=firsts
            )
        rates = take_turns(contenders, timing)
    return {
        "parameters": ours.n_parameters(),
        "row": shape.length,
        "tokens_per_step": shape.tokens,
        "loss": {"athanor": our_loss, "transformers": their_loss},
        "tokens_per_second": rates,
        "first_step_seconds": {name: max(seconds) for name, seconds in waits.items()},
        "ratio": {name: ratio(rates[name], rates[PEER]) for name in rates},
        "wanted": WANTED,
    }
