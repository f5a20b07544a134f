"""Calls of tools, text and reasoning out of one streamed answer, as they come."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from typing_extensions import NotRequired, TypedDict

from athanor.tokenizer.chat import ours
from athanor.tokenizer.stream import StreamDecoder
from athanor.tokenizer.template import ARGUMENTS, CALL
from athanor.tokenizer.vocabulary import Vocabulary
from athanor.types import Completion

if TYPE_CHECKING:
    from athanor.infer.engine import Chunk

BLANK = " \t\r\n"  # of JSON


class FunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


class CallDelta(TypedDict):
    """What is new of a call: first its id and name, then its arguments in pieces."""

    index: int
    id: NotRequired[str]
    type: NotRequired[str]
    function: FunctionDelta


@dataclass(frozen=True)
class News:
    """What is new of an answer; `finish_reason` is None while it goes on."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
    finish_reason: str | None = None


class Reader:
    """Reads one streamed answer as `Offer.read` reads it when it is whole; nothing is ever taken back."""

    def __init__(self, tokenizer: Vocabulary, names: frozenset[str], stop: Sequence[str]) -> None:
        self._tokenizer = ours(tokenizer)
        self._names = names
        self._text = StreamDecoder(tokenizer, stop)
        # Not the decoder's: it reads nothing after a stop text, and thoughts, like calls, are not cut by one.
        self._thoughts = self._tokenizer.pieces(())
        self._n_read = 0
        self._ended = self._thinking = False
        # Of the call that is being read: its tokens until it is known to be one, and how its arguments become text.
        self._place: Literal["text", "name", "arguments", "open"] = "text"
        self._held: list[int] = []
        self._name = self._arguments = ""
        self._pieces = self._tokenizer.pieces(())
        self._n_calls = 0
        self._new: list[CallDelta] = []

    def read(self, chunk: Chunk) -> News:
        """What is new with the next chunk of the answer."""
        ids = chunk.ids if chunk.completion is None else spoken(chunk.completion)[self._n_read :]
        self._n_read += len(ids)
        reasoning = "".join([self._push(id, chunk.request_id) for id in ids])
        content = self._text.take()[0]
        finish_reason = None
        if chunk.completion is not None:
            self._close(chunk.request_id)
            content += self._text.finish()[0]
            reasoning += self._thoughts.finish()
            finish_reason = why_ended(chunk.completion, self._n_calls > 0)
        calls, self._new = tuple(self._new), []
        return News(content, reasoning, calls, finish_reason)

    def _push(self, id: int, request_id: str) -> str:
        """Read one token; returns what is new of the reasoning."""
        tokenizer = self._tokenizer
        if self._ended:
            return ""
        if id == tokenizer.end_id:
            self._ended = True
        elif id in (tokenizer.think_id, tokenizer.end_think_id):
            self._thinking = id == tokenizer.think_id
        elif self._thinking:
            return self._thoughts.push(id) if id >= len(tokenizer.control) else ""
        elif id == tokenizer.control[CALL]:
            self._close(request_id)
            self._place, self._held = "name", []
        elif id == tokenizer.control[ARGUMENTS]:
            if self._place == "name":
                self._name = tokenizer.decode(self._held)
                self._place, self._arguments, self._pieces = "arguments", "", tokenizer.pieces(())
                if self._name not in self._names:
                    self._give_up()
        elif id >= len(tokenizer.control):
            self._push_text(id, request_id)
        return ""

    def _push_text(self, id: int, request_id: str) -> None:
        if self._place == "text":
            self._text.push(id)
        elif self._place == "name":
            self._held.append(id)
        elif self._place == "open":
            self._tell(self._pieces.push(id))
        else:
            self._held.append(id)
            self._arguments += self._pieces.push(id)
            if begun := self._arguments.lstrip(BLANK):
                if begun.startswith("{"):
                    self._open(request_id)
                else:
                    self._give_up()

    def _open(self, request_id: str) -> None:
        """It is a call: tell all that is known of it."""
        self._place = "open"
        head: CallDelta = {
            "index": self._n_calls,
            "id": id_of(request_id, self._n_calls),
            "type": "function",
            "function": {"name": self._name, "arguments": ""},
        }
        self._n_calls += 1
        self._new.append(head)
        self._tell(self._arguments)

    def _tell(self, arguments: str) -> None:
        if arguments:
            self._new.append({"index": self._n_calls - 1, "function": {"arguments": arguments}})

    def _give_up(self) -> None:
        """It is no call: what was held is text, and so is what follows."""
        for id in self._held:
            self._text.push(id)
        self._place, self._held = "text", []

    def _close(self, request_id: str) -> None:
        """Nothing more comes of the call that is being read, if there is one."""
        if self._place == "open":
            self._tell(self._pieces.finish())
        elif self._place != "text":
            self._give_up()


def spoken(completion: Completion) -> Sequence[int]:
    """The tokens of the answer without the one of stop_ids that ended it."""
    return completion.ids[:-1] if isinstance(completion.stop_reason, int) else completion.ids


def id_of(request_id: str, index: int) -> str:
    """No two calls of a server have the same, and it says nothing of the request."""
    return "call_" + hashlib.sha256(f"{request_id} {index}".encode()).hexdigest()[:24]


def why_ended(completion: Completion, called: bool) -> str:
    """The finish_reason of an answer that has calls or none."""
    return "tool_calls" if called and completion.finish_reason == "stop" else completion.finish_reason
