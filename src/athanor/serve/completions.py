"""OpenAI's text completions: a text, or tokens, to be continued; several of them at once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Discriminator, Field, Tag
from typing_extensions import NotRequired, TypedDict

from athanor.core.errors import RequestError
from athanor.serve.body import Fields
from athanor.serve.events import Event, data
from athanor.serve.sampling import MAX_LOGPROBS, Sampling, TokenId
from athanor.serve.shapes import ErrorBody, Json, Offsets, PromptLogprobs, Teller, TextLogprobs, Usage, usage, usage_of
from athanor.tokenizer.vocabulary import Vocabulary
from athanor.types import Completion

if TYPE_CHECKING:
    from athanor.infer.engine import Chunk

MAX_PROMPTS = 128


def prompts_tag(value: object) -> str:
    """Which of the four forms a prompt has: a text, texts, ids or lists of ids."""
    if not isinstance(value, list):
        return "<text>"
    if value and isinstance(value[0], list):
        return "<lists>"
    return "<texts>" if value and isinstance(value[0], str) else "<ids>"


_Ids = Annotated[list[TokenId], Field(min_length=1)]
Prompts = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS), Tag("<texts>")]
    | Annotated[_Ids, Tag("<ids>")]
    | Annotated[list[_Ids], Field(min_length=1, max_length=MAX_PROMPTS), Tag("<lists>")],
    Discriminator(prompts_tag),
]


class CompletionRequest(Sampling):
    """The body of POST /v1/completions."""

    INERT = frozenset({"user"})
    UNSUPPORTED: ClassVar[Fields] = {"best_of": (1,), "num_beams": (1,), "suffix": ()}

    prompt: Prompts
    max_tokens: int = Field(16, ge=0, lt=2**31)
    max_new_tokens: int | None = Field(None, ge=1, lt=2**31)  # transformers' name, which lm-eval sends beside max_tokens
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False

    @property
    def limit(self) -> int:
        """New tokens at most, as the engine is asked for them: one, too, where only the prompt is wanted."""
        return max(1, min(self.max_tokens, self.max_new_tokens or self.max_tokens))

    @property
    def told(self) -> int | None:
        return self.logprobs

    @property
    def told_of_prompt(self) -> int | None:
        return self.logprobs if self.echo and self.prompt_logprobs is None else self.prompt_logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)

    def check(self) -> None:
        super().check()
        if self.max_new_tokens is not None and "max_tokens" not in self.model_fields_set:
            raise RequestError("'max_new_tokens' only lowers 'max_tokens', which is missing: send that", "max_new_tokens")
        if not self.max_tokens and not self.echo:
            raise RequestError(
                "'max_tokens' is 0, so there is no answer: ask for 1 at least, or for the prompt (echo)", "max_tokens"
            )
        if self.stream and not self.max_tokens:
            raise RequestError("'max_tokens' is 0, so there is nothing to stream: leave 'stream' out", "max_tokens")
        if self.stream and self.echo and self.logprobs is not None:
            raise RequestError(
                "'logprobs' of an echoed prompt stand in no event of a stream: leave 'logprobs', 'echo' or 'stream' out",
                "logprobs",
            )

    def token_ids(self) -> dict[str, list[int]]:
        return {**super().token_ids(), "prompt": [id for p in self.prompts if not isinstance(p, str) for id in p]}


class Text(TypedDict):
    """One choice."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str
    stop_reason: str | int | None
    reasoning: NotRequired[str]  # what stood between <think> and </think>; it is no part of the text
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class TextAnswer(TypedDict):
    """The body of an answer that is not streamed."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Text]
    usage: Usage


class TextWriter:
    """The bodies of one answer; choice j of prompt i is number i n + j."""

    def __init__(self, answer_id: str, asked: CompletionRequest, tokenizer: Vocabulary, truncated: int | None = None) -> None:
        self._id, self._created, self._asked, self._truncated = answer_id, int(time.time()), asked, truncated
        self._tokenizer, self._teller = tokenizer, Teller(tokenizer)
        self._new: dict[int, int] = {}
        self._offsets: dict[int, Offsets] = {}

    def _echoed(self, index: int, prompt_ids: Sequence[int]) -> str:
        """The prompt as text: as it was given, unless it was given as tokens or cut."""
        prompt = self._asked.prompts[index // self._asked.n]
        return prompt if isinstance(prompt, str) and not self._truncated else self._tokenizer.decode(prompt_ids)

    def whole(self, completions: Sequence[Completion]) -> TextAnswer:
        """The body of an answer that is not streamed."""
        spent = usage_of(completions, self._asked.n, self._truncated)
        if not self._asked.max_tokens:
            spent = {**spent, "completion_tokens": 0, "total_tokens": spent["prompt_tokens"]}
        choices = [self._choice(i, c) for i, c in enumerate(completions)]
        return {**self._head(), "choices": choices, "usage": spent}  # type: ignore[typeddict-item]  # the head is typed loosely

    def _choice(self, index: int, c: Completion) -> Text:
        asked, ids, text = self._asked, list(c.ids), c.text
        told = None if c.top_logprobs is None else list(c.top_logprobs)
        if not asked.max_tokens:
            ids, text, told = [], "", [] if told is not None else None
        before, known = list[int](), []
        echoed = ""
        if asked.echo:
            echoed = self._echoed(index, c.prompt_ids)
            before, known = list(c.prompt_ids), list(c.prompt_logprobs or ())
        logprobs = None
        if asked.logprobs is not None and told is not None and len(known) == len(before):
            offsets = Offsets(self._tokenizer).of(before) + Offsets(self._tokenizer, c.prompt_ids, len(echoed)).of(ids)
            logprobs = self._teller.completion(before + ids, [*known, *told], offsets)
        choice: Text = {
            "index": index,
            "text": echoed + text,
            "logprobs": logprobs,
            "finish_reason": c.finish_reason if asked.max_tokens else "length",
            "stop_reason": c.stop_reason if asked.max_tokens else None,
        }
        if c.reasoning is not None and asked.max_tokens:
            choice["reasoning"] = c.reasoning
        if asked.return_token_ids:
            choice["token_ids"], choice["prompt_token_ids"] = ids, list(c.prompt_ids)
        if asked.prompt_logprobs is not None and c.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._teller.prompt(c.prompt_logprobs)
        return choice

    def opening(self, prompts: Sequence[Sequence[int]]) -> Iterator[Event]:
        """The echoed prompts, and their tokens."""
        for i, prompt in enumerate(prompts):
            echoed = self._echoed(i, prompt) if self._asked.echo else ""
            self._offsets[i] = Offsets(self._tokenizer, prompt, len(echoed))
            more: Json = {"prompt_token_ids": list(prompt)} if self._asked.return_token_ids else {}
            if echoed or more:
                yield self._event(i, echoed, len(prompt), more)

    def chunk(self, index: int, chunk: Chunk, prompt: int) -> Iterator[Event]:
        """The events of what is new of a choice; the last of them has its finish_reason."""
        self._new[index] = self._new.get(index, 0) + len(chunk.ids)
        more: Json = {"token_ids": list(chunk.ids)} if self._asked.return_token_ids and chunk.ids else {}
        offsets = self._offsets[index].of(chunk.ids)
        if self._asked.logprobs is not None and chunk.logprobs:
            more["logprobs"] = self._teller.completion(chunk.ids, chunk.logprobs, offsets)
        if chunk.reasoning:
            more["reasoning"] = chunk.reasoning
        if chunk.content or more:
            yield self._event(index, chunk.content, prompt, more)
        if chunk.completion is not None:
            self._new[index] = len(chunk.completion.ids)
            end = {"finish_reason": chunk.completion.finish_reason, "stop_reason": chunk.completion.stop_reason}
            yield self._event(index, "", prompt, end)

    def ending(self, completions: Sequence[Completion]) -> Iterator[Event]:
        """The event of the usage, which has no choices, and the end of the stream."""
        if self._asked.include_usage:
            spent = usage_of(completions, self._asked.n, self._truncated)
            yield data(json.dumps({**self._head(), "choices": [], "usage": spent}))
        yield data("[DONE]")

    def failed(self, body: ErrorBody) -> Iterator[Event]:
        """What ends a stream instead: no end follows it."""
        yield data(json.dumps(body))

    def _head(self) -> Json:
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._asked.model}

    def _event(self, index: int, text: str, prompt: int, more: Json) -> Event:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": None, **more}
        body = {**self._head(), "choices": [choice]}
        if self._asked.usage_in_every_event:
            body["usage"] = usage(prompt, self._new.get(index, 0), truncated=self._truncated)
        return data(json.dumps(body))
