"""One request while it is being answered."""

from __future__ import annotations

import time
from collections.abc import Collection
from collections.abc import Sequence as TokenSequence
from dataclasses import dataclass, field

from torch import Tensor

from athanor.infer.blocks import Chain
from athanor.infer.constrained import Constraint
from athanor.tokenizer.stream import StreamDecoder
from athanor.types import Completion, FinishReason, Request, Timing, TokenLogprob


@dataclass(eq=False)
class Sequence:
    """A request, the tokens made so far, what is in the cache of it, and the text decoder that follows.

    decoder   of the answer's text
    start     tokens that the answer goes on from: the prompt by default, or what an encoder-decoder's answer starts with
    tokens    start and answer
    ids       the answer
    order     who is served first
    slot      its place among those that run; None while it waits
    table     blocks of the cache that hold its tokens, in order
    chain     which of them are known to others
    computed  how many of its tokens are in the cache
    draft     tokens that are guessed to come next, to be checked by the next step
    cached    tokens of the prompt that others had computed
    words     what may not appear, as tokens
    form      that the answer must have
    allowed   (V,) bool: tokens that it allows next
    error     why it cannot go on
    spoilt    whether that is since what `error` names is not finite
    drafted   how many of its tokens are in the cache of a draft model
    seen      where runs of its first `n_seen` tokens ended last
    """

    request: Request
    decoder: StreamDecoder
    start: TokenSequence[int] = ()
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    content: str = ""
    reasoning: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    order: tuple[int, int] = (0, 0)
    slot: int | None = None
    table: list[int] = field(default_factory=list)
    chain: Chain = field(default_factory=Chain)
    computed: int = 0
    draft: list[int] = field(default_factory=list)
    cached: int = 0
    words: list[tuple[int, ...]] = field(default_factory=list)
    form: Constraint | None = None
    allowed: Tensor | None = None
    error: str | None = None
    spoilt: bool = False
    drafted: int = 0
    seen: dict[tuple[int, ...], int] = field(default_factory=dict)
    n_seen: int = 1
    added: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first: float | None = None
    _n_read: int = 0
    _n_told: int = 0

    def __post_init__(self) -> None:
        self.start = self.start or self.request.prompt_ids
        self.tokens = [*self.start]

    @property
    def length(self) -> int:
        """Tokens of start and answer."""
        return len(self.tokens)

    @property
    def reads_cache(self) -> bool:
        """Whether what others computed is of use: log-probabilities of the prompt need all of it computed."""
        return self.request.params.prompt_logprobs is None

    @property
    def due(self) -> int:
        """Tokens that are not in the cache, guesses included."""
        return len(self.tokens) - self.computed + len(self.draft)

    def leave(self) -> None:
        """Nothing of it is in the cache any more."""
        self.slot, self.table, self.chain, self.computed = None, [], Chain(), 0
        self.draft, self.drafted = [], 0

    def append(self, token: int, logprob: float, end_ids: Collection[int], max_len: int) -> None:
        """Take one new token and see whether the answer ends with it."""
        if self.first is None:
            self.first = time.perf_counter()
        params = self.request.params
        self.ids.append(token)
        self.tokens.append(token)
        self.logprobs.append(logprob)
        early = len(self.ids) < params.min_tokens
        if token in params.stop_ids and not early:
            self.finish_reason, self.stop_reason = "stop", token
            return
        if params.stop and not early:
            self._read()  # only a stop text has to be seen at once
        if (token in end_ids and not params.ignore_eos) or (self.decoder.stopped_by is not None and not early):
            self.finish_reason, self.stop_reason = "stop", self.decoder.stopped_by
        elif len(self.ids) >= params.max_tokens or self.length >= max_len:
            self.finish_reason = "length"

    def take(self) -> tuple[str, str]:
        """New content and reasoning since the last take; everything that is held back too once finished."""
        self._read()
        content, reasoning = self.decoder.take()
        if self.finish_reason:
            rest = self.decoder.finish()
            content, reasoning = content + rest[0], reasoning + rest[1]
            if self.decoder.stopped_by is not None and self.finish_reason == "length":  # in what was held back
                self.finish_reason, self.stop_reason = "stop", self.decoder.stopped_by
        self.content += content
        self.reasoning += reasoning
        return content, reasoning

    def tell(self) -> tuple[tuple[int, ...], tuple[TokenLogprob, ...]]:
        """Tokens since the last call, and what is known of them."""
        new = slice(self._n_told, len(self.ids))
        self._n_told = len(self.ids)
        return tuple(self.ids[new]), tuple(self.top_logprobs[new])

    def _read(self) -> None:
        """Hand the decoder the tokens that it has not seen; the one that stopped the answer is not part of its text."""
        end = len(self.ids) - (isinstance(self.stop_reason, int))
        for token in self.ids[self._n_read : end]:
            self.decoder.push(token)
        self._n_read = len(self.ids)

    def completion(self, think_id: int | None) -> Completion:
        """The finished answer; every piece of text must have been taken."""
        assert self.finish_reason is not None
        params, now = self.request.params, time.perf_counter()
        started = now if self.started is None else self.started
        return Completion(
            request_id=self.request.id,
            prompt_ids=self.request.prompt_ids,
            ids=tuple(self.ids),
            logprobs=tuple(self.logprobs),
            text=self.content,
            reasoning=self.reasoning if think_id in self.ids else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            top_logprobs=None if params.logprobs is None else tuple(self.top_logprobs),
            prompt_logprobs=None if params.prompt_logprobs is None else tuple(self.prompt_logprobs),
            cached=self.cached,
            error=self.error,
            spoilt=self.spoilt,
            timing=Timing(self.added, started, now if self.first is None else self.first, now),
        )
