"""What a chat request may say: values, ranges, unknown and unsupported fields, and bodies that are no request at all."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming, CompletionCreateParamsStreaming

from athanor.core.errors import RequestError
from athanor.infer.engine import Chunk
from athanor.serve.protocol import Answer, ChatRequest, parse_chat
from athanor.types import Completion, SamplingParams

INERT, UNSUPPORTED = ChatRequest.INERT, ChatRequest.UNSUPPORTED

HELLO = [{"role": "user", "content": "hello"}]


def body(**fields):
    return json.dumps({"model": "m", "messages": HELLO, **fields}).encode()


def part(*parts):
    return {"role": "user", "content": list(parts)}


def refused(data):
    with pytest.raises(RequestError) as error:
        parse_chat(data if isinstance(data, bytes) else json.dumps(data).encode())
    return error.value


def test_chat_has_parameters_of_its_own():
    chat = parse_chat(body(logprobs=True, top_logprobs=3))
    assert chat.sampling(1)[0].logprobs == 3
    assert parse_chat(body(logprobs=True)).sampling(1)[0].logprobs == 0
    assert parse_chat(body()).sampling(1)[0].logprobs is None
    assert "told only with" in str(refused(body(top_logprobs=3)))
    assert refused(body(logprobs=True, top_logprobs=21)).param == "top_logprobs"
    assert (parse_chat(body()).generation_prompt, parse_chat(body(add_generation_prompt=False)).generation_prompt) == (
        True,
        False,
    )
    last = {"messages": [*HELLO, {"role": "assistant", "content": "so"}], "continue_final_message": True}
    assert not parse_chat(body(**last)).generation_prompt
    assert "leave one out" in str(refused(body(**last, add_generation_prompt=True)))
    error = refused(body(continue_final_message=True))
    assert str(error).endswith("the last one is of role 'user': end with one of role 'assistant'")
    assert parse_chat(body(reasoning_effort="none")).silent
    assert not parse_chat(body()).silent
    error = refused(body(reasoning_effort="high"))
    assert (error.param, "these models know no degrees of it" in str(error)) == ("reasoning_effort", True)


def test_the_smallest_request_has_the_defaults_of_openai():
    chat = parse_chat(body())
    assert chat.conversation() == [{"role": "user", "content": "hello", "reasoning": None, "reasoning_content": None}]
    (params,) = chat.sampling(7)
    assert params == SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_tokens=7, stop=(), seed=params.seed)
    assert (chat.limit, chat.limit_field, chat.stream, chat.include_usage) == (None, "max_tokens", False, False)


def test_everything_that_is_used_reaches_the_engine():
    chat = parse_chat(body(temperature=0, top_p=0.5, top_k=3, max_tokens=9, stop=["a", "b"], seed=-1, n=2, stream=True))
    assert chat.sampling(9) == [
        SamplingParams(0.0, 0.5, 3, 9, ("a", "b"), 2**63 - 1),
        SamplingParams(0.0, 0.5, 3, 9, ("a", "b"), 0),
    ]
    assert chat.limit == 9
    assert chat.stream
    chat = parse_chat(body(max_completion_tokens=4, stop="end", stream=True, stream_options={"include_usage": True}))
    assert (chat.limit, chat.limit_field, chat.include_usage) == (4, "max_completion_tokens", True)
    assert chat.sampling(4)[0].stop == ("end",)
    assert parse_chat(body(max_tokens=4, max_completion_tokens=4)).limit == 4


def test_seeds_differ_unless_one_is_given():
    assert parse_chat(body()).sampling(1) != parse_chat(body()).sampling(1)
    assert parse_chat(body(seed=5)).sampling(1) == parse_chat(body(seed=5)).sampling(1)


def test_roles_parts_and_reasoning():
    chat = parse_chat(
        body(
            messages=[
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "", "reasoning_content": "so"},
            ]
        )
    )
    assert [tuple(m.values()) for m in chat.conversation()] == [
        ("system", "be brief", None, None),
        ("user", "ab", None, None),
        ("assistant", "", None, "so"),
    ]


def test_an_answer_of_the_openai_client_can_be_sent_back_as_history(tokenizer):
    answer = Answer("id", parse_chat(body()), tokenizer).whole([Completion("r", [1], [2], [0.0], "42", "6 * 7", "stop")])
    message = ChatCompletion.model_validate(answer).choices[0].message
    chat = parse_chat(body(messages=[*HELLO, message.model_dump(), *HELLO]))
    assert chat.conversation()[1] == {"role": "assistant", "content": "42", "reasoning": "6 * 7", "reasoning_content": "6 * 7"}
    bare = ChatCompletionMessage(role="assistant", content="42", annotations=[], tool_calls=[])
    assert parse_chat(body(messages=[*HELLO, bare.model_dump()])).conversation()[1]["content"] == "42"


def test_every_field_of_the_openai_client_is_known():
    fields = {*CompletionCreateParamsNonStreaming.__annotations__, *CompletionCreateParamsStreaming.__annotations__}
    for base in CompletionCreateParamsStreaming.__orig_bases__:
        fields |= {*base.__annotations__}
    assert len(fields) > 35
    assert fields <= {*ChatRequest.names(), *INERT, *UNSUPPORTED}


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_an_unsupported_field_takes_null_and_its_default_and_nothing_else(name):
    for value in (None, *UNSUPPORTED[name]):
        assert parse_chat(body(**{name: value})) == parse_chat(body())
    error = refused(body(**{name: {"something": "else"}}))
    assert str(error) == f"'{name}' is not supported yet (got {{'something': 'else'}}): leave it out"
    assert error.param == name


@pytest.mark.parametrize("name", sorted(INERT))
def test_fields_that_change_nothing_are_accepted(name):
    assert parse_chat(body(**{name: "anything"})) == parse_chat(body())


def test_false_is_not_the_number_zero():
    assert refused(body(frequency_penalty=False)).param == "frequency_penalty"
    assert refused(body(store=0)).param == "store"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temprature": 1}, "unknown field 'temprature'; did you mean 'temperature'?: correct it or leave it out"),
        ({"max_token": 1}, "unknown field 'max_token'; did you mean 'max_tokens'?: correct it or leave it out"),
        ({"xyzzy": 1}, "unknown field 'xyzzy': correct it or leave it out"),
        ({"stream": True, "stream_options": {"include_usages": True}}, "'stream_options.include_usages'"),
        ({"messages": [{"role": "user", "content": "a", "contents": "b"}]}, "'messages[0].contents'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]}, "'messages[0].content[0].x'"),
        (
            {"messages": [*HELLO, {"role": "user", "content": "a", "name": "B"}]},
            "'messages[1].name' is not supported yet (got 'B')",
        ),
        ({"messages": [part({"type": "image_url", "image_url": {}})]}, "'messages[0].content[0].image_url' is not supported yet"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "'stream_options.include_obfuscation' is not sup"),
    ],
)
def test_unknown_fields_are_named_with_the_nearest(fields, message):
    assert message in str(refused(body(**fields)))


@pytest.mark.parametrize(
    ("param", "value", "rule"),
    [
        ("model", 5, "valid string"),
        ("messages", [], "at least 1 item"),
        ("messages", "hello", "valid list"),
        ("messages[0]", ["hello"], ""),
        ("messages[0].role", [{"role": "tools", "content": "a"}], "'system', 'developer', 'user', 'assistant' or 'tool'"),
        ("messages[0].content", [{"role": "user"}], "is missing"),
        ("messages[0].content", [{"role": "assistant", "content": None}], "is missing"),
        ("messages[0].content", [{"role": "user", "content": 5}], "valid string"),
        ("messages[0].content[0].type", [part({"type": "image", "text": ""})], "should be 'text'"),
        ("messages[0].content[1].text", [part({"type": "text", "text": "a"}, {"type": "text"})], "is missing"),
        ("temperature", -0.1, "greater than or equal to 0"),
        ("temperature", 2.1, "less than or equal to 2"),
        ("temperature", "1", "valid number"),
        ("temperature", True, "valid number"),
        ("temperature", 10**400, ""),
        ("top_p", 0, "greater than 0"),
        ("top_p", 1.01, "less than or equal to 1"),
        ("top_k", -1, "greater than or equal to 0"),
        ("top_k", 1.5, "valid integer"),
        ("top_k", True, "valid integer"),
        ("top_k", 2**31, "less than"),
        ("max_tokens", 0, "greater than or equal to 1"),
        ("max_tokens", False, "valid integer"),
        ("max_completion_tokens", -5, "greater than or equal to 1"),
        ("stop", "", "at least 1 character"),
        ("stop[1]", ["a", ""], "at least 1 character"),
        ("stop", ["a"] * 17, "at most 16 items"),
        ("stop", "x" * 513, "at most 512 characters"),
        ("stop", 7, "valid string"),
        ("seed", 2**63, "less than"),
        ("seed", -(2**63) - 1, "greater than or equal"),
        ("seed", 1.0, "valid integer"),
        ("n", 0, "greater than or equal to 1"),
        ("n", 9, "less than or equal to 8"),
        ("stream", 1, "valid boolean"),
        ("stream", "true", "valid boolean"),
        ("stream_options", True, ""),
    ],
)
def test_values_out_of_range(param, value, rule):
    error = refused(body(**{param.split("[")[0]: value}))
    assert error.param == param
    assert rule in str(error)
    assert f"'{param}' is" in str(error)


@pytest.mark.parametrize("field", ["model", "messages"])
def test_required_fields(field):
    assert str(refused(body(**{field: None}))) == f"'{field}' is missing: it is required"


def test_rules_over_two_fields():
    assert str(refused(body(stream_options={"include_usage": True}))).startswith("'stream_options' is allowed only with")
    assert "two names of one limit" in str(refused(body(max_tokens=1, max_completion_tokens=2)))


def test_a_long_value_is_shown_short():
    assert len(str(refused(body(temperature="x" * 10**5)))) < 200
    assert len(str(refused({"y" * 10**5: 1}))) < 200
    assert len(str(refused(body(max_tokens=10**4000, max_completion_tokens=1)))) < 300


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"  \n",
        b"null",
        b"5",
        b"[]",
        b'"text"',
        b"{",
        b'{"model": "m",}',
        b'{"model": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": 1e999, "model": "m", "messages": [{"role": "user", "content": "a"}]}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "\\ud800"}',
        b'{"model": "\xff"}',
        b"\xef\xbb\xbf{}",
        b"\x00",
    ],
)
def test_what_is_no_request(junk):
    refused(junk)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
_names = st.sampled_from([*ChatRequest.names(), *INERT, *UNSUPPORTED, "role", "content"])


@given(st.dictionaries(_names, _json | st.lists(st.dictionaries(_names, _json, max_size=4), max_size=3)))
def test_any_object_is_a_request_or_a_request_error(fields):
    for base in ({}, {"model": "m", "messages": HELLO}):
        with contextlib.suppress(RequestError):
            parse_chat(json.dumps({**base, **fields}).encode())


@given(st.binary())
def test_any_bytes_are_a_request_error(data):
    refused(data)


def test_bodies_are_what_the_openai_client_expects(tokenizer):
    one = Completion("r", [1, 2, 3], [4, 5], [0.0, 0.0], "yes", None, "stop", stop_reason="!", cached=2)
    two = Completion("r", [1, 2, 3], [6], [0.0], "", "hm", "length")
    answer = Answer("chatcmpl-1", parse_chat(body(stream=True, stream_options={"include_usage": True}, n=2)), tokenizer)
    whole = ChatCompletion.model_validate(answer.whole([one, two]))
    assert [c.finish_reason for c in whole.choices] == ["stop", "length"]
    assert [c.stop_reason for c in whole.choices] == ["!", None]
    assert whole.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert "reasoning" not in answer.whole([one])["choices"][0]["message"]
    message = answer.whole([two])["choices"][0]["message"]
    assert (message["content"], message["reasoning"], message["reasoning_content"]) == ("", "hm", "hm")
    said = [Chunk("r", "\u2028 text", "", None), Chunk("r", "", "why", None), Chunk("r", "", "", one)]
    events = [*answer.opening([[1, 2, 3]]), *(event for chunk in said for event in answer.chunk(0, chunk, 3))]
    assert len(events) == 4
    for event in events:
        chunk = ChatCompletionChunk.model_validate_json(event.data)
        assert event.data.isascii()
        assert len(chunk.choices) == 1
        assert chunk.id == "chatcmpl-1"
    usage, done = answer.ending([one, two])
    assert ChatCompletionChunk.model_validate_json(usage.data).choices == []
    assert done.data == "[DONE]"
