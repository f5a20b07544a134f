"""One request while it is being answered."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as TokenSequence
from dataclasses import dataclass, field

from athanor.tokenizer.stream import StreamDecoder
from athanor.types import Completion, FinishReason, Request


@dataclass(eq=False)
class Sequence:
    """A request, the tokens made so far and the text decoder that follows them.

    start   tokens that the answer goes on from: the prompt by default, or what an encoder-decoder's answer starts with
    """

    request: Request
    decoder: StreamDecoder
    start: TokenSequence[int] = ()
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    content: str = ""
    reasoning: str = ""
    finish_reason: FinishReason | None = None
    _n_read: int = 0

    def __post_init__(self) -> None:
        self.start = self.start or self.request.prompt_ids

    @property
    def length(self) -> int:
        """Tokens of start and answer."""
        return len(self.start) + len(self.ids)

    def append(self, token: int, logprob: float, end_ids: Collection[int], max_len: int) -> None:
        """Take one new token and see whether the answer ends with it."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        if self.request.params.stop:
            self._read()  # only a stop text has to be seen at once
        if token in end_ids or self.decoder.stopped:
            self.finish_reason = "stop"
        elif len(self.ids) >= self.request.params.max_tokens or self.length >= max_len:
            self.finish_reason = "length"

    def take(self) -> tuple[str, str]:
        """New content and reasoning since the last take; everything that is held back too once finished."""
        self._read()
        content, reasoning = self.decoder.take()
        if self.finish_reason:
            rest = self.decoder.finish()
            content, reasoning = content + rest[0], reasoning + rest[1]
        self.content += content
        self.reasoning += reasoning
        return content, reasoning

    def _read(self) -> None:
        """Hand the decoder the tokens that it has not seen."""
        for token in self.ids[self._n_read :]:
            self.decoder.push(token)
        self._n_read = len(self.ids)

    def completion(self, think_id: int | None) -> Completion:
        """The finished answer; every piece of text must have been taken."""
        assert self.finish_reason is not None
        return Completion(
            request_id=self.request.id,
            prompt_ids=self.request.prompt_ids,
            ids=tuple(self.ids),
            logprobs=tuple(self.logprobs),
            text=self.content,
            reasoning=self.reasoning if think_id in self.ids else None,
            finish_reason=self.finish_reason,
        )
