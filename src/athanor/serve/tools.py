"""Tools in OpenAI's words: what a request says of them, the form that makes a model call one, and calls out of its answer.

    offer = Offer.of(request.tools, request.tool_choice, request.parallel_tool_calls)
    messages = offer.told(messages)                        # the model reads of them
    structure = offer.structure()                          # where a call is forced, or must keep to a schema
    said = offer.read(tokenizer, completion)               # of an answer that is whole
    reader = offer.reader(tokenizer); reader.read(chunk)   # of one that is streamed: the same

A call stands in an answer as CALL name ARGUMENTS arguments (`tokenizer.chat`), so no text is ever taken for one. What looks like
a call and names no tool on offer, or has no arguments that begin as a JSON object, stays text. Arguments are passed on as they
come: they may be cut short, and invalid too, as OpenAI's may, unless the function is `strict` or a call is forced.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag
from typing_extensions import NotRequired, TypedDict

from athanor.core.errors import RequestError, nearest
from athanor.serve.body import Fields, Strict
from athanor.tokenizer.chat import ours, parts, tools_from
from athanor.tokenizer.stream import StreamDecoder, cut
from athanor.tokenizer.template import ARGUMENTS, CALL
from athanor.tokenizer.vocabulary import Vocabulary
from athanor.types import Completion, Structure, Tool

if TYPE_CHECKING:
    from athanor.infer.engine import Chunk

MAX_TOOLS = 128
MAX_CALLS = 16  # of one answer, where a form limits them
MAX_DEPTH = 32  # of parameters, in objects and lists
_NAME = r"^[a-zA-Z0-9_-]{1,64}$"
_BLANK = " \t\r\n"
_ANY_OBJECT = '{"type": "object"}'


# --- requests


class Function(Strict):
    name: str = Field(pattern=_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False


class ToolSpec(Strict):
    """One of a request's `tools`."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedChoice(Strict):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")] | Annotated[NamedChoice, Tag("<named>")],
    Discriminator(lambda value: "<word>" if isinstance(value, str) else "<named>"),
]


class CalledFunction(Strict):
    name: str = Field(min_length=1)
    arguments: str


class AssistantCall(Strict):
    """One of the `tool_calls` of an assistant's message that a client sends back."""

    UNSUPPORTED: ClassVar[Fields] = {"custom": ()}
    INERT = frozenset({"index"})  # of streamed calls, put together

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def plain(self) -> dict[str, Any]:
        """What the renderer takes."""
        return {"id": self.id, "function": {"name": self.function.name, "arguments": self.function.arguments}}


# --- answers


class CallFunction(TypedDict):
    name: str
    arguments: str


class CallBody(TypedDict):
    """A call of an answer."""

    id: str
    type: str
    function: CallFunction


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
class Said:
    """An answer; its finish_reason is "tool_calls" where the model ended it with calls."""

    content: str
    reasoning: str | None
    calls: Sequence[CallBody]
    finish_reason: str


