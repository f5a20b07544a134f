"""The one renderer (law L1): the only place where a conversation becomes ids, and ids an answer.

Training, reinforcement learning, evaluation and serving all call `render` and `parse`. Control ids are placed by this code;
what people wrote is encoded apart, with control tokens disabled, so text can never become a control token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from athanor.core.errors import RequestError
from athanor.tokenizer.bpe import Tokenizer
from athanor.tokenizer.messages import messages_from, to_json, tools_from
from athanor.tokenizer.template import ARGUMENTS, CALL, TEMPLATE, TOOL, TOOL_DEFINITION, template_hash
from athanor.tokenizer.vocabulary import Vocabulary
from athanor.types import Conversation, Message, Role, Tool, ToolCall

__all__ = [
    "TEMPLATE",
    "Parts",
    "Rendered",
    "messages_from",
    "ours",
    "parse",
    "parts",
    "render",
    "split",
    "template_hash",
    "tools_from",
    "well_formed",
]


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

    An assistant's reasoning stands as `<think>` reasoning `</think>` before its content, its calls of tools after it, each as
    CALL name ARGUMENTS arguments. Tools stand after the content of their system message, each as TOOL_DEFINITION and JSON text.
    Learned is everything after `<|assistant|>` up to and including its `<|end|>`. With `generation_prompt` an `<|assistant|>` is
    appended for the model to go on from. Raises RequestError as `messages_from` and `ours` do.
    """
    tokenizer = ours(tokenizer)
    control = tokenizer.control
    ids, loss_mask = [tokenizer.bos_id], [False]
    starts: dict[Role, int] = {
        "system": tokenizer.system_id,
        "user": tokenizer.user_id,
        "assistant": tokenizer.assistant_id,
        "tool": control[TOOL],
    }
    for message in messages_from(conversation):
        body: list[int] = []
        if message.reasoning is not None:
            body += [tokenizer.think_id, *tokenizer.encode(message.reasoning), tokenizer.end_think_id]
        body += tokenizer.encode(message.content)
        for tool in message.tools:
            body += [control[TOOL_DEFINITION], *tokenizer.encode(definition(tool))]
        for call in message.tool_calls:
            body += [control[CALL], *tokenizer.encode(call.name), control[ARGUMENTS], *tokenizer.encode(call.arguments)]
        body.append(tokenizer.end_id)
        ids.append(starts[message.role])
        loss_mask.append(False)
        ids += body
        loss_mask += [message.role == "assistant"] * len(body)
    if generation_prompt:
        ids.append(tokenizer.assistant_id)
        loss_mask.append(False)
    return Rendered(ids, loss_mask)


def definition(tool: Tool) -> str:
    """How a model reads of a tool: JSON of its name and of what is known of its description and parameters."""
    text = f'{{"name": {to_json(tool.name)}'
    if tool.description:
        text += f', "description": {to_json(tool.description)}'
    if tool.parameters is not None:
        text += f', "parameters": {tool.parameters}'
    return text + "}"


@dataclass(slots=True)
class Parts:
    """The tokens of an answer by what they are; control tokens left out.

    content    of the answer
    reasoning  None when `<think>` never came
    calls      of each call, its name and its arguments; None where it ended, or another call began, before there were any
    """

    content: list[int] = field(default_factory=list)
    reasoning: list[int] | None = None
    calls: list[tuple[list[int], list[int] | None]] = field(default_factory=list)


def parts(tokenizer: Vocabulary, ids: Iterable[int]) -> Parts:
    """What the tokens of an answer up to its `<|end|>` are; takes any ids.

    What follows `<think>` is reasoning until `</think>`, or to the end when that never comes; within it nothing else begins. A
    call ends where the next one or the answer does.
    """
    tokenizer = ours(tokenizer)
    call_id, arguments_id = tokenizer.control[CALL], tokenizer.control[ARGUMENTS]
    answer = Parts()
    place = answer.content
    thinking = False
    for id in ids:
        if id == tokenizer.end_id:
            break
        if id == tokenizer.think_id:
            thinking = True
            answer.reasoning = [] if answer.reasoning is None else answer.reasoning
        elif id == tokenizer.end_think_id:
            thinking = False
        elif id >= len(tokenizer.control):
            if thinking:
                assert answer.reasoning is not None
                answer.reasoning.append(id)
            else:
                place.append(id)
        elif thinking:
            continue
        elif id == call_id:
            place = []
            answer.calls.append((place, None))
        elif id == arguments_id and answer.calls and answer.calls[-1][1] is None:
            place = []
            answer.calls[-1] = (answer.calls[-1][0], place)
    return answer


def split(tokenizer: Vocabulary, ids: Iterable[int]) -> tuple[list[int], list[int] | None]:
    """Content ids and reasoning ids (None when `<think>` never came) of an answer, as `parts` gives them."""
    answer = parts(tokenizer, ids)
    return answer.content, answer.reasoning


def parse(tokenizer: Vocabulary, ids: Iterable[int]) -> Message:
    """The message that `ids` (what stands after `<|assistant|>`) are; takes any ids. `parse(render(message)) == message`.

    An unclosed `<think>` makes all that follows it reasoning; what comes after `<|end|>` is not read; other control
    tokens are left out. A call without a name or without arguments is none: its text is content. Calls have no ids.
    """
    answer = parts(tokenizer, ids)
    content, calls = answer.content, list[ToolCall]()
    for name, arguments in answer.calls:
        if name and arguments is not None:
            calls.append(ToolCall("", tokenizer.decode(name), tokenizer.decode(arguments)))
        else:
            content = [*content, *name, *(arguments or ())]
    reasoning = None if answer.reasoning is None else tokenizer.decode(answer.reasoning)
    return Message("assistant", tokenizer.decode(content), reasoning, tuple(calls))


def well_formed(tokenizer: Vocabulary, ids: Sequence[int]) -> bool:
    """Whether `ids` are `<think>` reasoning `</think>` content `<|end|>`, the content not blank, no other control token."""
    tokenizer = ours(tokenizer)
    control = [id for id in ids if id < len(tokenizer.control)]
    if control != [tokenizer.think_id, tokenizer.end_think_id, tokenizer.end_id]:
        return False
    if ids[0] != tokenizer.think_id or ids[-1] != tokenizer.end_id:
        return False
    return bool(parse(tokenizer, ids).content.strip())
