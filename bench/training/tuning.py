"""Ragged conversations: our step, which packs them, beside transformers.Trainer, which pads or flattens them."""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from athanor.core.device import Precision
from athanor.data.pack import fill, pack
from athanor.models import llama
from athanor.objectives import next_token
from athanor.tokenizer.chat import Rendered
from training.conversations import TRAINER_BATCH, eight, filled, ragged, records, skills, small_tokenizer
from training.rounds import Round, Timing, ratio, repeated, take_turns
from training.sides import LOSS_TOLERANCE, Shape, agree, our_model, our_step, their_model
from training.trainer import Collate, Record, trainer

WANTED = 2.5

Draw = Callable[[Iterator[Rendered]], list[Rendered]]
Step = Callable[[Any], Any]


def packed(step: Step, conversations: Sequence[Rendered], draw: Draw, clock: Callable[[], float]) -> Round:
    """Our side: `draw` takes the conversations of one step from the endless shuffled order; packing them is timed too."""
    order = cycle(random.Random(1).sample(conversations, len(conversations)))

    def one() -> int:
        chosen = draw(order)
        step(fill(pack(chosen, "conversations")))
        return sum(len(c.ids) for c in chosen)

    return repeated(one, clock)


def batches_of(found: Sequence[Record], size: int, grouped: bool) -> list[list[Record]]:
    """The whole batches of an epoch of Trainer: in random order, or grouped by length as its own sampler does it.

    That sampler puts the long ones of every 50 batches first, of which a short measurement sees nothing else; so the order of
    the batches is shuffled.
    """
    from transformers.trainer_pt_utils import get_length_grouped_indices

    generator = torch.Generator().manual_seed(1)
    if grouped:
        indices = get_length_grouped_indices([len(r["input_ids"]) for r in found], size, generator=generator)
    else:
        indices = torch.randperm(len(found), generator=generator).tolist()
    batches = [[found[i] for i in indices[start : start + size]] for start in range(0, len(found) - size + 1, size)]
    return random.Random(1).sample(batches, len(batches))


def same_loss(ours: llama.Model, theirs: Any, conversations: Sequence[Rendered], collate: Collate) -> None:
    """Packed here, padded or flattened there, the first conversations must give one loss (in fp32, which rounds less)."""
    with torch.no_grad():
        total, count, _ = next_token.loss(ours, pack(conversations[:TRAINER_BATCH], "conversations"))
        batch = collate(records(conversations[:TRAINER_BATCH]))
        agree("the loss of 8 conversations", float(total) / count, float(theirs(**batch).loss), LOSS_TOLERANCE)


def tuning(shape: Shape, conversations: Sequence[Rendered], pad: Collate, precision: Precision, timing: Timing) -> dict[str, Any]:
    """Ragged conversations: our packed step beside Trainer, in tokens that are no padding."""
    from transformers import DataCollatorWithFlattening

    ours = our_model(shape.config)
    theirs = their_model(shape.config, ours)
    flatten = DataCollatorWithFlattening()
    for collate in (pad, flatten):
        same_loss(ours, theirs, conversations, collate)
    step = our_step(ours, precision)
    lengths = [len(c.ids) for c in conversations]
    large = max(1, round(shape.tokens / statistics.mean(lengths)))
    found = records(conversations)
    with tempfile.TemporaryDirectory() as folder:

        def us(draw: Draw) -> Round:
            return packed(step, conversations, draw, timing.clock)

        def peer(size: int, grouped: bool, collate: Collate = pad) -> Round:
            model = their_model(shape.config, ours)
            return trainer(model, batches_of(found, size, grouped), collate, folder, timing.clock, bf16=precision == "bf16")

        contenders: dict[str, Round] = {
            f"Trainer, its batch of {TRAINER_BATCH}": peer(TRAINER_BATCH, grouped=False),
            f"Trainer, {TRAINER_BATCH} grouped by length": peer(TRAINER_BATCH, grouped=True),
            f"Trainer, {TRAINER_BATCH} flattened": peer(TRAINER_BATCH, grouped=False, collate=flatten),
            f"athanor, {TRAINER_BATCH} a step": us(eight),
        }
        if large >= 2 * TRAINER_BATCH:
            contenders[f"Trainer, {large} grouped by length"] = peer(large, grouped=True)
            contenders[f"athanor, {shape.tokens} tokens a step"] = us(partial(filled, shape.tokens))
        rates = take_turns(contenders, timing)
    first, *_ = rates
    best = max((name for name in rates if name.startswith("Trainer")), key=lambda name: statistics.median(rates[name]))
    shuffled = random.Random(1).sample(lengths, len(lengths))
    eights = [shuffled[i : i + TRAINER_BATCH] for i in range(0, len(shuffled), TRAINER_BATCH)]
    return {
        "conversations": len(conversations),
        "mean_length": statistics.mean(lengths),
        "padding_of_eight": 1 - sum(lengths) / sum(max(e) * len(e) for e in eights),
        "tokens_per_second": rates,
        "ratio": {name: ratio(rates[name], rates[first]) for name in rates},
        "best_peer": best,
        "ratio_to_best": {name: ratio(rates[name], rates[best]) for name in rates},
        "wanted": WANTED,
    }


def tuning_sets(shape: Shape, precision: Precision, timing: Timing) -> dict[str, Any]:
    """`tuning` on the ragged mix, and on skills where the shape has them."""
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq

    tokenizer = small_tokenizer(shape.config.vocab_size if shape.skills else 512)  # without skills it only pads
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        pad = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(folder))
    sets = {"skills": skills(tokenizer, shape.conversations)} if shape.skills else {}
    sets["ragged, 16..400 tokens"] = ragged(shape.config.vocab_size, shape.conversations)
    return {name: tuning(shape, data, pad, precision, timing) for name, data in sets.items()}
