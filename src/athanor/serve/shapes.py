"""What several answers have in common: usage, log-probabilities, errors, and their shapes for the OpenAPI description."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from typing_extensions import NotRequired, TypedDict  # pydantic reads those of `typing` from Python 3.12 on

from athanor.tokenizer.bpe import Tokenizer
from athanor.tokenizer.vocabulary import Vocabulary
from athanor.types import Completion, TokenLogprob

Json = dict[str, Any]
_LOWEST = -9999.0  # stands for minus infinity, which JSON has not


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    error: ErrorDetail


class PromptDetails(TypedDict):
    cached_tokens: NotRequired[int]  # not known before the end of a stream
    truncated_tokens: NotRequired[int]  # left out of the prompt, where truncate_prompt_tokens asks for it


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[PromptDetails]


class Told(TypedDict):
    """One token in OpenAI's words."""

    token: str
    logprob: float
    bytes: list[int] | None


class ToldToken(Told):
    top_logprobs: list[Told]


class ChatLogprobs(TypedDict):
    content: list[ToldToken]
    refusal: None


class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptToken(TypedDict):
    logprob: float
    rank: int | None  # known for the most probable ones
    decoded_token: str


PromptLogprobs = list[dict[str, PromptToken] | None]


class Model(TypedDict):
    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int


class ModelList(TypedDict):
    object: str
    data: list[Model]


def error_body(message: str, type_: str, param: str | None = None, code: str | None = None) -> ErrorBody:
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def model_body(name: str, created: int, max_len: int) -> Model:
    return {"id": name, "object": "model", "created": created, "owned_by": "athanor", "max_model_len": max_len}


def usage(prompt: int, new: int, cached: int | None = None, truncated: int | None = None) -> Usage:
    """Tokens of one request; None for what is not known, or was not asked for."""
    details: PromptDetails = {}
    if cached is not None:
        details["cached_tokens"] = cached
    if truncated is not None:
        details["truncated_tokens"] = truncated
    spent: Usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    return {**spent, "prompt_tokens_details": details} if details else spent


def usage_of(completions: Sequence[Completion], n: int = 1, truncated: int | None = None) -> Usage:
    """Tokens of one request: a prompt counts once, whatever the number of its choices (n)."""
    prompts = completions[::n]
    new = sum(len(c.ids) for c in completions)
    return usage(sum(len(c.prompt_ids) for c in prompts), new, sum(c.cached for c in prompts), truncated)


class Teller:
    """Tokens and their log-probabilities in the words of the protocol."""

    def __init__(self, tokenizer: Vocabulary) -> None:
        self._tokenizer = tokenizer

    def text(self, id: int) -> str:
        """One token as it is shown; a model may know more ids than its tokenizer."""
        return self._tokenizer.token(id) if id < self._tokenizer.vocab_size else f"<{id}>"

    def _told(self, id: int, logprob: float) -> Told:
        text = self.text(id)
        known = isinstance(self._tokenizer, Tokenizer) and id < self._tokenizer.vocab_size
        data = self._tokenizer.token_bytes(id) if known else text.encode()  # type: ignore[attr-defined]  # it is one of ours
        return {"token": text, "logprob": max(logprob, _LOWEST), "bytes": list(data) or None}

    def chat(self, tokens: Iterable[TokenLogprob]) -> ChatLogprobs:
        """As chat has it: every new token, those of the reasoning and the one that ends the turn included."""
        content: list[ToldToken] = [
            {**self._told(t.id, t.logprob), "top_logprobs": [self._told(*pair) for pair in t.top]} for t in tokens
        ]
        return {"content": content, "refusal": None}

    def completion(self, ids: Sequence[int], tokens: Iterable[TokenLogprob | None], offsets: Sequence[int]) -> TextLogprobs:
        """As text completions have it. Two tokens of one text are one entry of top_logprobs: the more probable."""
        known = list(tokens)
        top: list[dict[str, float] | None] = []
        for t in known:
            pairs = () if t is None else ((t.id, t.logprob), *t.top)
            best: dict[str, float] = {}
            for id, logprob in pairs:
                text = self.text(id)
                best[text] = max(logprob, best.get(text, _LOWEST))
            top.append(best or None)
        return {
            "tokens": [self.text(id) for id in ids],
            "token_logprobs": [None if t is None else max(t.logprob, _LOWEST) for t in known],
            "top_logprobs": top,
            "text_offset": list(offsets),
        }

    def prompt(self, tokens: Iterable[TokenLogprob | None]) -> PromptLogprobs:
        """What is told of a prompt: for each token but the first, itself and the most probable ones by id."""
        return [None if t is None else self._alternatives(t) for t in tokens]

    def _alternatives(self, t: TokenLogprob) -> dict[str, PromptToken]:
        ranks: dict[int, int | None] = {id: rank for rank, (id, _) in enumerate(t.top, 1)}
        pairs = {t.id: t.logprob, **dict(t.top)}
        return {
            str(id): {"logprob": max(logprob, _LOWEST), "rank": ranks.get(id), "decoded_token": self.text(id)}
            for id, logprob in pairs.items()
        }


class Offsets:
    """Where each token begins in its text, in characters."""

    def __init__(self, tokenizer: Vocabulary, before: Sequence[int] = (), start: int = 0) -> None:
        self._tokenizer, self._pieces, self.at = tokenizer, tokenizer.pieces(before), start

    def of(self, ids: Iterable[int]) -> list[int]:
        """Of the next tokens."""
        found = []
        for id in ids:
            found.append(self.at)
            self.at += len(self._pieces.push(id)) if id < self._tokenizer.vocab_size else 0
        return found
