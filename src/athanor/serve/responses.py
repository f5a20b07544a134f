"""OpenAI's responses, in their basic form: text in, text (and its reasoning) out; nothing is kept between two requests."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag
from typing_extensions import NotRequired, TypedDict

from athanor.serve.body import Fields, Strict
from athanor.serve.events import Event, data
from athanor.serve.sampling import text_or_list
from athanor.serve.shapes import ErrorBody, Json
from athanor.types import Completion, SamplingParams

if TYPE_CHECKING:
    from athanor.infer.engine import Chunk


class InputText(Strict):
    UNSUPPORTED: ClassVar[Fields] = {"annotations": ([],), "logprobs": ([],)}  # of an answer that is sent back

    type: Literal["input_text", "output_text"]
    text: str


class InputMessage(Strict):
    INERT = frozenset({"id", "status"})  # of an answer that is sent back
    UNSUPPORTED: ClassVar[Fields] = {"phase": ()}

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Annotated[str, Tag("<text>")] | Annotated[list[InputText], Tag("<list>")], Discriminator(text_or_list)]

    def plain(self) -> dict[str, str | None]:
        """What the renderer takes."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


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
        "parallel_tool_calls": (True,),
        "previous_response_id": (),
        "prompt": (),
        "reasoning": ({},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "stream_options": ({},),
        "text": ({}, {"format": {"type": "text"}}),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    model: str
    input: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[InputMessage], Field(min_length=1), Tag("<list>")],
        Discriminator(text_or_list),
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    stream: bool = False

    def conversation(self) -> list[dict[str, str | None]]:
        """The messages for `tokenizer.chat.render`; the instructions come first."""
        first: list[dict[str, str | None]] = []
        if self.instructions is not None:
            first.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*first, {"role": "user", "content": self.input}]
        return first + [message.plain() for message in self.input]

    def sampling(self, max_tokens: int, seed: int) -> SamplingParams:
        """The parameters of the answer."""
        return SamplingParams(self.temperature, self.top_p, max_tokens=max_tokens, seed=seed)


class OutputPart(TypedDict):
    type: str
    text: str
    annotations: NotRequired[list[Json]]
    logprobs: NotRequired[list[Json]]


class OutputItem(TypedDict):
    """A message, or the reasoning before it."""

    id: str
    type: str
    status: str
    content: list[OutputPart]
    role: NotRequired[str]
    summary: NotRequired[list[Json]]


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
    output: list[OutputItem]
    error: None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    metadata: dict[str, str]
    parallel_tool_calls: bool
    tool_choice: str
    tools: list[Json]
    store: bool
    usage: ResponseUsage | None


class ResponseWriter:
    """The bodies of one response.

    think  the ids between which reasoning stands, or None
    """

    def __init__(self, answer_id: str, asked: ResponseRequest, think: tuple[int, int] | None) -> None:
        self._id, self._created, self._asked, self._think = answer_id, int(time.time()), asked, think
        self._count = 0  # events so far
        self._items: list[OutputItem] = []  # of a stream, in the order in which they began
        self._texts: list[list[str]] = []  # theirs, in pieces: put together once, at the end

    def whole(self, completions: Sequence[Completion]) -> ResponseBody:
        """The body of a response that is not streamed."""
        (c,) = completions
        items = [] if c.reasoning is None else [self._item("reasoning", c.reasoning, "completed")]
        return self._body(c, [*items, self._item("message", c.text, "completed")])

    def opening(self, prompts: Sequence[Sequence[int]]) -> Iterator[Event]:
        """Two events with the empty response."""
        yield self._event("response.created", response=self._body(None, []))
        yield self._event("response.in_progress", response=self._body(None, []))

    def chunk(self, index: int, chunk: Chunk, prompt: int) -> Iterator[Event]:
        """The events of what is new."""
        if chunk.reasoning:
            yield from self._delta("reasoning", chunk.reasoning)
        if chunk.content or (chunk.completion is not None and all(item["type"] != "message" for item in self._items)):
            yield from self._delta("message", chunk.content)

    def ending(self, completions: Sequence[Completion]) -> Iterator[Event]:
        """The ends of all items, and the whole response."""
        (c,) = completions
        for place, item in enumerate(self._items):
            item["status"] = "completed"
            at = {"item_id": item["id"], "output_index": place, "content_index": 0}
            (part,) = item["content"]
            part["text"] = "".join(self._texts[place])
            text = {"text": part["text"]}
            if item["type"] == "message":
                yield self._event("response.output_text.done", **at, **text, logprobs=[])
            else:
                yield self._event("response.reasoning_text.done", **at, **text)
            yield self._event("response.content_part.done", **at, part=part)
            yield self._event("response.output_item.done", output_index=place, item=item)
        body = self._body(c, self._items)
        yield self._event(f"response.{body['status']}", response=body)

    def failed(self, body: ErrorBody) -> Iterator[Event]:
        """What ends a stream instead."""
        error = body["error"]
        yield self._event("error", code=error["code"], message=error["message"], param=error["param"])

    def _delta(self, kind: str, text: str) -> Iterator[Event]:
        place = next((i for i, item in enumerate(self._items) if item["type"] == kind), None)
        if place is None:
            place, item = len(self._items), self._item(kind, "", "in_progress")
            self._items.append(item)
            self._texts.append([])
            yield self._event("response.output_item.added", output_index=place, item={**item, "content": []})
            at = {"item_id": item["id"], "output_index": place, "content_index": 0}
            yield self._event("response.content_part.added", **at, part=item["content"][0])
        item = self._items[place]
        if text:
            self._texts[place].append(text)
            at = {"item_id": item["id"], "output_index": place, "content_index": 0}
            if kind == "message":
                yield self._event("response.output_text.delta", **at, delta=text, logprobs=[])
            else:
                yield self._event("response.reasoning_text.delta", **at, delta=text)

    def _item(self, kind: str, text: str, status: str) -> OutputItem:
        key = self._id.partition("_")[2]
        if kind == "reasoning":
            part: OutputPart = {"type": "reasoning_text", "text": text}
            return {"id": f"rs_{key}", "type": kind, "status": status, "summary": [], "content": [part]}
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {"id": f"msg_{key}", "type": kind, "status": status, "role": "assistant", "content": [part]}

    def _body(self, c: Completion | None, output: list[OutputItem]) -> ResponseBody:
        cut = c is not None and c.finish_reason == "length"
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
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
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

    def _event(self, name: str, **fields: object) -> Event:
        self._count += 1
        return data(json.dumps({"type": name, "sequence_number": self._count - 1, **fields}), name)
