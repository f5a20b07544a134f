"""The one renderer (law L1): the only place where a conversation becomes ids, and ids an answer.

Training, reinforcement learning, evaluation and serving all call `render` and `parse`. Control ids are placed by this code;
what people wrote is encoded apart, with control tokens disabled, so text can never become a control token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from athanor.core.errors import RequestError, nearest
from athanor.tokenizer.bpe import Tokenizer
from athanor.tokenizer.template import TEMPLATE, template_hash
from athanor.tokenizer.vocabulary import Vocabulary
from athanor.types import ROLES, Conversation, Message, Role

__all__ = ["TEMPLATE", "Rendered", "messages_from", "ours", "parse", "render", "split", "template_hash", "well_formed"]

_EXAMPLE = "{'role': 'user', 'content': '...'}"
_FIELDS = ("role", "content", "reasoning", "reasoning_content")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as tokens.

    ids        T token ids
    loss_mask  T flags: True where ids[i] is what the assistant itself has to produce, so what is learned
    """

    ids: list[int]
    loss_mask: list[bool]


def ours(tokenizer: Vocabulary) -> Tokenizer:
    """`tokenizer`, where it has the control tokens of our template. Raises RequestError for that of an imported model."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    raise RequestError(
        "this model came with a tokenizer of another program, in which our chat template has no tokens: give a text instead of"
        " a conversation, or a model that was trained with `athanor sft`",
        param="messages",
    )


def render(
    tokenizer: Vocabulary, conversation: Conversation | Sequence[Mapping[str, Any]], *, generation_prompt: bool = False
) -> Rendered:
    """`<|bos|>`, then `<|role|>` content `<|end|>` for each message.

    An assistant's reasoning stands as `<think>` reasoning `</think>` before its content. Learned is everything after
    `<|assistant|>` up to and including its `<|end|>`. With `generation_prompt` an `<|assistant|>` is appended for the model to
    go on from. Raises RequestError as `messages_from` and `ours` do.
    """
    tokenizer = ours(tokenizer)
    ids, loss_mask = [tokenizer.bos_id], [False]
    starts = {"system": tokenizer.system_id, "user": tokenizer.user_id, "assistant": tokenizer.assistant_id}
    for message in messages_from(conversation):
        body: list[int] = []
        if message.reasoning is not None:
            body += [tokenizer.think_id, *tokenizer.encode(message.reasoning), tokenizer.end_think_id]
        body += tokenizer.encode(message.content)
        body.append(tokenizer.end_id)
        ids.append(starts[message.role])
        loss_mask.append(False)
        ids += body
        loss_mask += [message.role == "assistant"] * len(body)
    if generation_prompt:
        ids.append(tokenizer.assistant_id)
        loss_mask.append(False)
    return Rendered(ids, loss_mask)


def split(tokenizer: Vocabulary, ids: Iterable[int]) -> tuple[list[int], list[int] | None]:
    """Content ids and reasoning ids (None when `<think>` never came) of an answer up to its `<|end|>`; control ids left out.

    What follows `<think>` is reasoning until `</think>`, or to the end when that never comes.
    """
    tokenizer = ours(tokenizer)
    content: list[int] = []
    reasoning: list[int] | None = None
    thinking = False
    for id in ids:
        if id == tokenizer.end_id:
            break
        if id == tokenizer.think_id:
            thinking = True
            reasoning = [] if reasoning is None else reasoning
        elif id == tokenizer.end_think_id:
            thinking = False
        elif id >= len(tokenizer.control):
            if thinking:
                assert reasoning is not None
                reasoning.append(id)
            else:
                content.append(id)
    return content, reasoning


def parse(tokenizer: Vocabulary, ids: Iterable[int]) -> Message:
    """The message that `ids` (what stands after `<|assistant|>`) are; takes any ids. `parse(render(message)) == message`.

    An unclosed `<think>` makes all that follows it reasoning; what comes after `<|end|>` is not read; other control
    tokens are left out.
    """
    content, reasoning = split(tokenizer, ids)
    return Message("assistant", tokenizer.decode(content), None if reasoning is None else tokenizer.decode(reasoning))


def well_formed(tokenizer: Vocabulary, ids: Sequence[int]) -> bool:
    """Whether `ids` are `<think>` reasoning `</think>` content `<|end|>`, the content not blank, no other control token."""
    tokenizer = ours(tokenizer)
    control = [id for id in ids if id < len(tokenizer.control)]
    if control != [tokenizer.think_id, tokenizer.end_think_id, tokenizer.end_id]:
        return False
    if ids[0] != tokenizer.think_id or ids[-1] != tokenizer.end_id:
        return False
    return bool(parse(tokenizer, ids).content.strip())


def messages_from(messages: Conversation | Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Messages, or mappings of role, content and reasoning (or reasoning_content), as checked Messages.

    A key of a mapping that we do not know is allowed when its value says nothing (None, or an empty list), so that an answer of
    an OpenAI client can be sent back. Raises RequestError (param "messages") for anything else that does not fit.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise _error(f"messages must be a list of messages, not {type(messages).__name__}: use [{_EXAMPLE}]")
    if not messages:
        raise _error("messages is empty: give at least one message with role 'user'")
    return tuple(_message(i, item) for i, item in enumerate(messages))


def _message(i: int, item: object) -> Message:
    where = f"messages[{i}]"
    if isinstance(item, Message):
        role, content, reasoning = item.role, item.content, item.reasoning
    elif isinstance(item, Mapping):
        for key in item:
            if key not in _FIELDS and item[key] not in (None, []):
                raise _error(f"{where} field {key!r} must be one of {', '.join(_FIELDS)}{nearest(str(key), _FIELDS)}")
        missing = [key for key in ("role", "content") if key not in item]
        if missing:
            raise _error(f"{where} lacks {' and '.join(missing)}: every message has a role and a content")
        role, content = item["role"], item["content"]
        given = [item[key] for key in ("reasoning", "reasoning_content") if item.get(key) is not None]
        if len(given) == 2 and given[0] != given[1]:
            raise _error(f"{where} has two different texts in reasoning and reasoning_content: give one of them")
        reasoning = given[0] if given else None
    else:
        raise _error(f"{where} must be a message, not {type(item).__name__}: use {_EXAMPLE}")
    if role not in get_args(Role):
        raise _error(f"{where}.role {role!r} must be one of {', '.join(ROLES)}{nearest(str(role), ROLES)}")
    if not isinstance(content, str):
        raise _error(f"{where}.content must be a text, not {type(content).__name__}: give a string ('' for none)")
    if reasoning is not None and not isinstance(reasoning, str):
        raise _error(f"{where}.reasoning must be a text, not {type(reasoning).__name__}: give a string, or leave it out")
    if reasoning is not None and role != "assistant":
        raise _error(f"{where}.reasoning is for role 'assistant' only, the role is {role!r}: leave it out")
    for field, text in (("content", content), ("reasoning", reasoning or "")):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _error(
                f"{where}.{field} has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start},"
                " which is no character: remove it"
            ) from error
    return Message(role, content, reasoning)


def _error(message: str) -> RequestError:
    return RequestError(message, param="messages")
