"""Ragged conversations: our step, which packs them, beside transformers.Trainer, which pads them."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from athanor.core.device import Precision
from athanor.data.pack import pack
from athanor.models import llama
from athanor.objectives import next_token
from athanor.tokenizer.chat import Rendered
from training.conversations import TRAINER_BATCH, eight, filled, ragged, records, skills, small_tokenizer
from training.rounds import Round, ratio, repeated, take_turns
from training.sides import LOSS_TOLERANCE, Shape, agree, our_model, our_step, their_model

WANTED = 2.5

Draw = Callable[[Iterator[Rendered]], list[Rendered]]


def packed(model: llama.Model, conversations: Sequence[Rendered], precision: Precision, draw: Draw) -> Round:
    """Our side: `draw` takes the conversations of one step from the endless shuffled order; packing them is timed too."""
    step = our_step(model, precision)
    order = cycle(random.Random(1).sample(conversations, len(conversations)))

    def one() -> int:
        chosen = draw(order)
        step(pack(chosen, "conversations"))
        return sum(len(c.ids) for c in chosen)

    return repeated(one)


def trainer(model: Any, conversations: Sequence[Rendered], collator: Any, folder: str, **arguments: Any) -> Round:
    """Their side: Trainer as it comes, but that it neither saves nor prints; `arguments` are its own.

    A round is one call of `train()`, timed from the end of its first step to the end of its last.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    sizes: list[int] = []  # tokens that are no padding, of each batch in order

    def collate(features: list[dict[str, list[int]]]) -> Any:
        sizes.append(sum(len(f["input_ids"]) for f in features))
        return collator(features)

    class Clock(TrainerCallback):
        ends: list[float]  # of each step
        seconds: float

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.ends.append(time.perf_counter())
            control.should_training_stop = len(self.ends) > 2 and self.ends[-1] - self.ends[0] >= self.seconds

    quiet: dict[str, Any] = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    settings = TrainingArguments(output_dir=folder, max_steps=1_000_000, **quiet, **arguments)
    clock = Clock()
    worker = Trainer(model, settings, data_collator=collate, train_dataset=records(conversations), callbacks=[clock])
    worker.remove_callback(PrinterCallback)

    def run(seconds: float) -> float:
        sizes.clear()
        clock.ends, clock.seconds = [], seconds
        worker.train()
        return sum(sizes[1 : len(clock.ends)]) / (clock.ends[-1] - clock.ends[0])  # batches beyond were fetched ahead

    return run


def same_loss(ours: llama.Model, theirs: Any, conversations: Sequence[Rendered], collator: Any) -> None:
    """Packed here and padded there, the first conversations must give one loss, in fp32 (Trainer's default)."""
    with torch.no_grad():
        total, count, _ = next_token.loss(ours, pack(conversations[:TRAINER_BATCH], "conversations"))
        padded = collator(records(conversations[:TRAINER_BATCH]))
        agree("the loss of 8 conversations", float(total) / count, float(theirs(**padded).loss), LOSS_TOLERANCE)


def tuning(
    shape: Shape, conversations: Sequence[Rendered], collator: Any, precision: Precision, seconds: float
) -> dict[str, Any]:
    """Ragged conversations: our packed step beside Trainer, in tokens that are no padding."""

    def twins() -> tuple[llama.Model, Any]:
        ours = our_model(shape.config)
        return ours, their_model(shape.config, ours)

    same_loss(*twins(), conversations, collator)
    lengths = [len(c.ids) for c in conversations]
    large = max(1, round(shape.tokens / statistics.mean(lengths)))
    with tempfile.TemporaryDirectory() as folder:

        def peer(**arguments: Any) -> Round:
            return trainer(twins()[1], conversations, collator, folder, **arguments)

        def us(draw: Draw) -> Round:
            return packed(twins()[0], conversations, precision, draw)

        contenders: dict[str, Round] = {
            "Trainer, defaults (fp32, 8 a step)": peer(),
            "Trainer, bf16": peer(bf16=True),
            f"Trainer, bf16, {large} a step, grouped by length": peer(
                bf16=True, per_device_train_batch_size=large, train_sampling_strategy="group_by_length"
            ),
            f"athanor, {precision}, 8 a step": us(eight),
            f"athanor, {precision}, {shape.tokens} tokens a step": us(partial(filled, shape.tokens)),
        }
        rates = take_turns(contenders, seconds)
    first, *_ = rates
    shuffled = random.Random(1).sample(lengths, len(lengths))
    eights = [shuffled[i : i + TRAINER_BATCH] for i in range(0, len(shuffled), TRAINER_BATCH)]
    return {
        "conversations": len(conversations),
        "mean_length": statistics.mean(lengths),
        "padding_of_eight": 1 - sum(lengths) / sum(max(e) * len(e) for e in eights),
        "tokens_per_second": rates,
        "ratio": {name: ratio(rates[name], rates[first]) for name in rates},
        "wanted": WANTED,
    }


def tuning_sets(shape: Shape, precision: Precision, seconds: float) -> dict[str, Any]:
    """`tuning` on skills and on the ragged mix."""
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq

    tokenizer = small_tokenizer(shape.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(folder))
    sets = {
        "skills": skills(tokenizer, shape.conversations),
        "ragged, 16..400 tokens": ragged(shape.config.vocab_size, shape.conversations),
    }
    return {name: tuning(shape, data, collator, precision, seconds) for name, data in sets.items()}
