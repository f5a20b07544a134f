"""A conversation with one engine, in one thread: history that fits the context, answers as they come."""

from __future__ import annotations

import itertools
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from athanor.core.errors import NonFiniteError, RequestError, nearest
from athanor.tokenizer.chat import messages_from, render
from athanor.types import FinishReason, Message, Request, SamplingParams

if TYPE_CHECKING:
    from athanor.infer.engine import Chunk, Engine
    from athanor.tokenizer.vocabulary import Vocabulary


class Parameters:
    """How answers are sampled, as a user changes it: the fields of SamplingParams that make sense in a chat, by name.

    max_tokens  None is what the context has left
    seed        None is another one for every answer
    stop        one text, or ""
    """

    _KINDS: ClassVar[dict[str, type[float] | type[int] | type[str]]] = {
        "temperature": float, "top_p": float, "top_k": int, "min_p": float, "max_tokens": int, "min_tokens": int, "seed": int,
        "repetition_penalty": float, "presence_penalty": float, "frequency_penalty": float, "stop": str,
    }  # fmt: skip

    def __init__(self, **given: float | None) -> None:
        usual = SamplingParams()
        self._default: dict[str, Any] = {n: getattr(usual, n) for n in self._KINDS} | {"stop": "", "max_tokens": None} | given
        self._now = dict(self._default)

    def set(self, words: str) -> None:
        """Change what `words` name: `temperature=0 stop="the end"`; a name without a value gets its first one back.

        Raises RequestError for a name or a value that does not fit, and changes nothing.
        """
        try:
            changes = dict(word.partition("=")[::2] for word in shlex.split(words))
        except ValueError as error:
            raise RequestError(f"parameters {words!r} cannot be read ({error}): close the quotes") from error
        self._now |= {name: self._read(name, value) for name, value in changes.items()}

    def _read(self, name: str, value: str) -> Any:
        if name not in self._KINDS:
            raise RequestError(f"no parameter {name!r}{nearest(name, self._KINDS)}; there are {', '.join(self._KINDS)}")
        if not value:
            return self._default[name]
        try:
            return self._KINDS[name](value)
        except ValueError as error:
            raise RequestError(f"{name} is {value!r}, but must be a number ({self._KINDS[name].__name__})", name) from error

    def values(self) -> dict[str, Any]:
        """All of them by name."""
        return dict(self._now)

    def restore(self, values: Mapping[str, Any]) -> None:
        """Take what `values` gave. Raises RequestError as `set` does, and changes nothing."""
        empty = ("max_tokens", "seed")
        read = {n: None if v is None and n in empty else self._read(n, str(v)) for n, v in values.items()}
        self._now |= read

    def draw(self) -> dict[str, Any]:
        """For `Dialogue.ask`; without a seed every call draws one."""
        seed, stop = self._now["seed"], self._now["stop"]
        return self._now | {"seed": secrets.randbits(62) if seed is None else seed, "stop": (stop,) if stop else ()}

    def __str__(self) -> str:
        """For reading."""
        return " ".join(f"{name}={'auto' if value is None else shlex.quote(str(value))}" for name, value in self._now.items())


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
        self.history = []

    def messages(self) -> list[dict[str, str]]:
        """The conversation as OpenAI's clients write it, the system text first."""
        return [
            {"role": m.role, "content": m.content} | ({} if m.reasoning is None else {"reasoning_content": m.reasoning})
            for m in self._whole(self.history)
        ]

    def resume(self, messages: Any) -> None:
        """Go on from what `messages` gave. Raises RequestError, and changes nothing, when it is no such conversation."""
        found = list(messages_from(messages)) if messages else []
        system = found.pop(0).content if found and found[0].role == "system" else None
        for i, message in enumerate(found):
            wanted = ("user", "assistant")[i % 2]
            if message.role != wanted:
                place = i + (system is not None)
                raise RequestError(
                    f"messages[{place}].role is {message.role!r}, but {wanted!r} comes next: correct it", "messages"
                )
        if len(found) % 2:
            raise RequestError("the last of the messages is a question: add its answer, or leave it out", "messages")
        self.system, self.history = system, found

    def _ids(self, messages: list[Message]) -> list[int]:
        return render(self._tokenizer, self._whole(messages), generation_prompt=True).ids

    def _whole(self, messages: list[Message]) -> list[Message]:
        return messages if self.system is None else [Message("system", self.system), *messages]

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
                    if chunk.completion is not None and chunk.completion.spoilt:
                        raise NonFiniteError(str(chunk.completion.error))
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
