"""Conversations to tune on, and how many of them a step takes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice

from athanor.data import sources
from athanor.evals import lessons, skill
from athanor.tokenizer.bpe import Tokenizer
from athanor.tokenizer.chat import Rendered
from athanor.types import IGNORE

TERSE = 0.65  # as `athanor sft` has it
TRAINER_BATCH = 8  # Trainer's default


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


def eight(order: Iterator[Rendered]) -> list[Rendered]:
    """As many conversations as Trainer takes by default."""
    return list(islice(order, TRAINER_BATCH))


def filled(budget: int, order: Iterator[Rendered]) -> list[Rendered]:
    """Conversations until there are `budget` tokens."""
    chosen: list[Rendered] = []
    tokens = 0
    while tokens < budget:
        chosen.append(next(order))
        tokens += len(chosen[-1].ids)
    return chosen
