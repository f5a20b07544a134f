"""Speed of training beside transformers, on the CPU: `python bench/train.py --help`.

pre-training  packed rows of one length: our step beside LlamaForCausalLM (sdpa, same weights, same rows, same autocast,
              fused AdamW and clipping on both sides)
tuning        ragged conversations, packed: our step beside transformers.Trainer, which pads

Both live in one process with the same threads and the same allocator settings (`tune_allocator`, so it serves the peer too)
and take turns; neither is compiled. A ratio is the median of the ratios of the rounds. Before anything is timed, both
sides must compute the same loss from the same weights and batch.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from athanor.core import io
from athanor.core.device import Precision, autocast, machine, peak_memory, supports_bf16, tune_allocator
from athanor.core.errors import AthanorError, ConfigError, MissingExtraError, VerificationError
from athanor.data import sources
from athanor.data.pack import pack
from athanor.evals import lessons, skill
from athanor.models import llama
from athanor.objectives import next_token
from athanor.optim.build import OptimConfig, build
from athanor.tokenizer.bpe import Tokenizer
from athanor.tokenizer.chat import Rendered
from athanor.train.step import train_step
from athanor.types import IGNORE, Batch

CPU = torch.device("cpu")
OPTIM = OptimConfig(name="adamw", lr=1e-4, weight_decay=0.0)
CLIP = 1.0
ROUNDS = 5
LOSS_TOLERANCE = 1e-3  # nats
NORM_TOLERANCE = 0.02  # of the gradient norm: bfloat16 rounds differently in differently fused code
PRETRAIN_WANTED, TUNING_WANTED = 1.1, 2.5
TERSE = 0.65  # as `athanor sft` has it
TRAINER_BATCH = 8  # Trainer's default

Round = Callable[[float], float]  # seconds at least -> tokens per second


@dataclass(frozen=True)
class Shape:
    """What is trained: a model, rows of `length` tokens, `rows` of them a step; `conversations` to tune on, 0 for no tuning."""

    config: llama.Config
    length: int
    rows: int
    conversations: int = 0

    @property
    def tokens(self) -> int:
        return self.length * self.rows


SHAPES = {
    "life": Shape(llama.Config(2048, 192, 4, 3, 1, 512), 256, 32, conversations=2048),  # of a life of ten minutes
    "12m": Shape(llama.Config(16384, 256, 8, 8, 8, 1024), 512, 8),
    "tiny": Shape(llama.Config(512, 32, 2, 4, 2, 64), 32, 8, conversations=48),  # for tests: its speeds mean nothing
}


def agree(what: str, ours: float, theirs: float, tolerance: float) -> None:
    """Raises VerificationError unless both sides computed the same number."""
    if not abs(ours - theirs) <= tolerance:
        raise VerificationError(
            f"{what} is {ours:.6f} here and {theirs:.6f} in transformers, but must agree within {tolerance:.3g} for their"
            " speeds to be comparable: see which of the two changed (tests/models/test_parity.py compares them layer by layer)"
        )


# The two sides


def our_model(config: llama.Config) -> llama.Model:
    """Weights of a fresh model, but no zeros: blocks that do nothing would agree whatever they compute."""
    generator = torch.Generator().manual_seed(0)
    model = llama.Model(config)
    model.initialise(generator)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                p.normal_(std=0.5 * p.shape[1] ** -0.5, generator=generator)
    return model.train()


def their_model(config: llama.Config, ours: llama.Model | None = None) -> Any:
    """transformers' model of the same shape, with the weights of `ours` where given."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    fields = {k: v for k, v in config.to_hf().items() if k != "model_type"}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**fields), dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    if ours is not None:
        left = model.load_state_dict(ours.to_hf(dict(ours.state_dict())), strict=False)
        assert not left.unexpected_keys and set(left.missing_keys) <= {"lm_head.weight"}, left  # tied: no tensor of its own
        assert sum(p.numel() for p in model.parameters()) == ours.n_parameters()
    return model.train()


def our_step(model: llama.Model, precision: Precision) -> Callable[[Batch], tuple[float, float]]:
    """Batch -> loss and gradient norm of one update."""
    optimizers = build(model, OPTIM, bf16=precision == "bf16")

    def step(batch: Batch) -> tuple[float, float]:
        result = train_step(model, next_token.loss, [batch], optimizers, lr_factor=1.0, clip=CLIP, precision=precision)
        return result.loss, result.grad_norm

    return step


