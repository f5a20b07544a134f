"""What the engine tells while it works: pieces of answers, and what it is doing."""

from __future__ import annotations

from dataclasses import dataclass

from athanor.types import Completion, TokenLogprob


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is new of one request.

    content, reasoning  text
    completion          the whole answer, with the last chunk
    ids                 tokens since the last chunk, whether or not their text is certain yet
    logprobs            of each of them, where SamplingParams.logprobs asks for them
    """

    request_id: str
    content: str
    reasoning: str
    completion: Completion | None
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)
class Stats:
    """What the engine is doing and has done; counters only grow.

    running, waiting   requests
    cache_usage        share of the cache's blocks that running requests hold
    preemptions        times that a running request had to give its blocks back
    prefix_queries     tokens of prompts that were looked up in the prefix cache
    prefix_hits        of them, those that were found
    prompt_tokens      of requests that were started
    generation_tokens  new ones
    steps              of the engine
    step_tokens        that its last step computed
    guesses            tokens that were guessed
    right_guesses      of them, those that came
    """

    running: int = 0
    waiting: int = 0
    cache_usage: float = 0.0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    step_tokens: int = 0
    guesses: int = 0
    right_guesses: int = 0
