"""The OpenAI chat protocol: what a request may say, and the shapes of what goes back."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag
from typing_extensions import NotRequired, TypedDict

from athanor.core.errors import RequestError
from athanor.serve.body import Fields, Strict, read, show
from athanor.serve.events import Event, data
from athanor.serve.sampling import MAX_LOGPROBS, Sampling, text_or_list
from athanor.serve.shapes import ChatLogprobs, ErrorBody, Json, PromptLogprobs, Teller, Usage, usage, usage_of
from athanor.serve.tools import MAX_CALLS, MAX_TOOLS, AssistantCall, CallBody, Listener, Offer, ToolChoice, ToolSpec
from athanor.tokenizer.vocabulary import Vocabulary
from athanor.types import Completion, Structure

if TYPE_CHECKING:
    from athanor.infer.engine import Chunk


class TextPart(Strict):
    UNSUPPORTED: ClassVar[Fields] = {"file": (), "image_url": (), "input_audio": (), "video_url": ()}

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    # What a client sends back when it repeats an answer as history: all null or empty here.
    UNSUPPORTED: ClassVar[Fields] = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "name": (),
        "refusal": (),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Tag("<list>")], Discriminator(text_or_list)] | None
    ) = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[AssistantCall] | None = Field(None, max_length=MAX_CALLS)
    tool_call_id: str | None = None

    def plain(self) -> dict[str, Any]:
        """What the renderer takes; parts are joined with nothing between, `developer` is the newer name of `system`."""
        given = [] if self.content is None else self.content
        text = given if isinstance(given, str) else "".join(part.text for part in given)
        role = "system" if self.role == "developer" else self.role
        told = {"role": role, "content": text, "reasoning": self.reasoning, "reasoning_content": self.reasoning_content}
        calls = [call.plain() for call in self.tool_calls or ()]
        named = {"tool_calls": calls, "tool_call_id": self.tool_call_id}
        return {**told, **{field: value for field, value in named.items() if value}}


class ChatRequest(Sampling):
    """The body of POST /v1/chat/completions."""

    INERT = frozenset(
        {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"}
    )
    UNSUPPORTED: ClassVar[Fields] = {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    reasoning_effort: str | None = Field(None, json_schema_extra={"enum": ["none", None]})
    tools: list[ToolSpec] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def limit_field(self) -> str:
        """The name under which the client limits new tokens."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def limit(self) -> int | None:
        """New tokens asked for at most."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def told(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def generation_prompt(self) -> bool:
        """Whether the prompt ends with the beginning of an assistant's turn."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt

    @property
    def silent(self) -> bool:
        """Whether the answer may have no reasoning."""
        return self.reasoning_effort == "none"

    @property
    def offer(self) -> Offer:
        """The tools that the answer may call. Raises RequestError where the fields do not fit together."""
        return Offer.of(self.tools, self.tool_choice, self.parallel_tool_calls)

    def structure(self) -> Structure | None:
        return self.offer.structure_with(super().structure(), "'response_format' or 'structured_outputs'")

    def conversation(self) -> list[Mapping[str, Any]]:
        """The messages for `tokenizer.chat.render`, with the tools."""
        return self.offer.told([message.plain() for message in self.messages])

    def check(self) -> None:
        super().check()
        for i, message in enumerate(self.messages):
            if message.content is None and not message.tool_calls:
                raise RequestError(
                    f"'messages[{i}].content' is missing: it is required beside no tool calls", f"messages[{i}].content"
                )
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise RequestError(
                f"'max_tokens' ({show(self.max_tokens)}) and 'max_completion_tokens' ({show(self.max_completion_tokens)})"
                " are two names of one limit: send one",
                "max_tokens",
            )
        if self.top_logprobs and not self.logprobs:
            raise RequestError("'top_logprobs' are told only with \"logprobs\": true: add that or leave them out", "top_logprobs")
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise RequestError(
                    "'continue_final_message' goes on with the last message and 'add_generation_prompt' begins a new one:"
                    " leave one out",
                    "continue_final_message",
                )
            if self.messages[-1].role != "assistant":
                raise RequestError(
                    f"'continue_final_message' goes on with an assistant's message, and the last one is of role"
                    f" {self.messages[-1].role!r}: end with one of role 'assistant'",
                    "continue_final_message",
                )
        if self.reasoning_effort not in (None, "none"):
            raise RequestError(
                f"'reasoning_effort' is {show(self.reasoning_effort)}, and these models know no degrees of it:"
                ' send "none" for answers without reasoning, or leave it out',
                "reasoning_effort",
            )


def parse_chat(body: bytes) -> ChatRequest:
    """Read the body of a chat request. Raises RequestError, as `body.read` does."""
    return read(body, ChatRequest)


class AnswerMessage(TypedDict):
    role: str
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[CallBody]]


class Choice(TypedDict):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]


