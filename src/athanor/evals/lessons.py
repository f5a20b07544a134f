"""Skills as training data: worked examples as plain text or as conversations."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Literal

from athanor.data.pack import pack
from athanor.evals import skill
from athanor.evals.skill import Example
from athanor.tokenizer.bpe import Tokenizer
from athanor.tokenizer.chat import Rendered, render
from athanor.types import Batch

Form = Literal["text", "chat"]


def as_text(tokenizer: Tokenizer, example: Example) -> Rendered:
    """Question, reasoning and answer on lines of their own, as a document of a corpus might have them; all is learned."""
    question, answer = example.conversation
    lines = (question.content, answer.reasoning, answer.content)
    ids = [tokenizer.bos_id, *tokenizer.encode("\n".join(line for line in lines if line)), tokenizer.end_id]
    return Rendered(ids, [True] * len(ids))


def as_chat(tokenizer: Tokenizer, example: Example, terse: bool) -> Rendered:
    """The example as a conversation; a terse one gives the answer without the reasoning."""
    question, answer = example.conversation
    return render(tokenizer, (question, replace(answer, reasoning=None) if terse else answer))


def batch(tokenizer: Tokenizer, names: Sequence[str], form: Form, seed: int, budget: int, terse_share: float = 0.0) -> Batch:
    """Training examples of the skills in turn, as many as fit into `budget` tokens (one at least); a pure function of `seed`.

    Args:
        form: "text" (`as_text`) or "chat" (`as_chat`).
        terse_share: probability that a conversation answers at once, as many people's do.
    """
    rng = random.Random(seed)

    def rendered() -> Iterator[Rendered]:
        for example in skill.examples(names, "train", seed):
            terse = rng.random() < terse_share
            yield as_text(tokenizer, example) if form == "text" else as_chat(tokenizer, example, terse)

    chosen: list[Rendered] = []
    used = 0
    for sequence in rendered():
        used += len(sequence.ids) - 1
        if chosen and used > budget:
            break
        chosen.append(sequence)
    return pack(chosen, f"skills as {form}, seed {seed}")


def prompts(names: Sequence[str], seed: int, count: int) -> list[Example]:
    """`count` training problems of the skills in turn; a pure function of `seed`."""
    return list(islice(skill.examples(names, "train", seed), count))
