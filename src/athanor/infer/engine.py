"""The engine: continuous batching over one model, for rollouts, evaluation, chat and the server alike (law L2)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from athanor.core.device import Precision
from athanor.core.errors import ConfigError, NonFiniteError, RequestError
from athanor.infer import constrained, holdings
from athanor.infer.asked import bad_words, check
from athanor.infer.blocks import Blocks
from athanor.infer.news import Chunk, Stats
from athanor.infer.runner import Part, Runner
from athanor.infer.sampling import Row, sample, top_logprobs
from athanor.infer.scheduler import Scheduler, Work
from athanor.infer.sequence import Sequence
from athanor.infer.speculative import Draft, Guesser, Heads
from athanor.models.base import CausalLM, EncoderDecoder
from athanor.nn.cache import KV
from athanor.nn.linear import pack
from athanor.tokenizer.stream import StreamDecoder
from athanor.tokenizer.vocabulary import Vocabulary
from athanor.types import Completion, Request, SamplingParams

__all__ = ["BLOCK", "Chunk", "Engine", "Stats"]

BLOCK = 16  # tokens of a block of the cache: of a sequence of 256 tokens 3 % of its blocks is empty on average
_TOLD = 256  # tokens of a prompt whose log-probabilities are made at once


class Engine:
    """Answers requests: they share one batch and one paged cache, join as soon as there is room and leave when they are done.

    Not thread-safe: one thread drives it. An answer ends with a token that ends one, a stop text, max_tokens or a full
    context. Prompts that begin alike are computed once (`share`); what is remembered of them goes when the weights change.

    Args:
        model: shared with whoever trains it; read at every step.
        tokenizer: of the model.
        max_batch: sequences that run at once.
        max_len: tokens of prompt and answer at most; by default the model's context, or as much of it as fits into a half of the
            memory that is free.
        precision: of the matrix products.
        cache_tokens: that the cache holds, of all sequences together; by default `max_batch` x `max_len` of them, or as many as
            fit into a half of the memory that is free. Where it is full, requests wait, or run later once more.
        step_tokens: tokens of one step at most: longer prompts are computed in parts, and nobody's answer waits for them.
        share: whether beginnings of prompts that were computed before are read from the cache.
        packed: whether weights are kept once more in the order in which the CPU's products of few rows read them fastest, 2 bytes
            for each; in bf16 only.
        guesser: who guesses tokens that one step then checks together (`speculative.py`); None guesses nothing.
        compile: whether the step that decodes is compiled (`compiled.py`): about a minute now, for 1.2 to 1.5 times the speed.
        deterministic: whether an answer is the same to the last bit whatever else is answered, its prompt in parts or at once,
            from the cache or not; two to four times slower.

    Raises:
        ConfigError: a number out of range; a cache that does not hold one sequence; a model for which `compile` or
            `deterministic` is not to be had.
    """

    def __init__(
        self,
        model: CausalLM | EncoderDecoder,
        tokenizer: Vocabulary,
        *,
        max_batch: int = 64,
        max_len: int | None = None,
        precision: Precision = "fp32",
        cache_tokens: int | None = None,
        step_tokens: int = 2048,
        share: bool = True,
        packed: bool = True,
        guesser: Guesser | None = None,
        compile: bool = False,
        deterministic: bool = False,
    ) -> None:
        context = getattr(model.config, "cached_positions", model.config.max_positions)
        if max_batch < 1:
            raise ConfigError(f"max_batch ({max_batch}) must be at least 1: one sequence has to run")
        if max_len is not None and not 2 <= max_len <= context:
            raise ConfigError(
                f"max_len ({max_len}) must lie between 2 (a token of prompt and one of answer) and {context}, the model's context"
            )
        if step_tokens < 1:
            raise ConfigError(f"step_tokens ({step_tokens}) must be at least 1")
        self.tokenizer = tokenizer
        ends = model.token_ids.eos or (() if tokenizer.end_id is None else (tokenizer.end_id,))
        self.end_ids = frozenset(id for id in ends if id < model.config.vocab_size)  # the others are never generated
        self._context, self.max_len = context, max_len or holdings.longest(model, context, precision, cache_tokens)
        self.vocab_size = model.config.vocab_size
        self._start: tuple[int, ...] = ()  # what answers begin with, where the prompt is a source
        if isinstance(model, EncoderDecoder):
            self._start = model.token_ids.start
            if not self._start:
                raise ConfigError(
                    "the model's config.json names no decoder_start_token_id, with which an encoder-decoder's answers begin:"
                    " add it"
                )
        layers = model.cache_layers()
        # What a recurrent layer keeps belongs to a sequence, and answers to other sources begin with the same tokens.
        share = share and not self._start and all(isinstance(layer, KV) for layer in layers)
        blocks = Blocks(self._count(model, max_batch, precision, cache_tokens), BLOCK, share=share)
        self.scheduler = Scheduler(blocks, max_batch, max(step_tokens, max_batch))
        if compile and deterministic:
            raise ConfigError("an engine is compiled or deterministic: leave one of `compile` and `deterministic` out")
        self.runner = Runner(model, blocks.count + 1, BLOCK, max_batch, precision, deterministic)
        self._packed = holdings.products(model) if packed and precision == "bf16" else []
        if compile:
            self.runner.compile(self.max_len)
        self._counted, self.guesser = holdings.lasting(model), guesser
        if isinstance(guesser, Draft):
            guesser.attach(blocks.count + 1, BLOCK, max_batch, self.vocab_size, self.max_len)
        elif isinstance(guesser, Heads):
            guesser.attach(self.runner, blocks.count + 1)
        self._ids: set[str] = set()
        self._weights = -1  # none seen
        self._counts = Stats()

    def _count(self, model: CausalLM | EncoderDecoder, max_batch: int, precision: Precision, tokens: int | None) -> int:
        """Blocks of the cache."""
        least = -(-self.max_len // BLOCK)
        if tokens is not None:
            if tokens < least * BLOCK:
                raise ConfigError(
                    f"cache_tokens ({tokens}) must hold one sequence of max_len ({self.max_len}) tokens, {least * BLOCK} in whole"
                    " blocks: raise it, or lower max_len"
                )
            return tokens // BLOCK
        fitting = holdings.room(model, precision, BLOCK)
        return least * max_batch if fitting is None else max(least, min(least * max_batch, fitting))

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything: a request is waiting, running, or aborted and not yet reported."""
        return self.scheduler.has_work

    def stats(self) -> Stats:
        """What it is doing and has done."""
        s = self.scheduler
        return replace(
            self._counts,
            running=len(s.running),
            waiting=len(s.waiting),
            cache_usage=s.blocks.usage,
            preemptions=s.preemptions,
            prefix_queries=s.queries,
            prefix_hits=s.hits,
        )

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError naming the field that is out of range."""
        check(request, self._context if self._start else self.max_len, self.vocab_size, not self._start)
        if request.id in self._ids:
            raise RequestError(f"request id {request.id!r} is already being answered: give each request its own", "id")
        decoder = StreamDecoder(self.tokenizer, request.params.stop, () if self._start else request.prompt_ids)
        sequence = Sequence(request, decoder, self._start)
        sequence.words = bad_words(self.tokenizer, request.params.bad_words)
        if request.params.structure is not None:
            grammar = constrained.compile(request.params.structure, self.tokenizer, self.vocab_size)
            before = () if self._start else request.prompt_ids
            sequence.form = constrained.Constraint(grammar, self.end_ids, before=before, reasoning=True)
        self._ids.add(request.id)
        self.scheduler.add(sequence)

    def prepare(self, params: SamplingParams) -> None:
        """Make ready what `add` would take a while for, from any thread. Raises as `add` does for a structure."""
        if params.structure is not None:
            constrained.compile(params.structure, self.tokenizer, self.vocab_size)

    def abort(self, request_id: str) -> None:
        """End a request early; its last chunk comes from the next step. Unknown ids (already finished) are no error."""
        self.scheduler.drop(request_id)

    def forget(self) -> None:
        """Forget all that was made of the weights.

        For whoever changes them in a way that PyTorch does not count: through `.data`, or by its own optimisers with `fused=True`
        (those of `athanor.optim.build` are counted).
        """
        self.scheduler.blocks.forget()
        pack(self._packed)

    def step(self, stream: bool = True) -> list[Chunk]:
        """Schedule, run, post-process: a new token for every running request, or the next part of its prompt.

        Without `stream` a request has one chunk, its last: no text is decoded while nobody reads it.
        """
        chunks = self._retire()  # what was aborted between steps
        self._see_weights()
        self._guess()
        work = self.scheduler.schedule()
        if work:
            if self.guesser is not None:
                self.guesser.fill([w.sequence for w in work])
            parts = [self._part(*w) for w in work]
            self._extend(work, [part.wanted for part in parts], self.runner.run(parts))
        for w in work if stream else ():
            if not w.sequence.finish_reason:
                content, reasoning = w.sequence.take()
                ids, top = w.sequence.tell()
                if content or reasoning or ids:
                    chunks.append(Chunk(w.sequence.request.id, content, reasoning, None, ids, top))
        return chunks + self._retire()

    def generate(self, requests: Iterable[Request], progress: Callable[[int], None] | None = None) -> list[Completion]:
        """Answer all requests; completions come in the order of the requests. `progress` gets how many are finished.

        Raises RequestError when one of them cannot be answered, or while others are being answered, and NonFiniteError when the
        model makes inf or nan of one; then none is.
        """
        if self.has_work:
            raise RequestError("the engine is busy with other requests, whose text would be lost: take steps until they are done")
        order: list[str] = []
        try:
            for request in requests:
                self.add(request)
                order.append(request.id)
        except BaseException:
            self._drop(order)
            raise
        done: dict[str, Completion] = {}
        while len(done) < len(order):
            before = len(done)
            for chunk in self.step(stream=False):
                if chunk.completion:
                    done[chunk.request_id] = chunk.completion
                    if chunk.completion.spoilt:
                        self._drop(order)
                        raise NonFiniteError(f"{chunk.completion.error} of request {chunk.request_id!r}")
            if progress and len(done) > before:
                progress(len(done))
        return [done[id] for id in order]

    def _drop(self, ids: Iterable[str]) -> None:
        """End requests whose answers nobody wants any more."""
        for id in ids:
            self.abort(id)
        self._retire()

    def _see_weights(self) -> None:
        """What was computed with other weights must not be read: PyTorch counts changes of each tensor."""
        weights = sum(tensor._version for tensor in self._counted)
        if weights != self._weights:
            self._weights = weights
            self.forget()

    def _part(self, sequence: Sequence, count: int) -> Part:
        """What the runner computes for a piece of work."""
        begin = sequence.computed
        if sequence.started is None:
            sequence.started = time.perf_counter()
            self._counts.prompt_tokens += len(sequence.request.prompt_ids)
        tokens = (sequence.tokens[begin:] + sequence.draft)[:count] if sequence.draft else sequence.tokens[begin : begin + count]
        source = sequence.request.prompt_ids if self._start and not begin else None
        return Part(tokens, begin, sequence.table, sequence.slot or 0, self._wanted(sequence, count), source)

    def _wanted(self, sequence: Sequence, count: int) -> int:
        """Of how many of the next `count` tokens what follows is asked."""
        if isinstance(self.guesser, Heads):
            return count  # they read every position
        end = sequence.computed + count
        if sequence.request.params.prompt_logprobs is not None and len(sequence.prompt_logprobs) < len(sequence.start):
            return count
        return max(0, end - sequence.length + 1)

    def _extend(self, work: list[Work], wanted: list[int], hidden: Tensor) -> None:
        """Post-process: prompts are told their log-probabilities, and new tokens are chosen: more where guesses are right."""
        self._counts.steps += 1
        self._counts.step_tokens = sum(w.tokens for w in work)
        ready: list[tuple[Sequence, list[int]]] = []
        at: list[int] = []  # rows of `hidden` after which a token is chosen
        heads = self.guesser if isinstance(self.guesser, Heads) else None
        states = hidden.split(wanted) if heads is not None else ()  # of all that was computed (`_wanted`)
        fine = ((w, piece) for w, piece in zip(work, states, strict=False) if w.sequence.slot not in self.runner.spoilt)
        news = [(w.sequence, w.sequence.computed, piece) for w, piece in fine]
        end = 0
        for (s, count), rows in zip(work, wanted, strict=True):
            end += rows
            if s.slot in self.runner.spoilt:
                self._spoilt(s, f"hidden states of tokens {s.computed} to {s.computed + count - 1}")
                continue
            if s.request.params.prompt_logprobs is not None and len(s.prompt_logprobs) < len(s.start):
                self._tell_prompt(s, hidden[end - rows : end])
            checked = s.computed + count - s.length
            if checked < 0:
                self.scheduler.computed(s, s.computed + count)
            else:
                if s.form is not None and not self._formed(s, s.form):
                    continue
                ready.append((s, s.draft[:checked]))
                at += range(end - checked - 1, end)
        if ready:
            self._choose(ready, hidden if len(at) == len(hidden) else hidden[torch.tensor(at, device=hidden.device)])
        if heads is not None:
            heads.read(news)

    def _choose(self, ready: list[tuple[Sequence, list[int]]], hidden: Tensor) -> None:
        """Choose the next token of each sequence, and one more for every right guess; `hidden` has a row for each of these."""
        logits = self.runner.logits(hidden)
        chosen = [self._row(s, guesses[:i]) for s, guesses in ready for i in range(len(guesses) + 1)]
        tokens, logprobs = (x.tolist() for x in sample(logits, chosen))
        first = 0
        for s, guesses in ready:
            right = 0
            while right < len(guesses) and tokens[first + right] == guesses[right]:
                right += 1
            made = slice(first, first + right + 1)
            if math.isnan(sum(logprobs[made])):
                self._spoilt(s, f"logits after token {s.length - 1}")
            else:
                self._append(s, logits, first, tokens[made], logprobs[made])
                self._counts.guesses += len(guesses)
                self._counts.right_guesses += right
            first += len(guesses) + 1

    def _append(self, s: Sequence, logits: Tensor, first: int, tokens: list[int], logprobs: list[float]) -> None:
        """New tokens of one sequence, until its end; `first` is the row of `logits` that the first was chosen by."""
        had, asked = len(s.ids), s.request.params.logprobs
        for token, logprob in zip(tokens, logprobs, strict=True):
            s.append(token, logprob, self.end_ids, self.max_len)
            if s.form is not None and not s.finish_reason:
                s.form.advance(token)
                if s.form.done and not self.end_ids:
                    s.finish_reason = "stop"
            if s.finish_reason:
                break
        new = len(s.ids) - had
        self._counts.generation_tokens += new
        if asked is not None:
            s.top_logprobs += top_logprobs(logits[first : first + new], s.ids[had:], [asked] * new)
        if s.draft:
            s.draft = []
        self.scheduler.computed(s, s.length - 1)  # the last one is yet to be read

    def _spoilt(self, s: Sequence, what: str) -> None:
        """End an answer of which the model made numbers that are not finite; nobody is to read its blocks."""
        self.runner.clear(s.table[s.chain.blocks :], s.slot or 0)
        s.finish_reason, s.error, s.spoilt, s.draft = "abort", what, True, []

    @staticmethod
    def _formed(s: Sequence, form: constrained.Constraint) -> bool:
        """See which tokens may come next; where the form leads nowhere the answer ends with the reason."""
        try:
            s.allowed = form.allowed()
        except RequestError as error:
            s.finish_reason, s.error = "abort", str(error)
            return False
        return True

    def _row(self, sequence: Sequence, guesses: list[int]) -> Row:
        """What the sampler has to know of a sequence, when so many guesses are right."""
        params, banned = sequence.request.params, list[int]()
        ids = [*sequence.ids, *guesses] if guesses else sequence.ids
        if len(ids) < params.min_tokens:
            banned += [*self.end_ids, *params.stop_ids]
        for *before, word in sequence.words:
            if not before or ids[-len(before) :] == before:
                banned.append(word)
        return Row(params, banned, sequence.allowed, sequence.request.prompt_ids, ids)

    def _guess(self) -> None:
        """Plan guesses for the sequences of which one token is due."""
        if self.guesser is None:
            return
        going = [s for s in self.scheduler.running if s.due == 1]
        # Not where blocks are short: a guess is not worth what somebody else has computed.
        if self.scheduler.blocks.free <= len(going):
            return
        for s in going:
            most = min(s.request.params.max_tokens - len(s.ids), self.max_len - s.length) - 1
            if most > 0 and s.request.params.structure is None:
                s.draft = self.guesser.plan(s, most)

    def _tell_prompt(self, sequence: Sequence, hidden: Tensor) -> None:
        """Log-probabilities of the prompt's next tokens, from what the model made of those before them."""
        wanted = sequence.request.params.prompt_logprobs or 0
        known = sequence.prompt_logprobs = sequence.prompt_logprobs or [None]
        hidden = hidden[len(known) - sequence.computed - 1 :]  # what was preempted is computed once more, but told already
        targets = list(sequence.start[len(known) : len(known) + len(hidden)])
        for first in range(0, len(targets), _TOLD):
            some = targets[first : first + _TOLD]
            known += top_logprobs(self.runner.logits(hidden[first : first + len(some)]), some, [wanted] * len(some))

    def _retire(self) -> list[Chunk]:
        chunks = []
        for s in self.scheduler.retire():
            content, reasoning = s.take()
            self._ids.discard(s.request.id)
            chunks.append(Chunk(s.request.id, content, reasoning, s.completion(self.tokenizer.think_id), *s.tell()))
        return chunks
