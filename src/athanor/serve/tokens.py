"""Texts to tokens and back, as vLLM's servers do it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from athanor.core.errors import RequestError
from athanor.serve.body import Strict
from athanor.serve.protocol import ChatMessage
from athanor.serve.sampling import TokenId


class TokenizeRequest(Strict):
    """The body of POST /tokenize: a text or a conversation. Without `model`, the first that is served."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool = False

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("a request has either 'prompt' or 'messages': send one of them", "prompt")
        if self.prompt is None and self.add_special_tokens is not None:
            raise RequestError(
                "'add_special_tokens' is for a 'prompt', conversations have theirs: leave it out", "add_special_tokens"
            )
        if self.messages is None and self.add_generation_prompt is not None:
            raise RequestError("'add_generation_prompt' is for 'messages': leave it out", "add_generation_prompt")


class Tokens(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: NotRequired[list[str]]


class DetokenizeRequest(Strict):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


class Detokenized(TypedDict):
    prompt: str
