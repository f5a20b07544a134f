"""One renderer (law L1): control ids are placed by it alone, what it renders it parses back, bad messages are named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from athanor.core.errors import RequestError, TokenizerError
from athanor.tokenizer.bpe import Tokenizer
from athanor.tokenizer.chat import messages_from, parse, render, template_hash, well_formed
from athanor.tokenizer.stream import StreamDecoder
from athanor.tokenizer.template import ARGUMENTS, CALL, CONTROL_TOKENS, TOOL, TOOL_DEFINITION
from athanor.types import Message, Tool, ToolCall

TEXTS = st.lists(
    st.sampled_from([*CONTROL_TOKENS, "<|", "|>", "end", " ", "\n", "你", "🎉"])
    | st.text(st.characters(exclude_categories=["Cs"]))
).map("".join)
NAMES = TEXTS.filter(bool)
CALLS = st.lists(st.builds(ToolCall, TEXTS, NAMES, TEXTS), max_size=3).map(tuple)
SCHEMA_TEXTS = st.dictionaries(TEXTS, TEXTS | st.integers() | st.floats(allow_nan=False, allow_infinity=False), max_size=3).map(
    json.dumps
)
TOOLS = st.lists(
    st.builds(Tool, NAMES, st.none() | TEXTS, st.none() | SCHEMA_TEXTS), max_size=3, unique_by=lambda tool: tool.name
).map(tuple)
TURNS = st.one_of(
    st.builds(lambda text, tools: [Message("system", text, tools=tools)], TEXTS, TOOLS),
    st.builds(lambda text: [Message("user", text)], TEXTS),
    st.builds(
        lambda text, reasoning, calls, result: [
            Message("assistant", text, reasoning, calls),
            *(Message("tool", result) for _ in calls),
        ],
        TEXTS,
        st.none() | TEXTS,
        CALLS,
        TEXTS,
    ),
)
CONVERSATIONS = st.lists(TURNS, min_size=1, max_size=5).map(lambda turns: [message for turn in turns for message in turn])


def test_layout_is_bos_roles_contents_ends(tokenizer: Tokenizer) -> None:
    t = tokenizer
    conversation = [Message("system", "S"), Message("user", "U 1"), Message("assistant", "A", "why"), Message("assistant", "B")]
    expected = [
        *(t.bos_id, t.system_id, *t.encode("S"), t.end_id, t.user_id, *t.encode("U 1"), t.end_id, t.assistant_id),
        *(t.think_id, *t.encode("why"), t.end_think_id, *t.encode("A"), t.end_id, t.assistant_id, *t.encode("B"), t.end_id),
    ]
    assert render(t, conversation).ids == expected
    assert render(t, conversation, generation_prompt=True).ids == [*expected, t.assistant_id]


def test_what_is_learned_is_what_the_assistant_must_produce(tokenizer: Tokenizer) -> None:
    t = tokenizer
    conversation = [Message("user", "U"), Message("assistant", "A", "why"), Message("user", "V"), Message("assistant", "", None)]
    rendered = render(t, conversation, generation_prompt=True)
    learned = [token for token, learn in zip(rendered.ids, rendered.loss_mask, strict=True) if learn]
    assert learned == [t.think_id, *t.encode("why"), t.end_think_id, *t.encode("A"), t.end_id, t.end_id]
    assert not any(render(t, [Message("system", "<|assistant|>x<|end|>"), Message("user", "U")]).loss_mask)


@given(conversation=CONVERSATIONS, generation_prompt=st.booleans())
def test_control_tokens_are_those_of_the_layout_whatever_the_content(
    tokenizer: Tokenizer, conversation: list[Message], generation_prompt: bool
) -> None:
    t = tokenizer
    role = {"system": t.system_id, "user": t.user_id, "assistant": t.assistant_id, "tool": t.control[TOOL]}
    expected = [t.bos_id]
    for m in conversation:
        expected += [role[m.role], *([] if m.reasoning is None else [t.think_id, t.end_think_id])]
        expected += [t.control[TOOL_DEFINITION]] * len(m.tools)
        expected += [t.control[CALL], t.control[ARGUMENTS]] * len(m.tool_calls)
        expected.append(t.end_id)
    expected += [t.assistant_id] * generation_prompt
    rendered = render(t, conversation, generation_prompt=generation_prompt)
    assert [token for token in rendered.ids if token < 16] == expected
    assert rendered.ids.count(t.bos_id) == 1
    assert len(rendered.ids) == len(rendered.loss_mask)


@given(conversation=CONVERSATIONS)
def test_the_prompt_is_a_prefix_of_the_conversation(tokenizer: Tokenizer, conversation: list[Message]) -> None:
    # What a model sees when it answers is what it saw before the answer in training.
    whole = render(tokenizer, [*conversation, Message("assistant", "answer", "thought")])
    prompt = render(tokenizer, conversation, generation_prompt=True)
    assert whole.ids[: len(prompt.ids)] == prompt.ids
    assert whole.loss_mask[: len(prompt.ids)] == prompt.loss_mask
    assert all(whole.loss_mask[len(prompt.ids) :])


@given(content=TEXTS, reasoning=st.none() | TEXTS, calls=CALLS)
def test_parse_gives_back_what_was_rendered(
    tokenizer: Tokenizer, content: str, reasoning: str | None, calls: tuple[ToolCall, ...]
) -> None:
    message = Message("assistant", content, reasoning, calls)
    rendered = render(tokenizer, [message])
    assert parse(tokenizer, rendered.ids[2:]) == message
    assert well_formed(tokenizer, rendered.ids[2:]) == (reasoning is not None and bool(content.strip()) and not calls)


@given(data=st.data())
def test_parse_takes_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, 40) | st.integers(0, tokenizer.vocab_size - 1)))
    message = parse(tokenizer, ids)
    before_end = ids[: ids.index(tokenizer.end_id)] if tokenizer.end_id in ids else ids
    assert (message.reasoning is None) == (tokenizer.think_id not in before_end)
    if tokenizer.think_id not in before_end:
        assert len(message.tool_calls) <= before_end.count(tokenizer.control[CALL])
        assert all(call.name for call in message.tool_calls)
        if tokenizer.control[CALL] not in before_end:
            assert message == Message("assistant", tokenizer.decode(before_end))


def test_parse_of_malformed_answers(tokenizer: Tokenizer) -> None:
    t = tokenizer
    a, b = t.encode("a"), t.encode("b")
    assert parse(t, [t.think_id, *a, *b]) == Message("assistant", "", "ab")
    assert parse(t, [*a, t.think_id, *b]) == Message("assistant", "a", "b")
    assert parse(t, [t.end_think_id, *a]) == Message("assistant", "a")
    assert parse(t, [*a, t.end_id, *b, t.think_id]) == Message("assistant", "a")
    assert parse(t, [*a, t.user_id, *b]) == Message("assistant", "ab")
    assert parse(t, [t.think_id, *a, t.end_think_id, t.think_id, *b, t.end_think_id]) == Message("assistant", "", "ab")
    assert parse(t, []) == Message("assistant", "")


def test_well_formed_is_one_thought_and_an_answer(tokenizer: Tokenizer) -> None:
    t = tokenizer
    a = t.encode("a")
    good = [t.think_id, *a, t.end_think_id, *a, t.end_id]
    assert well_formed(t, good)
    assert well_formed(t, [t.think_id, t.end_think_id, *a, t.end_id])
    for bad in (
        *([], a, [*a, t.end_id], good[:-1], good[1:], [*a, *good], [*good, *a], [*good, t.end_id]),
        [t.think_id, *a, t.end_think_id, t.end_id],
        [t.think_id, *a, t.end_think_id, *t.encode(" \n"), t.end_id],
        [t.think_id, *a, t.end_think_id, t.end_think_id, *a, t.end_id],
        [t.think_id, t.think_id, *a, t.end_think_id, *a, t.end_id],
        [t.think_id, *a, t.end_think_id, *a, t.user_id, *a, t.end_id],
        [t.end_think_id, *a, t.think_id, *a, t.end_id],
        [t.think_id, *t.encode("</think>"), *a, t.end_id],
    ):
        assert not well_formed(t, bad), bad


def test_messages_from_mappings() -> None:
    assert messages_from([{"role": "user", "content": "u"}]) == (Message("user", "u"),)
    assert messages_from([Message("assistant", "a", "r")]) == (Message("assistant", "a", "r"),)
    for field in ("reasoning", "reasoning_content"):
        assert messages_from([{"role": "assistant", "content": "a", field: "r"}]) == (Message("assistant", "a", "r"),)
    both = {"role": "assistant", "content": "a", "reasoning": "r", "reasoning_content": "r"}
    assert messages_from([both]) == (Message("assistant", "a", "r"),)
    # What an OpenAI client returns, sent back.
    answer = {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None, "annotations": [], "reasoning": None}
    assert messages_from([answer]) == (Message("assistant", "a"),)


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty: give at least one message with role 'user'"),
        ("hello", r"messages must be a list of messages, not str: use \[\{'role': 'user', 'content': '...'\}\]"),
        (USER, "messages must be a list of messages, not dict"),
        (None, "messages must be a list of messages, not NoneType"),
        ([USER, "hi"], r"messages\[1\] must be a message, not str: use \{'role'"),
        (
            [{"role": "usr", "content": "x"}],
            r"messages\[0\].role 'usr' must be one of system, user, assistant, tool; did you mean 'user'\?",
        ),
        ([{"role": 3, "content": "x"}], r"role 3 must be one of system"),
        ([{"role": ["user"], "content": "x"}], r"role \['user'\] must be one of system"),
        ([{"content": "x"}], r"messages\[0\] lacks role: every message has a role and a content"),
        ([{}], r"messages\[0\] lacks role and content"),
        ([{"role": "user", "content": None}], r"messages\[0\].content must be a text, not NoneType: give a string"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], r"messages\[0\].content must be a text, not list"),
        ([{**USER, "reasoning": "r"}], r"messages\[0\].reasoning is for role 'assistant' only, the role is 'user': leave it out"),
        ([Message("user", "x", "r")], r"reasoning is for role 'assistant' only"),
        ([{"role": "assistant", "content": "x", "reasoning": 1}], r"messages\[0\].reasoning must be a text, not int"),
        (
            [{"role": "assistant", "content": "", "reasoning": "a", "reasoning_content": "b"}],
            "two different texts in reasoning and",
        ),
        ([{**USER, "contents": "y"}], r"field 'contents' must be one of role, content, reasoning.*; did you mean 'content'\?"),
        ([{**USER, "tool_calls": [{}]}], r"messages\[0\].tool_calls is for role 'assistant' only, the role is 'user': leave it"),
        ([{**USER, "tool_call_id": "1"}], r"messages\[0\].tool_call_id is for role 'tool' only"),
        ([{**USER, "name": "n"}], r"messages\[0\].name is for role 'tool' only"),
        ([{**USER, "tools": [{}]}], r"messages\[0\].tools is for role 'system' only"),
        ([Message("user", "x", tools=(Tool("f"),))], r"messages\[0\].tools is for role 'system' only"),
        (
            [{"role": "user", "content": "a\udc00"}],
            r"messages\[0\].content has the lone surrogate U\+DC00 at character 1.*: remove it",
        ),
        ([Message("assistant", "a", "\udc00")], r"messages\[0\].reasoning has the lone surrogate"),
    ],
)
def test_bad_messages_are_named(tokenizer: Tokenizer, messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        messages_from(messages)
    assert caught.value.param == "messages"
    with pytest.raises(RequestError, match=message):
        render(tokenizer, messages)


CALL_F = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALL_G = {"id": "2", "type": "function", "function": {"name": "g", "arguments": "{}"}}


def asked(*calls: object) -> dict[str, object]:
    return {"role": "assistant", "content": None, "tool_calls": [*calls]}


def result(content: str, **fields: object) -> dict[str, object]:
    return {"role": "tool", "content": content, **fields}


def test_layout_of_tools_calls_and_results(tokenizer: Tokenizer) -> None:
    t = tokenizer
    define, call, arguments, tool = (t.control[name] for name in (TOOL_DEFINITION, CALL, ARGUMENTS, TOOL))
    f = Tool("f", "Does f.", '{"type":"object"}')
    conversation = [
        Message("system", "S", tools=(f, Tool("g"))),
        Message("user", "U"),
        Message("assistant", "A", "why", (ToolCall("1", "f", '{"x": 1}'), ToolCall("2", "g", "{}"))),
        Message("tool", "one", tool_call_id="1"),
        Message("tool", "two", tool_call_id="2"),
    ]
    rendered = render(t, conversation)
    assert rendered.ids == [
        *(t.bos_id, t.system_id, *t.encode("S")),
        *(define, *t.encode('{"name": "f", "description": "Does f.", "parameters": {"type": "object"}}')),
        *(define, *t.encode('{"name": "g"}'), t.end_id),
        *(t.user_id, *t.encode("U"), t.end_id),
        *(t.assistant_id, t.think_id, *t.encode("why"), t.end_think_id, *t.encode("A")),
        *(call, *t.encode("f"), arguments, *t.encode('{"x": 1}'), call, *t.encode("g"), arguments, *t.encode("{}"), t.end_id),
        *(tool, *t.encode("one"), t.end_id, tool, *t.encode("two"), t.end_id),
    ]
    learned = [id for id, learn in zip(rendered.ids, rendered.loss_mask, strict=True) if learn]
    assert learned == render(t, conversation[2:3]).ids[2:]


def test_tools_calls_and_results_as_openai_has_them() -> None:
    function = {"name": "f", "description": "Does f.", "parameters": {"type": "object"}, "strict": True}
    tools = [{"type": "function", "function": function}, {"name": "g", "parameters": None}]
    conversation = [
        {"role": "system", "content": "S", "tools": tools},
        asked(CALL_F, {"name": "g", "arguments": {"ü": [1, None]}}),
        result("one", tool_call_id="1", name="f"),
        result("two"),
    ]
    assert messages_from(conversation) == (
        Message("system", "S", tools=(Tool("f", "Does f.", '{"type": "object"}'), Tool("g"))),
        Message("assistant", "", None, (ToolCall("1", "f", "{}"), ToolCall("", "g", '{"ü": [1, null]}'))),
        Message("tool", "one", tool_call_id="1"),
        Message("tool", "two"),
    )
    without = [{"role": "assistant", "tool_calls": [CALL_F]}]
    assert messages_from(without) == (Message("assistant", "", None, (ToolCall("1", "f", "{}"),)),)


def test_results_come_in_the_order_of_their_calls(tokenizer: Tokenizer) -> None:
    in_order = [asked(CALL_F, CALL_G), result("one", tool_call_id="1"), result("two", tool_call_id="2"), USER]
    swapped = [in_order[0], in_order[2], in_order[1], USER]
    assert messages_from(swapped) == messages_from(in_order)
    assert [m.content for m in messages_from(swapped)][1:3] == ["one", "two"]
    assert messages_from([asked(CALL_F, CALL_G), result("two", tool_call_id="2"), result("one")])[1].content == "one"
    other_ids = [asked({**CALL_F, "id": "8"}, {**CALL_G, "id": "9"}), *in_order[1:]]
    other_ids[1:3] = [result("one", tool_call_id="8"), result("two", tool_call_id="9")]
    assert render(tokenizer, other_ids).ids == render(tokenizer, in_order).ids
    assert messages_from([*in_order[:3], *in_order[:3]])[3:] == messages_from(in_order[:3])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, result("x")], r"messages\[1\] is the result of a call that the assistant's message before it does not have"),
        ([result("x", tool_call_id="9")], r"messages\[0\] is the result of a call '9' that"),
        ([asked(CALL_F), result("x", tool_call_id="9")], r"messages\[1\] is the result of a call '9' that .*: put each result"),
        ([asked(CALL_F), result("x"), result("y")], r"messages\[2\] is the result of a call that .* has its result already"),
        (
            [asked(CALL_F), USER],
            r"messages\[0\] calls 'f' \('1'\), and there is no result for it: add a message with role 'tool'",
        ),
        ([asked(CALL_F, CALL_G), result("x", tool_call_id="2")], r"messages\[0\] calls 'f' \('1'\), and there is no result"),
        ([asked(CALL_F), result("x", name="g")], r"messages\[1\].name 'g' must be that of the call it answers, 'f', or left out"),
        ([asked(CALL_F), result("x", tool_call_id=1)], r"messages\[1\].tool_call_id must be a text, not int"),
        ([asked(CALL_F), result("x", name=["f"])], r"messages\[1\].name must be a text, not list"),
        ([{**asked(), "tool_calls": "f"}], r"messages\[0\].tool_calls must be a list of calls, not str: use \[\{'id'"),
        ([{**asked(), "tool_calls": {"a": 1}}], r"messages\[0\].tool_calls must be a list of calls, not dict"),
        ([asked("f")], r"messages\[0\].tool_calls\[0\] must be an object, not str: use \{'id'"),
        ([asked({**CALL_F, "type": "x"})], r"messages\[0\].tool_calls\[0\].type 'x' must be 'function'"),
        ([asked({**CALL_F, "nam": "x"})], r"tool_calls\[0\] field 'nam' must be one of id, type, function, index"),
        (
            [asked({"function": {"name": "f", "argument": "x"}})],
            r"function field 'argument' must be .*; did you mean 'arguments'",
        ),
        ([asked({"function": "f"})], r"messages\[0\].tool_calls\[0\].function must be an object, not str"),
        ([asked({"name": "f", "arguments": 1})], r"messages\[0\].tool_calls\[0\].arguments must be a text, not int"),
        ([asked({"name": 1, "arguments": ""})], r"messages\[0\].tool_calls\[0\].name must be a text, not int"),
        ([asked({"name": "", "arguments": ""})], r"messages\[0\].tool_calls\[0\].name is empty: give the name of the tool"),
        ([asked({"name": "\udc00", "arguments": ""})], r"messages\[0\].tool_calls\[0\].name has the lone surrogate U\+DC00"),
        ([asked({"name": "f", "arguments": "\udc00"})], r"messages\[0\].tool_calls\[0\].arguments has the lone surrogate"),
        ([Message("assistant", "", None, (ToolCall("", "", ""),))], r"messages\[0\].tool_calls\[0\].name is empty"),
    ],
)
def test_bad_calls_and_results_are_named(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        messages_from(messages)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("f", r"messages\[0\].tools must be a list of tools, not str: use \[\{'type': 'function'"),
        ([1], r"messages\[0\].tools\[0\] must be an object, not int"),
        ([{"type": "retrieval"}], r"messages\[0\].tools\[0\].type 'retrieval' must be 'function': there are no other tools"),
        ([{"name": ""}], r"messages\[0\].tools\[0\].name must be a text that is not empty"),
        ([{"name": "f", "description": 1}], r"tools\[0\].description must be a text, not int"),
        ([{"name": "f", "parameters": []}], r"tools\[0\].parameters must be a JSON schema of an object, not list"),
        ([{"name": "f", "parameters": {"a": float("nan")}}], r"tools\[0\].parameters cannot be written as JSON"),
        ([{"name": "f", "parameters": {"a": {1}}}], r"tools\[0\].parameters cannot be written as JSON"),
        ([{"name": "f", "parameters": {"a": "\udc00"}}], r"tools\[0\].parameters has the lone surrogate"),
        ([{"name": "f"}, {"name": "g"}, {"name": "f"}], r"tools has 2 tools called 'f': give each its own name"),
        ([{"name": "f", "parametres": {}}], r"tools\[0\] field 'parametres' must be one of .*; did you mean 'parameters'\?"),
        ((Tool("f", None, "{"),), r"tools\[0\].parameters is not JSON .*: give a JSON schema as text"),
        ((Tool("f", None, '{"a": NaN}'),), r"tools\[0\].parameters is not JSON \(NaN is no number of JSON\)"),
        ((Tool("f", None, "[]"),), r"tools\[0\].parameters must be a JSON schema of an object, not list"),
    ],
)
def test_bad_tools_are_named(tools: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        messages_from([{"role": "system", "content": "", "tools": tools}])
    assert caught.value.param == "messages"


def test_parse_of_malformed_calls(tokenizer: Tokenizer) -> None:
    t = tokenizer
    call, arguments = t.control[CALL], t.control[ARGUMENTS]
    a, f, x = t.encode("a"), t.encode("f"), t.encode("{}")
    good = Message("assistant", "a", None, (ToolCall("", "f", "{}"),))
    assert parse(t, [*a, call, *f, arguments, *x]) == good
    assert parse(t, [*a, call, *f, arguments, *x, arguments, t.user_id]) == good
    assert parse(t, [*a, call, *f]) == Message("assistant", "af")
    assert parse(t, [*a, call, arguments, *x]) == Message("assistant", "a{}")
    assert parse(t, [call, *f, call, *f, arguments, *x]) == Message("assistant", "f", None, (ToolCall("", "f", "{}"),))
    assert parse(t, [arguments, *a]) == Message("assistant", "a")
    assert parse(t, [t.think_id, call, *f, arguments, *x]) == Message("assistant", "", "f{}")
    inside = [call, *f, t.think_id, *a, t.end_think_id, arguments, *x]
    assert parse(t, inside) == Message("assistant", "", "a", (ToolCall("", "f", "{}"),))


@given(data=st.data(), every=st.integers(1, 4))
def test_a_stream_of_calls_has_the_content_that_parse_has(tokenizer: Tokenizer, data: st.DataObject, every: int) -> None:
    control = st.sampled_from([*([tokenizer.control[CALL], tokenizer.control[ARGUMENTS]] * 2), 2, 4, 6, 7])
    ids = data.draw(st.lists(control | st.sampled_from(tokenizer.encode("a{}你")), max_size=20))
    decoder, said = StreamDecoder(tokenizer), list[tuple[str, str]]()
    for i, id in enumerate(ids):
        decoder.push(id)
        if i % every == 0:
            said.append(decoder.take())
    said.append(decoder.finish())
    message = parse(tokenizer, ids)
    assert ["".join(pieces) for pieces in zip(*said, strict=True)] == [message.content, message.reasoning or ""]


def test_stop_texts_do_not_count_in_calls(tokenizer: Tokenizer) -> None:
    t = tokenizer
    decoder = StreamDecoder(t, ("STOP",))
    for id in [*t.encode("a"), t.control[CALL], *t.encode("STOP"), t.control[ARGUMENTS], *t.encode("STOP"), t.end_id]:
        decoder.push(id)
    assert decoder.stopped_by is None and decoder.finish() == ("a", "")


def test_parse_names_an_id_out_of_range(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="token id 99999 must be"):
        parse(tokenizer, [99999])


def test_template_hash_is_pinned() -> None:
    # A change of the template makes every checkpoint before it unreadable: change this value only together with a new version.
    assert template_hash() == "9ef8e48c5081a01c618b4bf7d576a205d0ec1165382661a6fb4608329c42d9dd"
