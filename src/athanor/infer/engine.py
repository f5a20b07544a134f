"""The engine: continuous batching over one model, for rollouts, evaluation, chat and the server alike (law L2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from athanor.core.device import Precision
from athanor.core.errors import ConfigError, RequestError
from athanor.infer.runner import Runner
from athanor.infer.sampling import sample
from athanor.infer.scheduler import Scheduler
from athanor.infer.sequence import Sequence
from athanor.models.base import CausalLM, EncoderDecoder
from athanor.tokenizer.stream import StreamDecoder
from athanor.tokenizer.vocabulary import Vocabulary
from athanor.types import Completion, Request


@dataclass(frozen=True, slots=True)
class Chunk:
    """New text of one request; `completion` comes with the last."""

    request_id: str
    content: str
    reasoning: str
    completion: Completion | None


class Engine:
    """Answers requests; a request joins the batch as soon as a row is free and leaves it when it is done.

    Not thread-safe: one thread drives it. An answer ends with a token that ends one, a stop text, max_tokens or a full
    context.

    Args:
        model: shared with whoever trains it; read at every step.
        tokenizer: of the model.
        max_batch: sequences that run at once.
        max_len: tokens of prompt and answer at most; the model's context by default.
        precision: of the matrix products.

    Raises:
        ConfigError: max_batch or max_len out of range.
    """

    def __init__(
        self,
        model: CausalLM | EncoderDecoder,
        tokenizer: Vocabulary,
        *,
        max_batch: int = 64,
        max_len: int | None = None,
        precision: Precision = "fp32",
    ) -> None:
        context = getattr(model.config, "cached_positions", model.config.max_positions)
        if max_batch < 1:
            raise ConfigError(f"max_batch ({max_batch}) must be at least 1: one sequence has to run")
        if max_len is not None and not 2 <= max_len <= context:
            raise ConfigError(
                f"max_len ({max_len}) must lie between 2 (a token of prompt and one of answer) and {context}, the model's context"
            )
        self.tokenizer = tokenizer
        self.end_ids = frozenset(model.token_ids.eos) or frozenset(() if tokenizer.end_id is None else (tokenizer.end_id,))
        self.max_len = max_len or context
        self.scheduler = Scheduler(max_batch)
        self.runner = Runner(model, precision)
        self.vocab_size = model.config.vocab_size
        self._ids: set[str] = set()
        self._start: tuple[int, ...] = ()  # what answers begin with, where the prompt is a source
        if isinstance(model, EncoderDecoder):
            self._start = model.token_ids.start
            if not self._start:
                raise ConfigError(
                    "the model's config.json names no decoder_start_token_id, with which an encoder-decoder's answers begin:"
                    " add it"
                )

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything: a request is waiting, running, or aborted and not yet reported."""
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError naming the field that is out of range."""
        check(request, self.max_len, self.vocab_size)
        if request.id in self._ids:
            raise RequestError(f"request id {request.id!r} is already being answered: give each request its own", "id")
        sequence = Sequence(
            request, StreamDecoder(self.tokenizer, request.params.stop, () if self._start else request.prompt_ids), self._start
        )
        self._ids.add(request.id)
        self.scheduler.waiting.append(sequence)

    def abort(self, request_id: str) -> None:
        """End a request early; its last chunk comes from the next step. Unknown ids (already finished) are no error."""
        self.scheduler.drop(request_id)

    def step(self, stream: bool = True) -> list[Chunk]:
        """Schedule, run, post-process: one new token for every running request, and the first of every one that finds a row.

        Without `stream` a request has one chunk, its last: no text is decoded while nobody reads it.
        """
        chunks = self._retire()  # what was aborted between steps
        running = self.scheduler.running
        if running:
            logits = self.runner.decode([s.ids[-1] for s in running], [s.length - 1 for s in running])
            self._extend(running, logits)
            chunks += self._retire()  # their rows are free for those that wait
        started = self.scheduler.admit()
        if started:
            first = len(self.scheduler.running) - len(started)
            sources = [s.request.prompt_ids for s in started] if self._start else None
            self._extend(started, self.runner.prefill([s.start for s in started], first, sources))
        for s in self.scheduler.running if stream else ():
            if not s.finish_reason:
                content, reasoning = s.take()
                if content or reasoning:
                    chunks.append(Chunk(s.request.id, content, reasoning, None))
        return chunks + self._retire()

    def generate(self, requests: Iterable[Request], progress: Callable[[int], None] | None = None) -> list[Completion]:
        """Answer all requests; completions come in the order of the requests. `progress` gets how many are finished.

        Raises RequestError when one of them cannot be answered, or while others are being answered; then none is.
        """
        if self.has_work:
            raise RequestError("the engine is busy with other requests, whose text would be lost: take steps until they are done")
        order: list[str] = []
        try:
            for request in requests:
                self.add(request)
                order.append(request.id)
        except BaseException:
            for id in order:
                self.abort(id)
            self.step()
            raise
        done: dict[str, Completion] = {}
        while len(done) < len(order):
            before = len(done)
            for chunk in self.step(stream=False):
                if chunk.completion:
                    done[chunk.request_id] = chunk.completion
            if progress and len(done) > before:
                progress(len(done))
        return [done[id] for id in order]

    def _extend(self, sequences: list[Sequence], logits: Tensor) -> None:
        tokens, logprobs = sample(logits, [s.request.params for s in sequences], [len(s.ids) for s in sequences])
        for s, token, logprob in zip(sequences, tokens.tolist(), logprobs.tolist(), strict=True):
            s.append(token, logprob, self.end_ids, self.max_len)

    def _retire(self) -> list[Chunk]:
        finished, moves = self.scheduler.retire()
        if moves:
            self.runner.move(moves, max(s.length for s in self.scheduler.running))
        chunks = []
        for s in finished:
            content, reasoning = s.take()
            self._ids.discard(s.request.id)
            chunks.append(Chunk(s.request.id, content, reasoning, s.completion(self.tokenizer.think_id)))
        return chunks


def check(request: Request, max_len: int, vocab_size: int) -> None:
    """Raise RequestError, naming field, value, rule and remedy, for a request that cannot be answered."""
    p, n = request.params, len(request.prompt_ids)
    if n == 0:
        raise RequestError("the prompt is empty: give at least one token (the beginning-of-text token will do)", "messages")
    if n >= max_len:
        raise RequestError(
            f"the prompt has {n} tokens and the context holds {max_len}, with room for one answer token at least:"
            f" shorten it by {n - max_len + 1} tokens",
            "messages",
        )
    if not all(0 <= i < vocab_size for i in request.prompt_ids):
        raise RequestError(f"the prompt holds token ids outside [0, {vocab_size}): it was made by another tokenizer", "messages")
    if p.max_tokens < 1:
        raise RequestError(f"max_tokens ({p.max_tokens}) must be at least 1", "max_tokens")
    if not (math.isfinite(p.temperature) and p.temperature >= 0):
        raise RequestError(f"temperature ({p.temperature}) must be a finite number, 0 (greedy) or more", "temperature")
    if not 0 < p.top_p <= 1:
        raise RequestError(f"top_p ({p.top_p}) must lie in (0, 1]", "top_p")
    if p.top_k < 0:
        raise RequestError(f"top_k ({p.top_k}) must be 0 (all tokens) or more", "top_k")
