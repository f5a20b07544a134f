"""transformers.Trainer as a contender: as it comes, but that it neither saves, logs nor prints, with a fused AdamW as ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from training.rounds import Round
from training.sides import CLIP, OPTIM

Record = Mapping[str, Sequence[int]]  # input_ids and labels, not shifted
Collate = Callable[[list[Any]], Any]


def by_position(features: list[Any]) -> dict[str, torch.Tensor]:
    """Records of one length as a batch."""
    return {name: torch.tensor([f[name] for f in features]) for name in features[0]}


def worker(model: Any, records: Sequence[Record], collate: Collate, folder: str, **arguments: Any) -> Any:
    """A Trainer that takes the records in order, with the optimiser's settings of our side; `arguments` are its own."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    settings: dict[str, Any] = {
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "optim": "adamw_torch_fused",
        "learning_rate": OPTIM.lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": OPTIM.beta1,
        "adam_beta2": OPTIM.beta2,
        "weight_decay": OPTIM.weight_decay,
        "max_grad_norm": CLIP,
        "train_sampling_strategy": "sequential",
        "max_steps": 1_000_000,
    }
    made = Trainer(
        model,
        TrainingArguments(output_dir=folder, **settings | arguments),
        data_collator=collate,
        train_dataset=list(records),
    )
    made.remove_callback(PrinterCallback)
    return made


def first_step(model: Any, records: Sequence[Record], collate: Collate, folder: str, **arguments: Any) -> tuple[float, float]:
    """Loss and gradient norm of the first update."""
    made = worker(model, records, collate, folder, max_steps=1, logging_strategy="steps", logging_steps=1, **arguments)
    made.train()
    told = made.state.log_history[0]
    return told["loss"], told["grad_norm"]


def trainer(
    model: Any,
    batches: Sequence[Sequence[Record]],
    collate: Collate,
    folder: str,
    tick: Callable[[], float],
    *,
    firsts: list[float] | None = None,
    **arguments: Any,
) -> Round:
    """Rounds of Trainer over batches of one number of records; a round goes on where the last one ended.

    A round is one call of `train()`, timed from the end of its first step to the end of its last. How long the first one took
    is added to `firsts`. Between rounds only the weights are kept, so that many contenders fit into memory.
    """
    from transformers import TrainerCallback

    size = len(batches[0])
    assert all(len(batch) == size for batch in batches)
    records = [record for batch in batches for record in batch]
    sizes: list[int] = []  # tokens that are no padding, of each batch in order

    def counting(features: list[Any]) -> Any:
        sizes.append(sum(len(f["input_ids"]) for f in features))
        return collate(features)

    class Clock(TrainerCallback):
        ends: list[float]  # of each step
        seconds: float

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.ends.append(tick())
            control.should_training_stop = len(self.ends) > 2 and self.ends[-1] - self.ends[0] >= self.seconds

    clock = Clock()
    made = worker(model, records, counting, folder, per_device_train_batch_size=size, **arguments)
    made.add_callback(clock)
    done = 0  # batches so far

    def run(seconds: float) -> float:
        nonlocal done
        sizes.clear()
        clock.ends, clock.seconds = [], seconds
        turn = done * size % len(records)
        made.train_dataset = records[turn:] + records[:turn]
        start = tick()
        made.train()
        if firsts is not None:
            firsts.append(clock.ends[0] - start)
        done += len(clock.ends)
        made.accelerator.free_memory()
        made.optimizer = made.lr_scheduler = None
        model.zero_grad(set_to_none=True)
        return sum(sizes[1 : len(clock.ends)]) / (clock.ends[-1] - clock.ends[0])  # batches beyond were fetched ahead

    return run
