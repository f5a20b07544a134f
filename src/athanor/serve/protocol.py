"""The OpenAI chat protocol: what a request may say, and the shapes of what goes back.

Every field falls in one of four classes, so that none is passed over in silence: it is used, it is known to change nothing
(`INERT`), it is known and not supported (`UNSUPPORTED`: only its default is accepted), or it is an error with the nearest name.
null stands for the default, as OpenAI's clients send it.
"""

from __future__ import annotations

import json
import reprlib
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import from_json

from athanor.core.errors import RequestError, nearest
from athanor.types import Completion, SamplingParams

MAX_CHOICES = 8
MAX_STOPS = 4
MAX_STOP_LENGTH = 512

_show = reprlib.Repr()
_show.maxstring = _show.maxother = _show.maxlong = 60


def _by_type(value: object) -> str:
    return "list" if isinstance(value, list) else "text"


class _Model(BaseModel):
    """Strict: no number from a string, no integer from a boolean, nothing unknown."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class TextPart(_Model):
    type: Literal["text"]
    text: str


class ChatMessage(_Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Annotated[str, Tag("text")] | Annotated[list[TextPart], Tag("list")], Discriminator(_by_type)]
    reasoning_content: str | None = None
    reasoning: str | None = None

    def plain(self) -> dict[str, str | None]:
        """What the renderer takes; parts are joined with nothing between, `developer` is the newer name of `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text, "reasoning": self.reasoning, "reasoning_content": self.reasoning_content}


class StreamOptions(_Model):
    include_usage: bool = False


_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class ChatRequest(_Model):
    """The body of POST /v1/chat/completions; see `parse_chat`."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=2**31)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    stop: Annotated[
        Annotated[_Stop, Tag("text")] | Annotated[list[_Stop], Field(max_length=MAX_STOPS), Tag("list")], Discriminator(_by_type)
    ] = Field(default_factory=list)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def limit_field(self) -> str:
        """The name under which the client limits new tokens."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def limit(self) -> int | None:
        """New tokens asked for at most."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def conversation(self) -> list[dict[str, str | None]]:
        """The messages for `tokenizer.chat.render`."""
        return [message.plain() for message in self.messages]

    def sampling(self, max_tokens: int) -> list[SamplingParams]:
        """The parameters of each of the n choices; choice i has seed + i. Without a seed every request draws one."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        seed = secrets.randbits(62) if self.seed is None else self.seed
        return [
            SamplingParams(self.temperature, self.top_p, self.top_k, max_tokens, stop, (seed + i) % 2**63) for i in range(self.n)
        ]


# Fields that never change an answer.
INERT = frozenset(
    {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"},
)
# Fields that would change it, and the values that stand for their default.
UNSUPPORTED: Mapping[str, Sequence[object]] = {
    "audio": (),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0, 0.0),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "reasoning_effort": (),
    "repetition_penalty": (1, 1.0),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# What a client sends back when it repeats an answer as history: all null or empty here.
_MESSAGE_UNSUPPORTED: Mapping[str, Sequence[object]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
_OPTIONS_UNSUPPORTED: Mapping[str, Sequence[object]] = {"continuous_usage_stats": (False,), "include_obfuscation": (False,)}


def parse_chat(body: bytes) -> ChatRequest:
    """Read the body of a chat request.

    Raises RequestError with the field at fault in `param`; nothing that stands in the body raises anything else.
    """
    data = _settle(_parse_object(body), "", ChatRequest, UNSUPPORTED, INERT)
    if isinstance(data.get("messages"), list):
        data["messages"] = [
            _settle(m, f"messages[{i}]", ChatMessage, _MESSAGE_UNSUPPORTED) if isinstance(m, dict) else m
            for i, m in enumerate(data["messages"])
        ]
    if isinstance(data.get("stream_options"), dict):
        data["stream_options"] = _settle(data["stream_options"], "stream_options", StreamOptions, _OPTIONS_UNSUPPORTED)
    try:
        chat = ChatRequest.model_validate(data)
    except ValidationError as error:
        raise _explain(error) from None
    _check_together(chat)
    return chat


def _parse_object(body: bytes) -> dict[str, Any]:
    if not body.strip():
        raise RequestError("the body is empty: send a JSON object with 'model' and 'messages'")
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise RequestError(f"the body must be a JSON object, not {_show.repr(data)}: send one with 'model' and 'messages'")
    return data


def _settle(
    data: dict[str, Any],
    path: str,
    model: type[BaseModel],
    unsupported: Mapping[str, Sequence[object]],
    inert: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """`data` without what changes nothing: nulls, inert fields and defaults of unsupported ones."""
    kept = {}
    for key, value in data.items():
        param = f"{path}.{key[:60]}" if path else key[:60]
        if key in model.model_fields:
            if value is not None:
                kept[key] = value
        elif key in unsupported:
            # The type too: false is not 0.
            if value is not None and not any(type(value) is type(d) and value == d for d in unsupported[key]):
                raise RequestError(f"{param!r} is not supported yet (got {_show.repr(value)}): leave it out", param)
        elif key not in inert:
            known = [*model.model_fields, *unsupported, *inert]
            raise RequestError(f"unknown field {param!r}{nearest(key[:60], known)}: correct it or leave it out", param)
    return kept


def _explain(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=False)[0]
    param = ""
    for part in first["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part not in ("text", "list") or param.endswith("]"):  # tags of a union, not fields
            param += f".{part}" if param else part
    if first["type"] == "missing":
        return RequestError(f"{param!r} is missing: it is required", param)
    if first["type"] == "extra_forbidden":
        return RequestError(f"unknown field {param[:160]!r}: correct it or leave it out", param[:160])
    return RequestError(f"{param!r} is {_show.repr(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}", param)


def _check_together(chat: ChatRequest) -> None:
    """Rules over more than one field."""
    if chat.stream_options is not None and not chat.stream:
        raise RequestError("'stream_options' is allowed only with \"stream\": true: add that or leave it out", "stream_options")
    if chat.max_tokens is not None and chat.max_completion_tokens not in (None, chat.max_tokens):
        raise RequestError(
            f"'max_tokens' ({_show.repr(chat.max_tokens)}) and 'max_completion_tokens' ({_show.repr(chat.max_completion_tokens)})"
            " are two names of one limit: send one",
            "max_tokens",
        )


def error_body(message: str, type_: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def model_body(name: str, created: int, max_len: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "athanor", "max_model_len": max_len}


class Answer:
    """The bodies of one answer; they share id, time and model."""

    def __init__(self, answer_id: str, model: str) -> None:
        self._head = {"id": answer_id, "created": int(time.time()), "model": model}

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The body of an answer that is not streamed; `completions` are its choices in order."""
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": c.text, **_reasoning(c.reasoning), "refusal": None},
                "logprobs": None,
                "finish_reason": c.finish_reason,
            }
            for i, c in enumerate(completions)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage(completions)}

    def opening(self, index: int) -> str:
        """The first event of a choice: its role."""
        return self._event(index, {"role": "assistant", "content": ""}, None)

    def delta(self, index: int, content: str, reasoning: str) -> str:
        """An event with new text."""
        return self._event(index, {**({"content": content} if content else {}), **_reasoning(reasoning or None)}, None)

    def closing(self, index: int, completion: Completion) -> str:
        """The last event of a choice: its finish_reason."""
        return self._event(index, {}, completion.finish_reason)

    def usage(self, completions: Sequence[Completion]) -> str:
        """The event after all choices; it has none itself."""
        return json.dumps({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(completions)})

    def _event(self, index: int, delta: dict[str, str], finish_reason: str | None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return json.dumps({**self._head, "object": "chat.completion.chunk", "choices": [choice]})


def _reasoning(text: str | None) -> dict[str, str]:
    """Under both names that clients look for."""
    return {} if text is None else {"reasoning_content": text, "reasoning": text}


def usage(completions: Sequence[Completion]) -> dict[str, int]:
    """Tokens of one request: its prompt counts once, whatever the number of choices."""
    prompt = len(completions[0].prompt_ids)
    new = sum(len(c.ids) for c in completions)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
