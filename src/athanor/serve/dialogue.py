"""A conversation with one engine, in one thread: history that fits the context, answers as they come."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from athanor.core.errors import RequestError
from athanor.tokenizer.chat import render
from athanor.types import FinishReason, Message, Request, SamplingParams

if TYPE_CHECKING:
    from athanor.infer.engine import Chunk, Engine
    from athanor.tokenizer.vocabulary import Vocabulary


class Turn:
    """One question and its answer; iterate over it to get the answer's chunks.

    dropped        earlier messages that were left out to make room
    prompt         tokens of the messages that are sent
    tokens         new tokens so far
    seconds        time from the first step to the last chunk, reading the prompt included
    finish_reason  None until the end; "abort" when it was stopped
    """

    def __init__(self, request: Request, dropped: int, chunks: Callable[[Turn], Iterator[Chunk]]) -> None:
        self.request = request
        self.dropped = dropped
        self.prompt = len(request.prompt_ids)
        self.tokens = 0
        self.seconds = 0.0
        self.finish_reason: FinishReason | None = None
        self._chunks = chunks

    def __iter__(self) -> Iterator[Chunk]:
        return self._chunks(self)


class Dialogue:
    """The messages so far, and the engine that answers.

    An answer's reasoning stays in the history, as it does in the conversations of training.
    """

    def __init__(self, engine: Engine, tokenizer: Vocabulary, system: str | None = None) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._names = itertools.count(1)
        self.system = system
        self.history: list[Message] = []

    def ask(
        self, text: str, *, max_tokens: int | None = None, stopped: Callable[[], bool] = lambda: False, **params: Any
    ) -> Turn:
        """Put `text` to the engine.

        When history, text and answer do not fit into the context, the oldest turns are dropped, for good, and counted in the
        Turn. While there are turns to drop, the answer is given `max_tokens`, or a quarter of the context.

        Args:
            text: the user's message.
            max_tokens: new tokens at most; None is what the context has left.
            stopped: asked between the engine's steps; once it is true, the answer ends there.
            params: the other fields of SamplingParams.

        Raises:
            RequestError: the text does not fit even alone, or a parameter is out of range; nothing has changed.
        """
        context = self._engine.max_len
        room = context // 4 if max_tokens is None else max_tokens
        question = Message("user", text)
        kept = self.history
        while len(ids := self._ids([*kept, question])) + room > context and kept:
            kept = _without_oldest_turn(kept)
        left = context - len(ids)
        if left < 1:
            both = "the message" if self.system is None else "the message and the system text"
            raise RequestError(
                f"{both} make {len(ids)} tokens, but the context has {context} for them and the answer: shorten them", "messages"
            )
        limit = left if max_tokens is None else min(max_tokens, left)
        request = Request(f"turn-{next(self._names)}", ids, SamplingParams(max_tokens=limit, **params))
        self._engine.add(request)
        dropped = len(self.history) - len(kept)
        self.history = [*kept, question]
        return Turn(request, dropped, lambda turn: self._answer(turn, stopped))

    def reset(self) -> None:
        """Forget everything but the system text."""
        self.history.clear()

    def _ids(self, messages: list[Message]) -> list[int]:
        system = [] if self.system is None else [Message("system", self.system)]
        return render(self._tokenizer, [*system, *messages], generation_prompt=True).ids

    def _answer(self, turn: Turn, stopped: Callable[[], bool]) -> Iterator[Chunk]:
        started = time.perf_counter()
        content, reasoning = "", ""
        try:
            while turn.finish_reason is None and not stopped():
                for chunk in self._engine.step():
                    if chunk.request_id != turn.request.id:
                        continue  # the end of an earlier answer that was stopped
                    content += chunk.content
                    reasoning += chunk.reasoning
                    turn.seconds = time.perf_counter() - started
                    if chunk.completion is not None:
                        turn.finish_reason = chunk.completion.finish_reason
                        turn.tokens = len(chunk.completion.ids)
                        self.history.append(Message("assistant", chunk.completion.text, chunk.completion.reasoning))
                    yield chunk
        finally:
            if turn.finish_reason is None:
                self._engine.abort(turn.request.id)
                turn.finish_reason = "abort"
                # What was said stays said; a question without any answer would only confuse the next one.
                if content:
                    self.history.append(Message("assistant", content, reasoning or None))
                else:
                    self.history.pop()


def _without_oldest_turn(messages: list[Message]) -> list[Message]:
    """`messages` from the second question on."""
    later = [i for i, message in enumerate(messages) if message.role == "user" and i > 0]
    return messages[later[0] :] if later else []
