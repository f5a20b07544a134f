"""What people send as a conversation or as tools, checked: our own types, or the mappings of OpenAI's chat API."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from athanor.core.errors import RequestError, nearest
from athanor.types import ROLES, Conversation, Message, Role, Tool, ToolCall

_EXAMPLE = "{'role': 'user', 'content': '...'}"
_TOOL_EXAMPLE = "{'type': 'function', 'function': {'name': '...', 'parameters': {...}}}"
_CALL_EXAMPLE = "{'id': '...', 'type': 'function', 'function': {'name': '...', 'arguments': '{...}'}}"
_FIELDS = ("role", "content", "reasoning", "reasoning_content", "tool_calls", "tool_call_id", "tools", "name")
# Who may have which of them beside a content.
_OF_ROLE = {"reasoning": "assistant", "tool_calls": "assistant", "tool_call_id": "tool", "tools": "system", "name": "tool"}


def messages_from(messages: Conversation | Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Messages, or mappings of role, content and what else `Message` has, as checked Messages.

    Mappings are those of OpenAI's chat API; `reasoning` may be called reasoning_content, and `tools` stand at their system
    message. A key that we do not know is allowed when its value says nothing (None, or an empty list), so that an answer of an
    OpenAI client can be sent back. After an assistant's calls come their results, one for each, and they come out in the order
    of the calls. Raises RequestError (param "messages") for anything else that does not fit.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise _error(f"messages must be a list of messages, not {type(messages).__name__}: use [{_EXAMPLE}]")
    if not messages:
        raise _error("messages is empty: give at least one message with role 'user'")
    names = [item.get("name") if isinstance(item, Mapping) else None for item in messages]
    return tuple(_in_order([_message(i, item) for i, item in enumerate(messages)], names))


def tools_from(tools: object, where: str = "tools") -> tuple[Tool, ...]:
    """Tools, or OpenAI's mappings of them, as checked Tools; `strict` changes nothing here.

    Raises RequestError (param "messages") naming the one that does not fit, and for a name that occurs twice.
    """
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise _error(f"{where} must be a list of tools, not {type(tools).__name__}: use [{_TOOL_EXAMPLE}]")
    checked = tuple(_tool(item, f"{where}[{i}]") for i, item in enumerate(tools))
    names = [tool.name for tool in checked]
    for name in names:
        if names.count(name) > 1:
            raise _error(f"{where} has {names.count(name)} tools called {name!r}: give each its own name")
    return checked


def _message(i: int, item: object) -> Message:
    where = f"messages[{i}]"
    if isinstance(item, Message):
        given = {name: getattr(item, name) for name in ("reasoning", "tool_calls", "tool_call_id", "tools")}
        role, content = item.role, item.content
    elif isinstance(item, Mapping):
        given = _fields(item, where)
        role, content = item["role"], item["content"] if item.get("content") is not None or not given.get("tool_calls") else ""
    else:
        raise _error(f"{where} must be a message, not {type(item).__name__}: use {_EXAMPLE}")
    if role not in get_args(Role):
        raise _error(f"{where}.role {role!r} must be one of {', '.join(ROLES)}{nearest(str(role), ROLES)}")
    for name, value in given.items():
        if value not in (None, (), []) and role != _OF_ROLE[name]:
            raise _error(f"{where}.{name} is for role {_OF_ROLE[name]!r} only, the role is {role!r}: leave it out")
    if not isinstance(content, str):
        raise _error(f"{where}.content must be a text, not {type(content).__name__}: give a string ('' for none)")
    for name in ("reasoning", "tool_call_id", "name"):
        if not isinstance(given.get(name), str | None):
            kind = type(given[name]).__name__
            raise _error(f"{where}.{name} must be a text, not {kind}: give a string, or leave it out")
    _check_text(f"{where}.content", content)
    _check_text(f"{where}.reasoning", given["reasoning"] or "")
    calls = tuple(_call(call, f"{where}.tool_calls[{k}]") for k, call in enumerate(_list(given["tool_calls"], where)))
    tools = tools_from(given["tools"] or (), f"{where}.tools")
    return Message(role, content, given["reasoning"], calls, given["tool_call_id"], tools)


def _fields(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a mapping has beside role and content."""
    for key in item:
        if key not in _FIELDS and item[key] not in (None, []):
            raise _error(f"{where} field {key!r} must be one of {', '.join(_FIELDS)}{nearest(str(key), _FIELDS)}")
    optional = ("content",) if item.get("tool_calls") else ()  # OpenAI's clients leave it out beside calls
    missing = [key for key in ("role", "content") if key not in item and key not in optional]
    if missing:
        raise _error(f"{where} lacks {' and '.join(missing)}: every message has a role and a content")
    reasoning = [item[key] for key in ("reasoning", "reasoning_content") if item.get(key) is not None]
    if len(reasoning) == 2 and reasoning[0] != reasoning[1]:
        raise _error(f"{where} has two different texts in reasoning and reasoning_content: give one of them")
    return {name: item.get(name) for name in _OF_ROLE} | {"reasoning": reasoning[0] if reasoning else None}


def _list(value: object, where: str) -> Sequence[object]:
    if value is None:
        return ()
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise _error(f"{where}.tool_calls must be a list of calls, not {type(value).__name__}: use [{_CALL_EXAMPLE}]")
    return value