@dataclass(frozen=True)
class News:
    """What is new of an answer; `finish_reason` is None while it goes on."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
    finish_reason: str | None = None


@dataclass(frozen=True)
class Offer:
    """What a model may call in its next answer.

    tools     in the order of the request; () where it may call none
    strict    names of those whose schema is kept to
    forced    names of those of which one has to be called; None where the model decides
    parallel  whether one answer may have several calls
    """

    tools: tuple[Tool, ...] = ()
    strict: frozenset[str] = frozenset()
    forced: tuple[str, ...] | None = None
    parallel: bool = True

    @classmethod
    def of(cls, tools: Sequence[ToolSpec] | None, choice: str | NamedChoice | None = None, parallel: bool | None = None) -> Offer:
        """What a request offers. With `tool_choice` "none" the model does not even read of the tools.

        Raises RequestError for fields that do not fit together, and for tools of one name or with parameters of no object.
        """
        if not tools:
            if choice not in (None, "none", "auto"):
                raise RequestError("'tool_choice' asks for a call without 'tools': add some or leave it out", "tool_choice")
            if parallel is False:
                field = "parallel_tool_calls"
                raise RequestError(f"'{field}' is allowed only with 'tools': add some or leave it out", field)
            return cls()
        try:
            known = tools_from([_definition(i, spec.function) for i, spec in enumerate(tools)])
        except RequestError as error:
            raise RequestError(str(error), "tools") from None
        names = tuple(tool.name for tool in known)
        if choice == "none":
            return cls()
        forced = names if choice == "required" else None
        if isinstance(choice, NamedChoice):
            forced = (choice.function.name,)
            if forced[0] not in names:
                named = forced[0][:80]
                raise RequestError(
                    f"'tool_choice' names {named!r}, which is none of 'tools'{nearest(named, names)}: name one of them",
                    "tool_choice.function.name",
                )
        strict = frozenset(spec.function.name for spec in tools if spec.function.strict)
        return cls(known, strict, forced, parallel is not False and not isinstance(choice, NamedChoice))

    def told(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """`messages` with the tools at the system message that they begin with, or at one of their own before them."""
        if not self.tools:
            return list(messages)
        first: Mapping[str, Any] = {"role": "system", "content": ""}
        if messages and messages[0].get("role") == "system":
            first, messages = messages[0], messages[1:]
        return [{**first, "tools": [*(first.get("tools") or ()), *self.tools]}, *messages]

    def structure(self) -> Structure | None:
        """The form of the answer: only calls where one is forced, else any text and calls that keep to what was asked.

        None where the model is free: it decides, no function is strict, and there may be several calls.
        """
        if not self.tools or (self.forced is None and self.parallel and not self.strict):
            return None
        callable_ = [tool for tool in self.tools if self.forced is None or tool.name in self.forced]
        rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(callable_)))}"]
        for i, tool in enumerate(callable_):
            kept = self.forced is not None or tool.name in self.strict
            schema = (tool.parameters or '{"additionalProperties": false}') if kept else _ANY_OBJECT
            arguments = json.dumps({"type": "object", **json.loads(schema), "x-guidance": _WRITTEN})
            rules.append(f"call_{i}: {CALL} {json.dumps(tool.name)} {ARGUMENTS} %json {arguments}")
        fewest = 0 if self.forced is None else 1
        calls = f"call{{{fewest},{MAX_CALLS if self.parallel else 1}}}"
        start = f"start: {calls}" if self.forced else f"start: TEXT {calls}\nTEXT: /(.|\\n)*/"
        return Structure("grammar", "\n".join([start, *rules]))

    def reader(self, tokenizer: Vocabulary, stop: Sequence[str] = ()) -> Reader:
        """For one streamed answer; `stop` are its stop texts."""
        return Reader(tokenizer, frozenset(tool.name for tool in self.tools), stop)

    def read(self, tokenizer: Vocabulary, completion: Completion, stop: Sequence[str] = ()) -> Said:
        """An answer that is whole. Takes any answer."""
        names = {tool.name for tool in self.tools}
        answer = parts(tokenizer, _spoken(completion))
        content, calls = answer.content, list[CallBody]()
        for name_ids, argument_ids in answer.calls:
            name, arguments = tokenizer.decode(name_ids), tokenizer.decode(argument_ids or ())
            if name in names and arguments.lstrip(_BLANK).startswith("{"):
                id = _call_id(completion.request_id, len(calls))
                calls.append({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
            else:
                content = [*content, *name_ids, *(argument_ids or ())]
        reasoning = None if answer.reasoning is None else tokenizer.decode(answer.reasoning)
        return Said(cut(tokenizer.decode(content), stop)[0], reasoning, calls, _finish_reason(completion, bool(calls)))


class Reader:
    """Reads one streamed answer as `Offer.read` reads it when it is whole; nothing is ever taken back."""

    def __init__(self, tokenizer: Vocabulary, names: frozenset[str], stop: Sequence[str]) -> None:
        self._tokenizer = ours(tokenizer)
        self._names = names
        self._text = StreamDecoder(tokenizer, stop)
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
        ids = chunk.ids if chunk.completion is None else _spoken(chunk.completion)[self._n_read :]
        self._n_read += len(ids)
        for id in ids:
            self._push(id, chunk.request_id)
        content, reasoning = self._text.take()
        finish_reason = None
        if chunk.completion is not None:
            self._close(chunk.request_id)
            rest = self._text.finish()
            content, reasoning = content + rest[0], reasoning + rest[1]
            finish_reason = _finish_reason(chunk.completion, self._n_calls > 0)
        calls, self._new = tuple(self._new), []
        return News(content, reasoning, calls, finish_reason)

    def _push(self, id: int, request_id: str) -> None:
        tokenizer = self._tokenizer
        if self._ended:
            return
        if id == tokenizer.end_id:
            self._ended = True
        elif id in (tokenizer.think_id, tokenizer.end_think_id):
            self._thinking = id == tokenizer.think_id
            self._text.push(id)
        elif self._thinking:
            self._text.push(id)
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
            if begun := self._arguments.lstrip(_BLANK):
                if begun.startswith("{"):
                    self._open(request_id)
                else:
                    self._give_up()

    def _open(self, request_id: str) -> None:
        """It is a call: tell all that is known of it."""
        self._place = "open"
        head: CallDelta = {
            "index": self._n_calls,
            "id": _call_id(request_id, self._n_calls),
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
        ids: list[int] = self._held
        if self._thinking:  # it ended within a thought, to which it does not belong
            ids = [self._tokenizer.end_think_id, *ids, self._tokenizer.think_id]
        for id in ids:
            self._text.push(id)
        self._place, self._held = "text", []

    def _close(self, request_id: str) -> None:
        """Nothing more comes of the call that is being read, if there is one."""
        if self._place == "open":
            self._tell(self._pieces.finish())
        elif self._place != "text":
            self._give_up()


# How a form writes arguments: as models were taught to, with blanks only where they belong.
_WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def _definition(i: int, function: Function) -> dict[str, Any]:
    parameters = function.parameters
    if parameters is not None:
        if parameters.get("type", "object") != "object":
            raise RequestError(
                f"tools[{i}].function.parameters is a schema of type {parameters['type']!r}: arguments are an object, use"
                " {'type': 'object', 'properties': {...}}"
            )
        level: list[Any] = [parameters]
        depth = 0
        while level := [x for x in level if isinstance(x, (dict, list))]:
            depth += 1
            if depth > MAX_DEPTH:
                raise RequestError(
                    f"tools[{i}].function.parameters nests deeper than {MAX_DEPTH} levels, the most this server reads: flatten it"
                )
            level = [child for x in level for child in (x.values() if isinstance(x, dict) else x)]
    return {"name": function.name, "description": function.description, "parameters": parameters}


def _spoken(completion: Completion) -> Sequence[int]:
    """The tokens of the answer without the one of stop_ids that ended it."""
    return completion.ids[:-1] if isinstance(completion.stop_reason, int) else completion.ids


def _call_id(request_id: str, index: int) -> str:
    """No two calls of a server have the same, and it says nothing of the request."""
    return "call_" + hashlib.sha256(f"{request_id} {index}".encode()).hexdigest()[:24]


def _finish_reason(completion: Completion, called: bool) -> str:
    return "tool_calls" if called and completion.finish_reason == "stop" else completion.finish_reason
