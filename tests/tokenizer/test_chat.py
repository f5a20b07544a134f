"""One renderer (law L1): control ids are placed by it alone, what it renders it parses back, bad messages are named."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from athanor.core.errors import RequestError, TokenizerError
from athanor.tokenizer.bpe import Tokenizer
from athanor.tokenizer.chat import messages_from, parse, render, template_hash, well_formed
from athanor.tokenizer.template import CONTROL_TOKENS
from athanor.types import Message

TEXTS = st.lists(
    st.sampled_from([*CONTROL_TOKENS, "<|", "|>", "end", " ", "\n", "你", "🎉"])
    | st.text(st.characters(exclude_categories=["Cs"]))
).map("".join)
MESSAGES = st.one_of(
    st.builds(Message, st.sampled_from(["system", "user"]), TEXTS),
    st.builds(Message, st.just("assistant"), TEXTS, st.none() | TEXTS),
)
CONVERSATIONS = st.lists(MESSAGES, min_size=1, max_size=5)


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
    role = {"system": t.system_id, "user": t.user_id, "assistant": t.assistant_id}
    expected = [t.bos_id]
    for m in conversation:
        expected += [role[m.role], *([] if m.reasoning is None else [t.think_id, t.end_think_id]), t.end_id]
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


@given(content=TEXTS, reasoning=st.none() | TEXTS)
def test_parse_gives_back_what_was_rendered(tokenizer: Tokenizer, content: str, reasoning: str | None) -> None:
    message = Message("assistant", content, reasoning)
    rendered = render(tokenizer, [message])
    assert parse(tokenizer, rendered.ids[2:]) == message
    assert well_formed(tokenizer, rendered.ids[2:]) == (reasoning is not None and bool(content.strip()))


@given(data=st.data())
def test_parse_takes_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, 40) | st.integers(0, tokenizer.vocab_size - 1)))
    message = parse(tokenizer, ids)
    before_end = ids[: ids.index(tokenizer.end_id)] if tokenizer.end_id in ids else ids
    assert (message.reasoning is None) == (tokenizer.think_id not in before_end)
    if tokenizer.think_id not in before_end:
        assert message.content == tokenizer.decode(before_end)


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
            r"messages\[0\].role 'usr' must be one of system, user, assistant; did you mean 'user'\?",
        ),
        ([{"role": "tool", "content": "x"}], r"messages\[0\].role 'tool' must be one of system, user, assistant"),
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
        ([{**USER, "tool_calls": [{}]}], r"field 'tool_calls' must be one of role"),
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


def test_parse_names_an_id_out_of_range(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="token id 99999 must be"):
        parse(tokenizer, [99999])


def test_template_hash_is_pinned() -> None:
    # A change of the template makes every checkpoint before it unreadable: change this value only together with a new version.
    assert template_hash() == "9379ea0a3797ccf69485ffff9119ee60be1386593534372bf34f5fd0d67980e1"
