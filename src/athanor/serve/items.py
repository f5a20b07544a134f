"""The items of a response's `input`: messages, and what a client sends back of an answer, as messages of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from athanor.core.errors import RequestError
from athanor.serve.body import Fields, Strict, show
from athanor.serve.sampling import text_or_list
from athanor.serve.tools import CalledFunction


def only(field: str, known: Sequence[str], remedy: str) -> BeforeValidator:
    """Raises RequestError for an object of another type, alone or in a list, before a field of it is called unknown."""

    def check(value: object) -> object:
        for i, one in enumerate(value if isinstance(value, list) else [value]):
            kind = one.get("type") if isinstance(one, dict) else None
            if isinstance(kind, str) and kind not in known:
                where = f"{field}[{i}].type" if isinstance(value, list) else f"{field}.type"
                names = " or ".join(f"'{name}'" for name in known)
                raise RequestError(f"'{where}' is {show(kind)}, and this server takes {names} alone: {remedy}", where)
        return value

    return BeforeValidator(check)


class InputText(Strict):
    UNSUPPORTED: ClassVar[Fields] = {"annotations": ([],), "logprobs": ([],)}  # of an answer that is sent back

    type: Literal["input_text", "output_text"]
    text: str


Content = Annotated[Annotated[str, Tag("<text>")] | Annotated[list[InputText], Tag("<list>")], Discriminator(text_or_list)]


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class InputMessage(Strict):
    INERT = frozenset({"id", "status"})  # of an answer that is sent back
    UNSUPPORTED: ClassVar[Fields] = {"phase": ()}

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    def plain(self) -> dict[str, Any]:
        """What the renderer takes: a message, or a part of one of the assistant's."""
        return {"role": "system" if self.role == "developer" else self.role, "content": _text(self.content)}


class InputCall(CalledFunction):
    """A call of an answer that is sent back."""

    INERT = frozenset({"id", "status"})
    # "async_" is how the client's own `model_dump` writes it.
    UNSUPPORTED: ClassVar[Fields] = {"async": (False,), "async_": (False,), "caller": (), "namespace": ()}

    type: Literal["function_call"]
    call_id: str = Field(min_length=1)

    def plain(self) -> dict[str, Any]:
        """As of a message."""
        call = {"id": self.call_id, "function": {"name": self.name, "arguments": self.arguments}}
        return {"role": "assistant", "tool_calls": [call]}


class InputResult(Strict):
    """What a function answered."""

    INERT = frozenset({"id", "status"})
    UNSUPPORTED: ClassVar[Fields] = {"caller": (), "name": (), "namespace": ()}

    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1)
    output: Content

    def plain(self) -> dict[str, Any]:
        """As of a message."""
        return {"role": "tool", "content": _text(self.output), "tool_call_id": self.call_id}


class ReasoningText(Strict):
    type: Literal["reasoning_text"]
    text: str


class InputReasoning(Strict):
    """The reasoning of an answer that is sent back. Summaries, and what only OpenAI can read, are left out."""

    INERT = frozenset({"id", "status", "summary", "encrypted_content"})

    type: Literal["reasoning"]
    content: list[ReasoningText] = Field(default_factory=list)

    def plain(self) -> dict[str, Any] | None:
        """As of a message; None where there is no text."""
        return {"role": "assistant", "reasoning": "".join(part.text for part in self.content)} if self.content else None


ITEMS = ("message", "function_call", "function_call_output", "reasoning")


def _kind(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if kind in ITEMS else "<message>"


Item = Annotated[
    Annotated[InputMessage, Tag("<message>")]
    | Annotated[InputCall, Tag("<function_call>")]
    | Annotated[InputResult, Tag("<function_call_output>")]
    | Annotated[InputReasoning, Tag("<reasoning>")],
    Discriminator(_kind),
]


def messages_of(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Items as messages: one turn of the assistant is its reasoning, its text and its calls, as it came out item by item.

    A second text, or reasoning after a text, begins another turn, unless there are calls: their results have to follow first.
    """
    messages: list[dict[str, Any]] = []
    for new in filter(None, (item.plain() for item in items)):
        last = messages[-1] if messages else {}
        goes_on = "tool_calls" in new or "tool_calls" in last or "content" not in last
        if new["role"] == "assistant" == last.get("role") and goes_on:
            last |= {key: last[key] + new[key] if key in last else new[key] for key in new if key != "role"}
        else:
            messages.append(new)
    return [{"content": "", **message} for message in messages]


def check_results(items: Sequence[Item]) -> None:
    """Raises RequestError unless the results of all calls of a turn, and no others, follow on it."""
    waiting: dict[str, int] = {}  # calls without a result, and where they stand
    n_calls = 0  # of the turn
    for i, item in enumerate(items):
        if isinstance(item, InputResult):
            if item.call_id not in waiting:
                where = f"input[{i}].call_id"
                raise RequestError(
                    f"'{where}' is {show(item.call_id)}, and no function_call before it that has no output yet has this call_id:"
                    " send one output for each call, after the calls of its turn",
                    where,
                )
            del waiting[item.call_id]
            continue
        user = isinstance(item, InputMessage) and item.role != "assistant"
        if len(waiting) < n_calls or user:
            _refuse_waiting(items, waiting)
            n_calls = 0
        if isinstance(item, InputCall):
            if item.call_id in waiting:
                where = f"input[{i}].call_id"
                raise RequestError(
                    f"'{where}' is {show(item.call_id)}, as is that of 'input[{waiting[item.call_id]}]': give each call its own",
                    where,
                )
            waiting[item.call_id] = i
            n_calls += 1
    _refuse_waiting(items, waiting)


def _refuse_waiting(items: Sequence[Item], waiting: Mapping[str, int]) -> None:
    for call_id, i in waiting.items():
        raise RequestError(
            f"'input[{i}]' is a call that has no output: add an item of type 'function_call_output' with the call_id"
            f" {show(call_id)} after the calls of its turn",
            f"input[{i}]",
        )
