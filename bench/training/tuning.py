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
from training.rounds import Round, Timing, elsewhere, fastest, ratio, repeated, take_turns
from training.sides import LOSS_TOLERANCE, Shape, agree, our_model, our_step, their_model
from training.trainer import Collate, Record, trainer

WANTED = 2.5
PEER = f"Trainer, its batch of {TRAINER_BATCH}"

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


def peers(
    config: llama.Config, data: Sequence[Rendered], large: int, precision: Precision, clock: Callable[[], float], folder: str
) -> tuple[dict[str, Round], dict[str, float]]:
    """Trainer with its default batch, padded, grouped by length and flattened, and with batches of `large` grouped ones."""
    from transformers import DataCollatorWithFlattening

    found = records(data)

    def contender(size: int, grouped: bool, collate: Collate) -> Round:
        model = their_model(config, our_model(config))
        return trainer(model, batches_of(found, size, grouped), collate, folder, clock, bf16=precision == "bf16")

    pad = padding(folder)
    made = {
        PEER: contender(TRAINER_BATCH, False, pad),
        f"Trainer, {TRAINER_BATCH} grouped by length": contender(TRAINER_BATCH, True, pad),
        f"Trainer, {TRAINER_BATCH} flattened": contender(TRAINER_BATCH, False, DataCollatorWithFlattening()),
    }
    if large >= 2 * TRAINER_BATCH:
        made[f"Trainer, {large} grouped by length"] = contender(large, True, pad)
    return made, {}


def padding(folder: str) -> Collate:
    """What pads for Trainer, by the tokenizer in `folder`."""
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq

    made: Collate = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(folder))
    return made


def tuning(
    shape: Shape, conversations: Sequence[Rendered], precision: Precision, timing: Timing, folder: str, tuned: bool
) -> dict[str, Any]:
    """Ragged conversations: our packed step beside Trainer, in tokens that are no padding.

    `folder` has a tokenizer; `tuned`: whether Trainer gets our settings of the allocator.
    """
    from transformers import DataCollatorWithFlattening

    ours = our_model(shape.config)
    theirs = their_model(shape.config, ours)
    for collate in (padding(folder), DataCollatorWithFlattening()):
        same_loss(ours, theirs, conversations, collate)
    del theirs
    step = our_step(ours, precision)
    lengths = [len(c.ids) for c in conversations]
    large = max(1, round(shape.tokens / statistics.mean(lengths)))
    contenders = {f"athanor, {TRAINER_BATCH} a step": packed(step, conversations, eight, timing.clock)}
    if large >= 2 * TRAINER_BATCH:
        draw = partial(filled, shape.tokens)
        contenders[f"athanor, {shape.tokens} tokens a step"] = packed(step, conversations, draw, timing.clock)
    given = (shape.config, conversations, large, precision, timing.clock, folder)
    with elsewhere(peers, *given, tuned=tuned) as (peer, _):
        rates = take_turns(peer | contenders, timing)
    best = fastest(rates, peer)
    shuffled = random.Random(1).sample(lengths, len(lengths))
    eights = [shuffled[i : i + TRAINER_BATCH] for i in range(0, len(shuffled), TRAINER_BATCH)]
    return {
        "conversations": len(conversations),
        "mean_length": statistics.mean(lengths),
        "padding_of_eight": 1 - sum(lengths) / sum(max(e) * len(e) for e in eights),
        "tokens_per_second": rates,
        "ratio": {name: ratio(rates[name], rates[PEER]) for name in rates},
        "best_peer": best,
        "ratio_to_best": {name: ratio(rates[name], rates[best]) for name in rates},
        "wanted": WANTED,
    }


def tuning_sets(shape: Shape, precision: Precision, timing: Timing, tuned: bool) -> dict[str, Any]:
    """`tuning` on the ragged mix, and on skills where the shape has them."""
    tokenizer = small_tokenizer(shape.config.vocab_size if shape.skills else 512)  # without skills it only pads
    sets = {"skills": skills(tokenizer, shape.conversations)} if shape.skills else {}
    sets["ragged, 16..400 tokens"] = ragged(shape.config.vocab_size, shape.conversations)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        return {name: tuning(shape, data, precision, timing, folder, tuned) for name, data in sets.items()}
