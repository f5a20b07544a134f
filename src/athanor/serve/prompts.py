"""From what a client sends to requests for the engine: prompts as tokens, limits, choices."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from athanor.core.errors import RequestError
from athanor.serve.completions import CompletionRequest
from athanor.serve.models import Served
from athanor.serve.protocol import ChatRequest
from athanor.serve.responses import ResponseRequest
from athanor.serve.tokens import TokenizeRequest
from athanor.tokenizer.chat import render
from athanor.types import Request, SamplingParams

_NEVER = -100.0  # added to a logit


@dataclass(frozen=True)
class Prepared:
    """What one HTTP request asks of the engine.

    id         of the answer
    requests   choice j of prompt i is number i n + j
    truncated  tokens that were left out of the prompts; None where they may not be cut
    """

    id: str
    requests: list[Request]
    truncated: int | None


def of_chat(chat: ChatRequest, served: Served, default: int | None) -> Prepared:
    """Raises RequestError for what does not fit into the context, or names tokens that the model has not."""
    check_ids(chat.token_ids(), served.vocab_size)
    ids, cut = _cut([_rendered(chat, served)], chat.truncate_prompt_tokens)
    params = chat.sampling(_limit(chat.limit, chat.limit_field, len(ids[0]), served, default, "messages"))
    if chat.silent and served.think is not None:
        think = served.think[0]
        params = [replace(p, logit_bias=(*(b for b in p.logit_bias if b[0] != think), (think, _NEVER))) for p in params]
    return _prepared(served, "chatcmpl", zip(ids * chat.n, params, strict=True), cut, chat.priority)


def _rendered(chat: ChatRequest, served: Served) -> list[int]:
    ids = render(served.tokenizer, chat.conversation(), generation_prompt=chat.generation_prompt).ids
    if chat.continue_final_message:
        assert ids[-1] == served.tokenizer.end_id
        ids.pop()  # the message goes on
    return ids


def of_completion(asked: CompletionRequest, served: Served) -> Prepared:
    """As `of_chat`."""
    check_ids(asked.token_ids(), served.vocab_size)
    whole = [served.prompt(p) if isinstance(p, str) else p for p in asked.prompts]
    prompts, cut = _cut(whole, asked.truncate_prompt_tokens)
    pairs: list[tuple[list[int], SamplingParams]] = []
    for ids in prompts:
        default = asked.limit if "max_tokens" in asked.model_fields_set else None
        limit = _limit(default, "max_tokens", len(ids), served, asked.limit, "prompt")
        pairs += [(ids, p) for p in asked.sampling(limit)]
    return _prepared(served, "cmpl", pairs, cut, asked.priority)


def of_response(asked: ResponseRequest, served: Served, default: int | None, seed: int) -> Prepared:
    """As `of_chat`."""
    try:
        ids = render(served.tokenizer, asked.conversation(), generation_prompt=True).ids
    except RequestError as error:
        raise RequestError(str(error), "input") from None
    limit = _limit(asked.max_output_tokens, "max_output_tokens", len(ids), served, default, "input")
    return _prepared(served, "resp", [(ids, asked.sampling(limit, seed))], None, 0)


def tokens_of(asked: TokenizeRequest, served: Served) -> list[int]:
    """The tokens of a text or a conversation, as the model would read them."""
    if asked.messages is not None:
        messages = [message.plain() for message in asked.messages]
        return render(served.tokenizer, messages, generation_prompt=asked.add_generation_prompt is not False).ids
    assert asked.prompt is not None
    return (served.tokenizer.encode if asked.add_special_tokens is False else served.prompt)(asked.prompt)


def check_ids(fields: Mapping[str, Sequence[int]], vocab_size: int) -> None:
    """Raises RequestError for the first id that is no token of the model."""
    for field, ids in fields.items():
        for id in ids:
            if id >= vocab_size:
                raise RequestError(
                    f"'{field}' has the token id {id}, and the model's lie in [0, {vocab_size}): use those of its tokenizer",
                    field,
                )


def _cut(prompts: list[list[int]], longest: int | None) -> tuple[list[list[int]], int | None]:
    """The last `longest` tokens of each prompt, and how many were left out together."""
    if longest is None:
        return prompts, None
    return [ids[-longest:] for ids in prompts], sum(max(0, len(ids) - longest) for ids in prompts)


def _limit(asked: int | None, field: str, prompt: int, served: Served, default: int | None, what: str) -> int:
    """How many tokens an answer may have. Raises RequestError when prompt and answer do not fit into the context."""
    left, context = served.room(prompt), served.context
    if not prompt:
        raise RequestError(f"'{what}' has no tokens, so there is nothing to go on from: give at least one", what)
    if left < 1:
        raise RequestError(
            f"'{what}' is {prompt} tokens long, but the context has {context} for it and the answer: shorten it", what
        )
    if asked is None:
        return left if default is None else min(default, left)
    if asked > left:
        raise RequestError(
            f"{field} ({asked}) is more than the {left} tokens that '{what}' ({prompt} tokens) leaves of the context ({context}):"
            f" lower it, leave it out, or shorten '{what}'",
            field,
        )
    return asked


def _prepared(
    served: Served, kind: str, pairs: Iterable[tuple[list[int], SamplingParams]], cut: int | None, priority: int
) -> Prepared:
    answer_id = f"{kind}_{uuid.uuid4().hex}" if kind == "resp" else f"{kind}-{uuid.uuid4().hex}"
    requests = [Request(f"{answer_id}-{i}", ids, p, priority) for i, (ids, p) in enumerate(pairs)]
    if served.engine is not None and requests[0].params.structure is not None:
        served.engine.prepare(requests[0].params)  # here, where nobody waits for it
    return Prepared(answer_id, requests, cut)