def their_step(model: Any, precision: Precision) -> Callable[[Tensor, Tensor], tuple[float, float]]:
    """Rows of ids and of labels, both (rows, length), labels shifted already -> loss and gradient norm of one update."""
    betas = (OPTIM.beta1, OPTIM.beta2)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=OPTIM.lr, betas=betas, weight_decay=OPTIM.weight_decay, fused=True)

    def step(ids: Tensor, labels: Tensor) -> tuple[float, float]:
        optimizer.zero_grad(set_to_none=True)
        with autocast(CPU, precision):
            loss = model(input_ids=ids, labels=labels, shift_labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        return float(loss.detach()), float(norm)

    return step


# Time and memory


def repeated(step: Callable[[], int]) -> Round:
    """Rounds of a step that returns how many tokens it trained on; the first step of a round is not timed."""

    def run(seconds: float) -> float:
        step()
        tokens, steps, start = 0, 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds or steps < 2:
            tokens += step()
            steps += 1
        return tokens / elapsed

    return run


def take_turns(contenders: Mapping[str, Round], seconds: float) -> dict[str, list[float]]:
    """Tokens per second of each contender in each round; every other round goes backwards, against drift of the machine."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(ROUNDS):
        for name in list(contenders)[:: -1 if i % 2 else 1]:
            rates[name].append(contenders[name](seconds / ROUNDS))
    return rates


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds, each of which compares neighbours in time."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def rows(shape: Shape) -> tuple[Tensor, Tensor]:
    """ids and labels (rows, length): every row one document, every position supervised."""
    generator = torch.Generator().manual_seed(1)
    window = torch.randint(0, shape.config.vocab_size, (shape.rows, shape.length + 1), generator=generator)
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def as_batch(shape: Shape, ids: Tensor, labels: Tensor) -> Batch:
    return Batch(ids.flatten(), labels.flatten(), torch.full((shape.rows,), shape.length), origin="random rows")


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


def memory(names: Sequence[str], precision: Precision) -> dict[str, dict[str, int]]:
    """`step_memory` of every shape and side, each in a process of its own.

    To be called first: Linux starts a new process off with the peak of the one that it came from.
    """
    found: dict[str, dict[str, int]] = {name: {} for name in names}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in names:
            for side in ("athanor", "transformers"):
                found[name][side] = pool.apply(step_memory, (side, SHAPES[name], precision))
    return found


# Pre-training


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
        "wanted": PRETRAIN_WANTED,
    }


# Tuning


def small_tokenizer(vocab_size: int) -> Tokenizer:
    """Trained on every 25th file of the standard library."""
    files = sources.standard_library_files({})[::25]
    return Tokenizer.train((document.text for file in files for document in sources.read_file(file, {})), vocab_size)


def skills(tokenizer: Tokenizer, count: int) -> list[Rendered]:
    """Conversations as `athanor sft` trains on them: short, and nearly of one length."""
    rng = random.Random(0)
    examples = islice(skill.examples(skill.names(), "train", 0), count)
    return [lessons.as_chat(tokenizer, example, rng.random() < TERSE) for example in examples]


def ragged(vocab_size: int, count: int) -> list[Rendered]:
    """Random tokens, lengths uniform in 16..400, of which the first 20 to 80 % are a prompt that is not learned."""
    rng = random.Random(0)
    out = []
    for _ in range(count):
        length = rng.randint(16, 400)
        prompt = round(length * rng.uniform(0.2, 0.8))
        out.append(Rendered([rng.randrange(16, vocab_size) for _ in range(length)], [i >= prompt for i in range(length)]))
    return out


def records(conversations: Sequence[Rendered]) -> list[dict[str, list[int]]]:
    """Conversations as transformers takes them: labels not shifted."""
    return [
        {
            "input_ids": list(c.ids),
            "labels": [token if learned else IGNORE for token, learned in zip(c.ids, c.loss_mask, strict=True)],
        }
        for c in conversations
    ]


def packed(model: llama.Model, conversations: Sequence[Rendered], precision: Precision, draw: Callable[..., Any]) -> Round:
    """Our side: `draw` takes the conversations of one step from the endless shuffled order; packing them is timed too."""
    step = our_step(model, precision)
    shuffled = random.Random(1).sample(conversations, len(conversations))
    order = cycle(shuffled)

    def one() -> int:
        chosen: list[Rendered] = draw(order)
        step(pack(chosen, "conversations"))
        return sum(len(c.ids) for c in chosen)

    return repeated(one)


def eight(order: Iterator[Rendered]) -> list[Rendered]:
    """As many conversations as Trainer takes by default."""
    return list(islice(order, TRAINER_BATCH))


def filled(budget: int, order: Iterator[Rendered]) -> list[Rendered]:
    """Conversations until there are `budget` tokens."""
    chosen: list[Rendered] = []
    while sum(len(c.ids) for c in chosen) < budget:
        chosen.append(next(order))
    return chosen


def trainer(model: Any, conversations: Sequence[Rendered], collator: Any, folder: str, **arguments: Any) -> Round:
    """Their side: Trainer as it comes, but that it neither saves nor prints; `arguments` are its own.

    A round is one call of `train()`, timed from the end of its first step to the end of its last.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    sizes: list[int] = []  # tokens that are no padding, of each batch in order
    ends: list[float] = []  # of each step
    least = [0.0]

    def collate(features: list[dict[str, list[int]]]) -> Any:
        sizes.append(sum(len(f["input_ids"]) for f in features))
        return collator(features)

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ends.append(time.perf_counter())
            control.should_training_stop = len(ends) > 2 and ends[-1] - ends[0] >= least[0]

    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "max_steps": 1_000_000}
    settings = TrainingArguments(output_dir=folder, **quiet, **arguments)
    worker = Trainer(model, settings, data_collator=collate, train_dataset=records(conversations), callbacks=[Clock()])
    worker.remove_callback(PrinterCallback)

    def run(seconds: float) -> float:
        sizes.clear()
        ends.clear()
        least[0] = seconds
        worker.train()
        return sum(sizes[1 : len(ends)]) / (ends[-1] - ends[0])  # batches beyond were fetched ahead

    return run