def _call(item: object, where: str) -> ToolCall:
    id: object
    name: object
    arguments: object
    if isinstance(item, ToolCall):
        id, name, arguments = item.id, item.name, item.arguments
    else:
        outer, inner = _function(item, where, ("id", "type", "function", "index"), ("name", "arguments"), _CALL_EXAMPLE)
        id, name, arguments = outer.get("id") or "", inner.get("name"), inner.get("arguments")
        if isinstance(arguments, Mapping):  # as data sets have them
            arguments = to_json(arguments)
    for field_, value in (("id", id), ("name", name), ("arguments", arguments)):
        if not isinstance(value, str):
            raise _error(f"{where}.{field_} must be a text, not {type(value).__name__}: use {_CALL_EXAMPLE}")
        _check_text(f"{where}.{field_}", value)
    if not name:
        raise _error(f"{where}.name is empty: give the name of the tool that is called")
    return ToolCall(str(id), str(name), str(arguments))


def _tool(item: object, where: str) -> Tool:
    name: object
    if isinstance(item, Tool):
        name, description = item.name, item.description
        try:
            schema = None if item.parameters is None else json.loads(item.parameters, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise _error(f"{where}.parameters is not JSON ({error}): give a JSON schema as text") from None
    else:
        _, inner = _function(item, where, ("type", "function"), ("name", "description", "parameters", "strict"), _TOOL_EXAMPLE)
        name, description, schema = inner.get("name"), inner.get("description"), inner.get("parameters")
    if not isinstance(name, str) or not name:
        raise _error(f"{where}.name must be a text that is not empty: use {_TOOL_EXAMPLE}")
    if not isinstance(description, str | None):
        raise _error(f"{where}.description must be a text, not {type(description).__name__}: give a string, or leave it out")
    if not isinstance(schema, Mapping | None):
        raise _error(f"{where}.parameters must be a JSON schema of an object, not {type(schema).__name__}: use {_TOOL_EXAMPLE}")
    try:
        text = None if schema is None else to_json(schema)
    except (ValueError, TypeError, RecursionError) as error:
        raise _error(f"{where}.parameters cannot be written as JSON ({error}): use texts, numbers, lists and objects") from None
    for field_, value in (("name", name), ("description", description), ("parameters", text)):
        _check_text(f"{where}.{field_}", value or "")
    return Tool(name, description or None, text)


def _function(
    item: object, where: str, outer: Sequence[str], inner: Sequence[str], example: str
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """An OpenAI object of type function, and the function in it; data sets have the function alone too."""
    if not isinstance(item, Mapping):
        raise _error(f"{where} must be an object, not {type(item).__name__}: use {example}")
    function = item.get("function", {k: v for k, v in item.items() if k in inner})
    if not isinstance(function, Mapping):
        raise _error(f"{where}.function must be an object, not {type(function).__name__}: use {example}")
    if item.get("type", "function") != "function":
        raise _error(f"{where}.type {item['type']!r} must be 'function': there are no other tools")
    known = outer if "function" in item else (*outer, *inner)
    for place, mapping, names in ((where, item, known), (f"{where}.function", function, inner)):
        for key in mapping:
            if key not in names:
                raise _error(f"{place} field {key!r} must be one of {', '.join(names)}{nearest(str(key), names)}")
    return item, function


def _in_order(messages: list[Message], names: list[str | None]) -> list[Message]:
    """`messages` with the results of calls in the order of the calls, each naming its call's id where that has one.

    `names` are those of the tools that results say to come from.
    """
    out: list[Message] = []
    i = 0
    while i < len(messages):
        calls: tuple[ToolCall, ...] = ()
        if messages[i].role != "tool":  # a result here has nothing before it
            calls = messages[i].tool_calls
            out.append(messages[i])
            i += 1
        start = i
        while i < len(messages) and messages[i].role == "tool":
            i += 1
        if i == start and (not calls or i == len(messages)):
            continue
        results: list[Message | None] = [None] * len(calls)
        for k in range(start, i):
            wanted = messages[k].tool_call_id
            free = [n for n, call in enumerate(calls) if results[n] is None and wanted in (None, call.id)]
            if not free:
                which = "" if wanted is None else f" {wanted!r}"
                raise _error(
                    f"messages[{k}] is the result of a call{which} that the assistant's message before it does not have, or that"
                    " has its result already: put each result after the message whose call it answers"
                )
            call = calls[free[0]]
            if names[k] not in (None, call.name):
                raise _error(f"messages[{k}].name {names[k]!r} must be that of the call it answers, {call.name!r}, or left out")
            results[free[0]] = replace(messages[k], tool_call_id=call.id or None)
        for call, result in zip(calls, results, strict=True):
            if result is None:
                which = f"{call.name!r}" + (f" ({call.id!r})" if call.id else "")
                raise _error(
                    f"messages[{start - 1}] calls {which}, and there is no result for it: add a message with role 'tool' after it"
                )
            out.append(result)
    return out


def to_json(value: object) -> str:
    """JSON as Hugging Face's filter `tojson` writes it."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _check_text(where: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _error(
            f"{where} has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start},"
            " which is no character: remove it"
        ) from error


def _error(message: str) -> RequestError:
    return RequestError(message, param="messages")
