"""Packed rows of one length: time of a step on both sides."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from athanor.core.device import Precision
from athanor.models import llama
from athanor.objectives import next_token
from athanor.train.compiled import compile_blocks
from athanor.train.step import gradients
from athanor.types import IGNORE, Batch
from training.rounds import Round, Timing, elsewhere, fastest, ratio, repeated, take_turns
from training.sides import LOSS_TOLERANCE, Shape, agree, optimizers_of, our_model, our_step, their_model
from training.trainer import Record, by_position, first_step, trainer

NORM_TOLERANCE = 0.02  # of the gradient norm: bfloat16 rounds differently in differently fused code
WANTED = 1.15
PEER = "Trainer"
PEER_COMPILED, OURS_COMPILED = f"{PEER}, torch_compile", "athanor, compiled"


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


def peers(
    shape: Shape, precision: Precision, clock: Callable[[], float], compiled: bool, folder: str
) -> tuple[dict[str, Round], dict[str, float]]:
    """Trainer, plain and where asked compiled, and how long that one's first step took."""
    records = as_records(rows(shape))
    epoch = [records] * 64  # of one batch over and over
    settings: dict[str, Any] = {"bf16": precision == "bf16"}

    def contender(**more: Any) -> Round:
        model = their_model(shape.config, our_model(shape.config))
        return trainer(model, epoch, by_position, folder, clock, **settings, **more)

    made, waits = {PEER: contender()}, {}
    if compiled:
        firsts: list[float] = []
        made[PEER_COMPILED] = contender(torch_compile=True, firsts=firsts)
        made[PEER_COMPILED](0.0)
        waits[PEER_COMPILED] = firsts[0]
    return made, waits


def compile_ours(shape: Shape, batch: Batch, precision: Precision) -> tuple[llama.Model, float]:
    """Our model, compiled, and how long its first step took."""
    model = our_model(shape.config)
    first = partial(gradients, model, next_token.loss, [batch], optimizers_of(model, precision), precision=precision)
    return model, compile_blocks(model, first)


def pretraining(shape: Shape, precision: Precision, timing: Timing, compiled: bool, tuned: bool) -> dict[str, Any]:
    """Packed rows: our step beside Trainer's, and where asked both compiled; ratios are to the plain Trainer and to the best.

    `tuned`: whether Trainer gets our settings of the allocator.
    """
    ours = our_model(shape.config)
    ids = rows(shape)
    batch = as_batch(ids)
    step = our_step(ours, precision)

    def one(update: Any) -> int:
        update(batch)
        return shape.tokens

    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"bf16": precision == "bf16", "per_device_train_batch_size": shape.rows}
        theirs = their_model(shape.config, ours)
        our_loss, our_norm = step(batch)
        their_loss, their_norm = first_step(theirs, as_records(ids), by_position, folder, **settings)
        del theirs
        agree("the loss of the first step", our_loss, their_loss, LOSS_TOLERANCE)
        agree("the gradient norm of the first step", our_norm, their_norm, NORM_TOLERANCE * their_norm)
        contenders = {"athanor": repeated(partial(one, step), timing.clock)}
        waits: dict[str, float] = {}
        if compiled:
            model, waits[OURS_COMPILED] = compile_ours(shape, batch, precision)
            contenders[OURS_COMPILED] = repeated(partial(one, our_step(model, precision)), timing.clock)
        with elsewhere(peers, shape, precision, timing.clock, compiled, folder, tuned=tuned) as (peer, waited):
            rates = take_turns(contenders | peer, timing)
    best = fastest(rates, peer)
    return {
        "parameters": ours.n_parameters(),
        "row": shape.length,
        "tokens_per_step": shape.tokens,
        "loss": {"athanor": our_loss, "transformers": their_loss},
        "tokens_per_second": rates,
        "first_step_seconds": waits | waited,
        "ratio": {name: ratio(rates[name], rates[PEER]) for name in rates},
        "best_peer": best,
        "ratio_to_best": {name: ratio(rates[name], rates[best]) for name in rates},
        "wanted": WANTED,
    }