class ChatAnswer(TypedDict):
    """The body of an answer that is not streamed."""

    id: str
    created: int
    model: str
    object: str
    choices: list[Choice]
    usage: Usage
    prompt_logprobs: NotRequired[PromptLogprobs]
    prompt_token_ids: NotRequired[list[int]]


class Answer:
    """The bodies of one answer; they share id, time and model.

    truncated  tokens that were left out of the prompt; None where it may not be cut
    """

    def __init__(self, answer_id: str, chat: ChatRequest, tokenizer: Vocabulary, truncated: int | None = None) -> None:
        self._id, self._created, self._chat, self._truncated = answer_id, int(time.time()), chat, truncated
        self._teller, offer = Teller(tokenizer), chat.offer
        self._listeners = [Listener(offer, tokenizer, chat.stops) for _ in range(chat.n)]
        self._new = [0] * chat.n  # tokens of each choice so far

    def whole(self, completions: Sequence[Completion]) -> ChatAnswer:
        """The body of an answer that is not streamed; `completions` are its choices in order."""
        answer: ChatAnswer = {
            "id": self._id,
            "created": self._created,
            "model": self._chat.model,
            "object": "chat.completion",
            "choices": [self._choice(i, c) for i, c in enumerate(completions)],
            "usage": usage_of(completions, len(completions), self._truncated),
        }
        first = completions[0]
        if self._chat.prompt_logprobs is not None and first.prompt_logprobs is not None:
            answer["prompt_logprobs"] = self._teller.prompt(first.prompt_logprobs)
        if self._chat.return_token_ids:
            answer["prompt_token_ids"] = list(first.prompt_ids)
        return answer

    def _choice(self, index: int, c: Completion) -> Choice:
        said = self._listeners[index].said(c)
        message: AnswerMessage = {"role": "assistant", "content": said.content, "refusal": None}
        if said.calls:
            message["tool_calls"] = list(said.calls)
            message["content"] = said.content or None
        if said.reasoning is not None:  # under both names that clients look for
            message["reasoning_content"] = message["reasoning"] = said.reasoning
        choice: Choice = {
            "index": index,
            "message": message,
            "logprobs": self._teller.chat(c.top_logprobs) if self._chat.logprobs and c.top_logprobs is not None else None,
            "finish_reason": said.finish_reason,
            "stop_reason": c.stop_reason,
        }
        if self._chat.return_token_ids:
            choice["token_ids"] = list(c.ids)
        return choice

    def opening(self, prompts: Sequence[Sequence[int]]) -> Iterator[Event]:
        """The first event of each choice: its role."""
        for i, prompt in enumerate(prompts):
            top: Json = {"prompt_token_ids": list(prompt)} if self._chat.return_token_ids else {}
            yield self._event(i, {"role": "assistant", "content": ""}, len(prompt), top=top)

    def chunk(self, index: int, chunk: Chunk, prompt: int) -> Iterator[Event]:
        """The events of what is new of a choice; the last of them has its finish_reason."""
        self._new[index] += len(chunk.ids)
        news = self._listeners[index].news(chunk)
        delta: dict[str, Any] = {"content": news.content} if news.content else {}
        if news.reasoning:
            delta |= {"reasoning_content": news.reasoning, "reasoning": news.reasoning}
        told = self._teller.chat(chunk.logprobs) if self._chat.logprobs and chunk.logprobs else None
        ids = {"token_ids": list(chunk.ids)} if self._chat.return_token_ids and chunk.ids else {}
        if delta or told or ids:
            yield self._event(index, delta, prompt, {"logprobs": told, **ids})
        for call in news.calls:
            yield self._event(index, {"tool_calls": [call]}, prompt)
        if chunk.completion is not None:
            self._new[index] = len(chunk.completion.ids)
            end = {"finish_reason": news.finish_reason, "stop_reason": chunk.completion.stop_reason}
            yield self._event(index, {}, prompt, end)

    def ending(self, completions: Sequence[Completion]) -> Iterator[Event]:
        """The event of the usage, which has no choices, and the end of the stream."""
        if self._chat.include_usage:
            whole = usage_of(completions, len(completions), self._truncated)
            yield data(json.dumps({**self._head(), "choices": [], "usage": whole}))
        yield data("[DONE]")

    def failed(self, body: ErrorBody) -> Iterator[Event]:
        """What ends a stream instead: no end follows it."""
        yield data(json.dumps(body))

    def _head(self) -> Json:
        return {"id": self._id, "created": self._created, "model": self._chat.model, "object": "chat.completion.chunk"}

    def _event(
        self, index: int, delta: Mapping[str, Any], prompt: int, more: Json | None = None, top: Json | None = None
    ) -> Event:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **(more or {})}
        body = {**self._head(), "choices": [choice], **(top or {})}
        if self._chat.usage_in_every_event:
            body["usage"] = usage(prompt, self._new[index], truncated=self._truncated)
        return data(json.dumps(body))
