"""OpenAI's responses: text and results of functions in, text, reasoning and calls out; nothing is kept between two requests."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag
from typing_extensions import NotRequired, TypedDict

from athanor.core.errors import RequestError
from athanor.serve.body import Fields, Strict
from athanor.serve.events import Event, data
from athanor.serve.items import ITEMS, Item, check_results, messages_of, only
from athanor.serve.reader import CallDelta
from athanor.serve.sampling import AnyFormat, JsonSchema, format_tag, schema_form, text_or_list
from athanor.serve.shapes import ErrorBody, Json
from athanor.serve.tools import MAX_TOOLS, FlatChoice, FlatTool, FlatToolChoice, Listener, Offer
from athanor.tokenizer.vocabulary import Vocabulary
from athanor.types import Completion, SamplingParams, Structure

if TYPE_CHECKING:
    from athanor.infer.engine import Chunk


# --- requests


class FlatSchema(JsonSchema):
    type: Literal["json_schema"]


FlatFormat = Annotated[
    Annotated[AnyFormat, Tag("<any>")] | Annotated[FlatSchema, Tag("<schema>")],
    Discriminator(format_tag),
    only("text.format", ("text", "json_object", "json_schema"), "use one of them"),
]


class TextOptions(Strict):
    UNSUPPORTED: ClassVar[Fields] = {"verbosity": ("medium",)}

    format: FlatFormat | None = None


Functions = Annotated[list[FlatTool], only("tools", ("function",), "offer a function that does the same, or leave it out")]
Choice = Annotated[FlatToolChoice, only("tool_choice", ("function",), "name a function, or send 'none', 'auto' or 'required'")]


class ResponseRequest(Strict):
    """The body of POST /v1/responses."""

    INERT = frozenset(
        {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"}
    )
    UNSUPPORTED: ClassVar[Fields] = {
        "access_programs": (),
        "background": (False,),
        "background_options": (),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "include": ([],),
        "max_tool_calls": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "reasoning": ({},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "stream_options": ({},),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    model: str
    input: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[Item], Field(min_length=1), Tag("<list>")],
        Discriminator(text_or_list),
        only("input", ITEMS, "send what it says as one of these, or leave it out"),
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    tools: Functions = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    stream: bool = False

    @property
    def offer(self) -> Offer:
        """The functions that the answer may call. Raises RequestError where the fields do not fit together."""
        return Offer.of(self.tools, self.tool_choice, self.parallel_tool_calls)

    def structure(self) -> Structure | None:
        """The form that the answer must have. Raises RequestError for more than one."""
        asked = None if self.text is None else self.text.format
        form = None
        if isinstance(asked, FlatSchema):
            form = replace(schema_form(asked.schema_, "text.format.schema"), param="text.format")
        elif asked is not None and asked.type == "json_object":
            form = Structure("json", "", "text.format")
        return self.offer.structure_with(form, "'text.format'")

    def check(self) -> None:
        self.structure()
        if isinstance(self.input, list):
            check_results(self.input)
            if not self.conversation():
                raise RequestError(
                    "'input' has only reasoning without its text, so there is nothing to answer: add a message", "input"
                )

    def conversation(self) -> list[Mapping[str, Any]]:
        """The messages for `tokenizer.chat.render`, with the functions; the instructions come first."""
        messages = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
        else:
            messages += messages_of(self.input)
        return self.offer.told(messages)

    def sampling(self, max_tokens: int, seed: int) -> SamplingParams:
        """The parameters of the answer."""
        return SamplingParams(self.temperature, self.top_p, max_tokens=max_tokens, seed=seed, structure=self.structure())


# --- answers


class OutputPart(TypedDict):
    type: str
    text: str
    annotations: NotRequired[list[Json]]
    logprobs: NotRequired[list[Json]]


class OutputItem(TypedDict):
    """A message, or the reasoning before it."""

    id: str
    type: Literal["message", "reasoning"]
    status: str
    content: list[OutputPart]
    role: NotRequired[str]
    summary: NotRequired[list[Json]]


class OutputCall(TypedDict):
    """A call of a function; the client sends its result under its call_id."""

    id: str
    type: Literal["function_call"]
    status: str
    call_id: str
    name: str
    arguments: str


class OutputChoice(TypedDict):
    type: str
    name: str


class InputDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Incomplete(TypedDict):
    reason: str


class ResponseBody(TypedDict):
    id: str
    object: str
    created_at: int
    status: str
    model: str
    output: list[OutputItem | OutputCall]
    error: None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    metadata: dict[str, str]
    parallel_tool_calls: bool
    tool_choice: str | OutputChoice
    tools: list[Json]
    store: bool
    usage: ResponseUsage | None


class ResponseWriter:
    """The bodies of one response.

    think  the ids between which reasoning stands, or None
    """

    def __init__(self, answer_id: str, asked: ResponseRequest, tokenizer: Vocabulary, think: tuple[int, int] | None) -> None:
        self._id, self._created, self._asked, self._think = answer_id, int(time.time()), asked, think
        self._listener = Listener(asked.offer, tokenizer)
        self._count = 0  # events so far
        self._items: list[OutputItem | OutputCall] = []  # of a stream, in the order in which they began
        self._texts: list[list[str]] = []  # theirs, in pieces: put together once, at the end

    def whole(self, completions: Sequence[Completion]) -> ResponseBody:
        """The body of a response that is not streamed."""
        (c,) = completions
        said = self._listener.said(c)
        items: list[OutputItem | OutputCall] = []
        if said.reasoning is not None:
            items.append(self._item("reasoning", said.reasoning))
        if said.content or not said.calls:
            items.append(self._item("message", said.content))
        items += [_call(call["id"], **call["function"]) for call in said.calls]
        _settle(c, items)
        return self._body(c, items)

    def opening(self, prompts: Sequence[Sequence[int]]) -> Iterator[Event]:
        """Two events with the empty response."""
        yield self._event("response.created", response=self._body(None, []))
        yield self._event("response.in_progress", response=self._body(None, []))

    def chunk(self, index: int, chunk: Chunk, prompt: int) -> Iterator[Event]:
        """The events of what is new."""
        news = self._listener.news(chunk)
        if news.reasoning:
            yield from self._delta("reasoning", news.reasoning)
        if news.content:
            yield from self._delta("message", news.content)
        for call in news.calls:
            yield from self._called(call)
        if chunk.completion is not None and all(item["type"] == "reasoning" for item in self._items):
            yield from self._delta("message", "")

    def ending(self, completions: Sequence[Completion]) -> Iterator[Event]:
        """The ends of all items, and the whole response."""
        (c,) = completions
        _settle(c, self._items)
        for place, item in enumerate(self._items):
            text = "".join(self._texts[place])
            at = {"item_id": item["id"], "output_index": place}
            if item["type"] == "function_call":
                item["arguments"] = text
                yield self._event("response.function_call_arguments.done", **at, name=item["name"], arguments=text)
            else:
                (part,) = item["content"]
                part["text"] = text
                if item["type"] == "message":
                    yield self._event("response.output_text.done", **at, content_index=0, text=text, logprobs=[])
                else:
                    yield self._event("response.reasoning_text.done", **at, content_index=0, text=text)
                yield self._event("response.content_part.done", **at, content_index=0, part=part)
            yield self._event("response.output_item.done", output_index=place, item=item)
        body = self._body(c, self._items)
        yield self._event(f"response.{body['status']}", response=body)

    def failed(self, body: ErrorBody) -> Iterator[Event]:
        """What ends a stream instead."""
        error = body["error"]
        yield self._event("error", code=error["code"], message=error["message"], param=error["param"])

    def _begin(self, item: OutputItem | OutputCall) -> int:
        self._items.append(item)
        self._texts.append([])
        return len(self._items) - 1

    def _called(self, call: CallDelta) -> Iterator[Event]:
        if "id" in call:  # it begins; calls come one after another
            item = _call(call["id"], call["function"]["name"], "")
            yield self._event("response.output_item.added", output_index=self._begin(item), item=item)
        place = max(i for i, item in enumerate(self._items) if item["type"] == "function_call")
        if arguments := call["function"]["arguments"]:
            self._texts[place].append(arguments)
            at = {"item_id": self._items[place]["id"], "output_index": place}
            yield self._event("response.function_call_arguments.delta", **at, delta=arguments)

    def _delta(self, kind: Literal["message", "reasoning"], text: str) -> Iterator[Event]:
        place = next((i for i, item in enumerate(self._items) if item["type"] == kind), None)
        if place is None:
            item = self._item(kind, "")
            place = self._begin(item)
            yield self._event("response.output_item.added", output_index=place, item={**item, "content": []})
            at = {"item_id": item["id"], "output_index": place, "content_index": 0}
            yield self._event("response.content_part.added", **at, part=item["content"][0])
        if text:
            self._texts[place].append(text)
            at = {"item_id": self._items[place]["id"], "output_index": place, "content_index": 0}
            if kind == "message":
                yield self._event("response.output_text.delta", **at, delta=text, logprobs=[])
            else:
                yield self._event("response.reasoning_text.delta", **at, delta=text)

    def _item(self, kind: Literal["message", "reasoning"], text: str) -> OutputItem:
        key = self._id.partition("_")[2]
        if kind == "reasoning":
            part: OutputPart = {"type": "reasoning_text", "text": text}
            return {"id": f"rs_{key}", "type": kind, "status": "in_progress", "summary": [], "content": [part]}
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {"id": f"msg_{key}", "type": kind, "status": "in_progress", "role": "assistant", "content": [part]}

    def _body(self, c: Completion | None, output: list[OutputItem | OutputCall]) -> ResponseBody:
        cut = c is not None and c.finish_reason == "length"
        choice = self._asked.tool_choice
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": "in_progress" if c is None else "incomplete" if cut else "completed",
            "model": self._asked.model,
            "output": output,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": self._asked.instructions,
            "max_output_tokens": self._asked.max_output_tokens,
            "temperature": self._asked.temperature,
            "top_p": self._asked.top_p,
            "metadata": {},
            "parallel_tool_calls": self._asked.parallel_tool_calls is not False,
            "tool_choice": {"type": choice.type, "name": choice.name} if isinstance(choice, FlatChoice) else choice or "auto",
            "tools": [tool.model_dump() for tool in self._asked.tools],
            "store": False,
            "usage": None if c is None else self._usage(c),
        }

    def _usage(self, c: Completion) -> ResponseUsage:
        prompt, new, reasoning, thinking = len(c.prompt_ids), len(c.ids), 0, False
        for id in c.ids if self._think else ():
            assert self._think is not None
            thinking = id == self._think[0] or (thinking and id != self._think[1])
            reasoning += thinking and id != self._think[0]
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": c.cached, "cache_write_tokens": 0},
            "output_tokens": new,
            "output_tokens_details": {"reasoning_tokens": reasoning},
            "total_tokens": prompt + new,
        }

    def _event(self, kind: str, /, **fields: object) -> Event:
        self._count += 1
        return data(json.dumps({"type": kind, "sequence_number": self._count - 1, **fields}), kind)


def _call(call_id: str, name: str, arguments: str) -> OutputCall:
    key = call_id.partition("_")[2]
    return {
        "id": f"fc_{key}",
        "type": "function_call",
        "status": "in_progress",
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
    }


def _settle(c: Completion, items: Sequence[OutputItem | OutputCall]) -> None:
    """All items have ended; a call, with which the answer was cut short, is not whole."""
    for item in items:
        item["status"] = "completed"
    if c.finish_reason == "length" and items[-1]["type"] == "function_call":
        items[-1]["status"] = "incomplete"
