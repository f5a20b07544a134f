"""Memory of a training step on both sides, at a vocabulary of one size and Trainer's default batch."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from athanor.core.device import Precision, peak_memory, tune_allocator
from training.conversations import TRAINER_BATCH
from training.pretraining import as_batch, as_records, rows
from training.sides import Shape, our_model, our_step, their_model
from training.trainer import by_position, worker

VOCABULARY = 32_768
SIDES = ("athanor", "Trainer")
WANTED = 0.6


def step_memory(side: str, shape: Shape, precision: Precision) -> int:
    """Bytes that two steps add to the peak of this process, the model being there: gradients, optimiser, activations.

    Only our side tunes the allocator, as only our recipes do: it makes Trainer faster, but it needs more memory with it.
    """
    ids = rows(shape)
    if side == "athanor":
        tune_allocator()
        update, batch = our_step(our_model(shape.config), precision), as_batch(ids)
        before = peak_memory()
        update(batch)
        update(batch)
        return peak_memory() - before
    settings: dict[str, Any] = {
        "bf16": precision == "bf16",
        "per_device_train_batch_size": shape.rows,
        "max_steps": 2,
    }
    with tempfile.TemporaryDirectory() as folder:
        made = worker(their_model(shape.config), as_records(ids), by_position, folder, **settings)
        before = peak_memory()
        made.train()
        return peak_memory() - before


def memory(shapes: Mapping[str, Shape], precision: Precision) -> dict[str, dict[str, Any]]:
    """`step_memory` of every shape and side, each in a process of its own, and ours by theirs.

    All of them with `TRAINER_BATCH` rows and a vocabulary of `VOCABULARY`.

    To be called first: Linux starts a new process off with the peak of the one that it came from.
    """
    found: dict[str, dict[str, Any]] = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name, shape in shapes.items():
            wide = replace(shape, config=replace(shape.config, vocab_size=VOCABULARY), rows=TRAINER_BATCH)
            needed = {side: pool.apply(step_memory, (side, wide, precision)) for side in SIDES}
            ours, theirs = needed.values()
            found[name] = {"vocabulary": VOCABULARY, "tokens_per_step": wide.tokens, "bytes": needed}
            found[name] |= {"ratio": ours / theirs, "wanted": WANTED}
    return found