def same_loss(ours: llama.Model, theirs: Any, conversations: Sequence[Rendered], collator: Any) -> None:
    """Packed here and padded there, the first conversations must give one loss, in fp32 (Trainer's default)."""
    with torch.no_grad():
        total, count, _ = next_token.loss(ours, pack(conversations[:TRAINER_BATCH], "conversations"))
        padded = collator(records(conversations[:TRAINER_BATCH]))
        agree("the loss of 8 conversations", float(total) / count, float(theirs(**padded).loss), LOSS_TOLERANCE)


def tuning(shape: Shape, conversations: Sequence[Rendered], collator: Any, precision: Precision, seconds: float) -> dict[str, Any]:
    """Ragged conversations: our packed step beside Trainer, in tokens that are no padding."""
    same_loss(our_model(shape.config), their_model(shape.config, our_model(shape.config)), conversations, collator)
    lengths = [len(c.ids) for c in conversations]
    large = max(1, round(shape.tokens / statistics.mean(lengths)))
    with tempfile.TemporaryDirectory() as folder:
        peer = lambda **arguments: trainer(their_model(shape.config), conversations, collator, folder, **arguments)  # noqa: E731  # three calls
        us = lambda draw: packed(our_model(shape.config), conversations, precision, draw)  # noqa: E731  # two calls
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
        "wanted": TUNING_WANTED,
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


# Words


def show_pretraining(name: str, r: Mapping[str, Any]) -> None:
    print(f"\nPre-training {name}: {r['parameters']:,} parameters, {r['tokens_per_step']} tokens a step in rows of {r['row']}")
    print(f"  {'':<14}{'tokens/s':>10}{'ratio':>8}{'memory of a step':>20}")
    for side, rates in r["tokens_per_second"].items():
        shown = f"{r['ratio']:.2f}" if side == "athanor" else "1.00"
        print(f"  {side:<14}{statistics.median(rates):>10,.0f}{shown:>8}{r['memory'][side] / 2**20:>16,.0f} MiB")
    print(f"  ratio wanted: {r['wanted']}; loss of the first step {r['loss']['athanor']:.5f}, {r['loss']['transformers']:.5f}")


def show_tuning(name: str, data: str, r: Mapping[str, Any]) -> None:
    print(f"\nTuning {name} on {data}: {r['mean_length']:.0f} tokens each, {r['padding_of_eight']:.0%} padding in batches of 8")
    print(f"  {'':<52}{'tokens/s':>10}{'ratio':>8}")
    for side, rates in r["tokens_per_second"].items():
        print(f"  {side:<52}{statistics.median(rates):>10,.0f}{r['ratio'][side]:>8.2f}")
    print(f"  ratio wanted: {r['wanted']}; tokens are prompt and answer, without padding")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed of training beside transformers, on the CPU; see docs/benchmarks.md.")
    parser.add_argument("--seconds", type=float, default=6.0, help="timed seconds of each contender, at least (default %(default)g)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["life", "12m"], help="models (default: life 12m)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything that was measured there")
    options = parser.parse_args(argv)
    if not options.seconds > 0:
        raise ConfigError(f"--seconds ({options.seconds:g}) must be above 0: 6 is usual")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options = arguments(argv)
        missing = [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]
        if missing:
            raise MissingExtraError(f"{' and '.join(missing)} not installed, to compare with: pip install 'athanor-lm[dev]'")
        run(options)
    except AthanorError as error:
        print(f"bench/train.py: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    precision: Precision = "bf16" if supports_bf16(CPU) else "fp32"
    needed = memory(options.shapes, precision)

    import accelerate
    import transformers

    transformers.utils.logging.set_verbosity_error()
    tune_allocator()
    facts = machine() | {"transformers": transformers.__version__, "accelerate": accelerate.__version__}
    for key, value in facts.items():
        print(f"{key:<14}{value}")
    print(f"{'precision':<14}{precision}, fused AdamW on both sides, tuned allocator for both, nothing compiled")
    results: dict[str, Any] = {"machine": facts, "precision": precision, "seconds": options.seconds, "rounds": ROUNDS}
    results |= {"pretraining": {}, "tuning": {}}
    for name in options.shapes:
        r = pretraining(SHAPES[name], precision, options.seconds)
        results["pretraining"][name] = r | {"memory": needed[name]}
        show_pretraining(name, results["pretraining"][name])
    for name in options.shapes:
        if SHAPES[name].conversations:
            results["tuning"][name] = tuning_sets(SHAPES[name], precision, options.seconds)
            for data, r in results["tuning"][name].items():
                show_tuning(name, data, r)
    if options.json:
        io.write_json(options.json, results)


if __name__ == "__main__":
    sys.exit(main())
