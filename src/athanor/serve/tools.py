"""Tools in OpenAI's words: what a request says of them, the form that makes a model call one, and calls out of its answer.

    offer = Offer.of(request.tools, request.tool_choice, request.parallel_tool_calls)
    messages = offer.told(messages)                        # the model reads of them
    structure = offer.structure()                          # where a call is forced, or must keep to a schema
    said = offer.read(tokenizer, completion)               # of an answer that is whole
    reader = offer.reader(tokenizer); reader.read(chunk)   # of one that is streamed: the same
    listener = Listener(offer, tokenizer)                  # both, for answers that may have been offered nothing too

A call stands in an answer as CALL name ARGUMENTS arguments (`tokenizer.chat`), so no text is ever taken for one. What looks like
a call and names no tool on offer, or has no arguments that begin as a JSON object, stays text. Arguments are passed on as they
come: they may be cut short, and invalid too, as OpenAI's may, unless the function is `strict` or a call is forced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag
from typing_extensions import TypedDict

from athanor.core.errors import RequestError, nearest
from athanor.serve.body import Fields, Strict
from athanor.serve.reader import BLANK, News, Reader, id_of, spoken, why_ended
from athanor.tokenizer.chat import ours, parts, tools_from
from athanor.tokenizer.stream import cut
from athanor.tokenizer.template import ARGUMENTS, CALL
from athanor.tokenizer.vocabulary import Vocabulary
from athanor.types import Completion, Structure, Tool

if TYPE_CHECKING:
    from athanor.infer.engine import Chunk

MAX_TOOLS = 128
MAX_CALLS = 16  # of one answer, where a form limits them
MAX_DEPTH = 32  # of parameters, in objects and lists
_NAME = r"^[a-zA-Z0-9_-]{1,64}$"
_ANY_OBJECT = '{"type": "object"}'


# --- requests


class Function(Strict):
    name: str = Field(pattern=_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False


class ToolSpec(Strict):
    """One of the `tools` of a chat."""

    AT: ClassVar[str] = ".function"  # where its function stands in it

    type: Literal["function"]
    function: Function


class FlatTool(Function):
    """One of the `tools` of a response, which is the function itself."""

    AT: ClassVar[str] = ""
    UNSUPPORTED: ClassVar[Fields] = {
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
        "output_schema": (),
    }

    type: Literal["function"]

    @property
    def function(self) -> Function:
        """Itself, as `ToolSpec` has it."""
        return self


class NamedFunction(Strict):
    name: str


class NamedChoice(Strict):
    AT: ClassVar[str] = ".function"

    type: Literal["function"]
    function: NamedFunction


class FlatChoice(NamedFunction):
    """The named choice of a response."""

    AT: ClassVar[str] = ""

    type: Literal["function"]

    @property
    def function(self) -> NamedFunction:
        """Itself, as `NamedChoice` has it."""
        return self


def _word_or_named(value: object) -> str:
    """The tag of a `tool_choice`."""
    return "<word>" if isinstance(value, str) else "<named>"


_Choice = Annotated[Literal["none", "auto", "required"], Tag("<word>")]
ToolChoice = Annotated[_Choice | Annotated[NamedChoice, Tag("<named>")], Discriminator(_word_or_named)]
FlatToolChoice = Annotated[_Choice | Annotated[FlatChoice, Tag("<named>")], Discriminator(_word_or_named)]


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


@dataclass(frozen=True)
class Said:
    """An answer; its finish_reason is "tool_calls" where the model ended it with calls."""

    content: str
    reasoning: str | None
    calls: Sequence[CallBody]
    finish_reason: str


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
    def of(
        cls,
        tools: Sequence[ToolSpec | FlatTool] | None,
        choice: str | NamedChoice | FlatChoice | None = None,
        parallel: bool | None = None,
    ) -> Offer:
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
            known = tools_from([_definition(f"tools[{i}]{spec.AT}", spec.function) for i, spec in enumerate(tools)])
        except RequestError as error:
            raise RequestError(str(error), "tools") from None
        names = tuple(tool.name for tool in known)
        if choice == "none":
            return cls()
        forced = names if choice == "required" else None
        chosen = choice if isinstance(choice, (NamedChoice, FlatChoice)) else None
        if chosen is not None:
            forced = (chosen.function.name,)
            if forced[0] not in names:
                named = forced[0][:80]
                raise RequestError(
                    f"'tool_choice' names {named!r}, which is none of 'tools'{nearest(named, names)}: name one of them",
                    f"tool_choice{chosen.AT}.name",
                )
        strict = frozenset(spec.function.name for spec in tools if spec.function.strict)
        return cls(known, strict, forced, parallel is not False and chosen is None)

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
        return Structure("grammar", "\n".join([start, *rules]), "tools")

    def structure_with(self, asked: Structure | None, fields: str) -> Structure | None:
        """The form of the answer where `fields` of the request may ask for one too. Raises RequestError where both do."""
        own = self.structure()
        if asked is not None and own is not None:
            raise RequestError(
                "'tools' with a forced call, a strict function or no parallel calls say what form the answer has, and so does"
                f" {fields}: send one",
                "tools",
            )
        return asked or own

    def reader(self, tokenizer: Vocabulary, stop: Sequence[str] = ()) -> Reader:
        """For one streamed answer; `stop` are its stop texts."""
        return Reader(tokenizer, frozenset(tool.name for tool in self.tools), stop)

    def read(self, tokenizer: Vocabulary, completion: Completion, stop: Sequence[str] = ()) -> Said:
        """An answer that is whole. Takes any answer."""
        names = {tool.name for tool in self.tools}
        answer = parts(tokenizer, spoken(completion))
        content, calls = answer.content, list[CallBody]()
        for name_ids, argument_ids in answer.calls:
            name, arguments = tokenizer.decode(name_ids), tokenizer.decode(argument_ids or ())
            if name in names and arguments.lstrip(BLANK).startswith("{"):
                id = id_of(completion.request_id, len(calls))
                calls.append({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
            else:
                content = [*content, *name_ids, *(argument_ids or ())]
        reasoning = None if answer.reasoning is None else tokenizer.decode(answer.reasoning)
        return Said(cut(tokenizer.decode(content), stop)[0], reasoning, calls, why_ended(completion, bool(calls)))


class Listener:
    """What one answer says, whole or in pieces, whether or not anything was offered to it.

    A call that nothing was offered for is text, which the engine leaves out of the content.
    """

    def __init__(self, offer: Offer, tokenizer: Vocabulary, stop: Sequence[str] = ()) -> None:
        self._offer, self._tokenizer, self._stop = offer, tokenizer, stop
        self._reader = offer.reader(tokenizer, stop) if offer.tools else None

    def said(self, completion: Completion) -> Said:
        """What an answer that is whole says."""
        if self._offer.tools:
            return self._offer.read(self._tokenizer, completion, self._stop)
        text = completion.text
        if ours(self._tokenizer).control[CALL] in completion.ids:
            whole = self._offer.read(self._tokenizer, completion, self._stop).content
            text = whole if whole.startswith(text) else text
        return Said(text, completion.reasoning, (), completion.finish_reason)

    def news(self, chunk: Chunk) -> News:
        """What is new with the next chunk of the answer."""
        if self._reader is not None:
            return self._reader.read(chunk)
        if chunk.completion is None:
            return News(chunk.content, chunk.reasoning)
        rest = self.said(chunk.completion).content[len(chunk.completion.text) :]
        return News(chunk.content + rest, chunk.reasoning, (), chunk.completion.finish_reason)


# How a form writes arguments: as models were taught to, with blanks only where they belong.
_WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def _definition(where: str, function: Function) -> dict[str, Any]:
    parameters = function.parameters
    if parameters is not None:
        if parameters.get("type", "object") != "object":
            raise RequestError(
                f"{where}.parameters is a schema of type {parameters['type']!r}: arguments are an object, use"
                " {'type': 'object', 'properties': {...}}"
            )
        level: list[Any] = [parameters]
        depth = 0
        while level := [x for x in level if isinstance(x, (dict, list))]:
            depth += 1
            if depth > MAX_DEPTH:
                raise RequestError(
                    f"{where}.parameters nests deeper than {MAX_DEPTH} levels, the most this server reads: flatten it"
                )
            level = [child for x in level for child in (x.values() if isinstance(x, dict) else x)]
    return {"name": function.name, "description": function.description, "parameters": parameters}
