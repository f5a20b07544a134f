"""Generative evaluation: questions to the engine, answers to the skills' metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from athanor.evals import skill
from athanor.evals.skill import Example
from athanor.infer.engine import Engine
from athanor.tokenizer.chat import parse, render, well_formed
from athanor.types import Completion, Message, Request, SamplingParams


@dataclass(frozen=True)
class Result:
    """One answered example: the metric in [0, 1], and whether the answer kept to the form and ended by itself."""

    example: Example
    message: Message
    correct: float
    well_formed: bool
    stopped: bool
    tokens: int

    @property
    def skill(self) -> str:
        return self.example.skill

    @property
    def language(self) -> str:
        return self.example.language


def judge(engine: Engine, example: Example, completion: Completion) -> Result:
    """Score one completion of an example's question."""
    message = parse(engine.tokenizer, completion.ids)
    return Result(
        example=example,
        message=message,
        correct=skill.score(example, message),
        well_formed=well_formed(engine.tokenizer, completion.ids),
        stopped=completion.finish_reason == "stop",
        tokens=len(completion.ids),
    )


def answer(
    engine: Engine,
    examples: Sequence[Example],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    progress: Callable[[int], None] | None = None,
) -> list[Result]:
    """The engine's answer to each example's question, judged; greedy unless a temperature is given."""
    requests = [
        Request(
            id=str(i),
            prompt_ids=render(engine.tokenizer, e.conversation[:1], generation_prompt=True).ids,
            params=SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=i),
        )
        for i, e in enumerate(examples)
    ]
    completions = engine.generate(requests, progress)
    return [judge(engine, e, c) for e, c in zip(examples, completions, strict=True)]
