"""Tools: requests are strict, forced calls are calls, and an answer says the same whole and streamed."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage
from openai.types.chat.chat_completion_chunk import ChoiceDelta

from athanor.core.errors import RequestError
from athanor.infer import constrained
from athanor.infer.engine import Chunk
from athanor.serve.body import Strict, read
from athanor.serve.tools import MAX_CALLS, AssistantCall, NamedChoice, Offer, Said, ToolChoice, ToolSpec
from athanor.tokenizer.bpe import Tokenizer
from athanor.tokenizer.chat import messages_from, render
from athanor.tokenizer.stream import StreamDecoder
from athanor.tokenizer.template import ARGUMENTS, CALL, CONTROL_TOKENS, TOOL_DEFINITION
from athanor.types import Completion, Message, Tool, ToolCall


class Asked(Strict):
    tools: list[ToolSpec] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    tool_calls: list[AssistantCall] | None = None


WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "What the weather is",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Bonn", "北京"]}, "days": {"type": "integer", "minimum": 1, "maximum": 3}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CLOCK: dict[str, Any] = {"name": "clock"}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def offer(*functions: dict[str, Any], **fields: Any) -> Offer:
    tools = [{"type": "function", "function": function} for function in functions]
    asked = read(json.dumps({"tools": tools or None, **fields}).encode(), Asked)
    return Offer.of(asked.tools, asked.tool_choice, asked.parallel_tool_calls)


# --- requests


def test_what_a_request_offers() -> None:
    weather = Tool("weather", "What the weather is", json.dumps(WEATHER["parameters"], ensure_ascii=False))
    clock = Tool("clock")
    assert offer(WEATHER, CLOCK) == Offer((weather, clock)) == offer(WEATHER, CLOCK, tool_choice="auto", parallel_tool_calls=True)
    assert offer(WEATHER, {**CLOCK, "strict": True}) == Offer((weather, clock), frozenset({"clock"}))
    assert offer(WEATHER, CLOCK, tool_choice="required") == Offer((weather, clock), forced=("weather", "clock"))
    assert offer(WEATHER, CLOCK, tool_choice=named("clock")) == Offer((weather, clock), forced=("clock",), parallel=False)
    assert offer(WEATHER, parallel_tool_calls=False) == Offer((weather,), parallel=False)
    assert offer(WEATHER, tool_choice="none") == offer() == offer(tool_choice="auto") == Offer()


@pytest.mark.parametrize(
    ("functions", "fields", "param", "message"),
    [
        ([], {"tool_choice": "required"}, "tool_choice", "asks for a call without 'tools': add some or leave it out"),
        ([], {"tool_choice": named("f")}, "tool_choice", "asks for a call without 'tools'"),
        ([], {"parallel_tool_calls": False}, "parallel_tool_calls", "'parallel_tool_calls' is allowed only with 'tools'"),
        (
            [CLOCK],
            {"tool_choice": named("clok")},
            "tool_choice.function.name",
            "names 'clok', which is none of .* mean 'clock'.: name",
        ),
        ([CLOCK], {"tool_choice": "any"}, "tool_choice", "'tool_choice' is 'any': input should be 'none', 'auto' or 'required'"),
        ([CLOCK], {"tool_choice": {"type": "x"}}, "tool_choice.type", "'tool_choice.type' is 'x'"),
        ([CLOCK], {"tool_choice": 1}, "tool_choice", "'tool_choice' is 1"),
        ([CLOCK, CLOCK], {}, "tools", "tools has 2 tools called 'clock': give each its own name"),
        ([{"name": "a b"}], {}, "tools[0].function.name", r"'tools\[0\].function.name' is 'a b': string should match pattern"),
        ([{"name": "<|user|>"}], {}, "tools[0].function.name", "string should match pattern"),
        ([{"name": "f", "parametres": {}}], {}, "tools[0].function.parametres", "unknown field .*; did you mean 'parameters'"),
        ([{"name": "f", "parameters": []}], {}, "tools[0].function.parameters", "valid dictionary"),
        ([{"name": "f", "strict": 1}], {}, "tools[0].function.strict", "valid boolean"),
        (
            [{"name": "f", "parameters": {"type": "string"}}],
            {},
            "tools",
            r"parameters is a schema of type 'string'",
        ),
        (
            [{"name": "f", "parameters": {"a": json.loads("[" * 40 + "]" * 40)}}],
            {},
            "tools",
            r"tools\[0\].function.parameters nests deeper than 32 levels, the most this server reads: flatten it",
        ),
    ],
)
def test_bad_requests_are_named(functions: Any, fields: Any, param: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        offer(*functions, **fields)
    assert caught.value.param == param


def test_other_kinds_of_tools_are_refused() -> None:
    with pytest.raises(RequestError, match=r"'tools\[0\].type' is 'custom'"):
        read(b'{"tools": [{"type": "custom", "function": {"name": "f"}}]}', Asked)


def test_calls_that_are_sent_back() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{"}}
    asked = read(json.dumps({"tool_calls": [{**call, "index": 0}]}).encode(), Asked)
    assert asked.tool_calls is not None
    message = {"role": "assistant", "content": None, "tool_calls": [c.plain() for c in asked.tool_calls]}
    (parsed,) = messages_from([message])
    assert parsed == Message("assistant", "", None, (ToolCall("", "clock", "{"),)) and parsed.tool_calls[0].id == "call_1"
    with pytest.raises(RequestError, match=r"'tool_calls\[0\].function.arguments' is missing"):
        read(b'{"tool_calls": [{"id": "1", "function": {"name": "f"}}]}', Asked)


def test_the_model_reads_of_the_tools(tokenizer: Tokenizer) -> None:
    user, system = {"role": "user", "content": "U"}, {"role": "system", "content": "S"}
    tools = [{"type": "function", "function": WEATHER}, {"type": "function", "function": CLOCK}]
    for given_, expected in (
        ([user], [{"role": "system", "content": "", "tools": tools}, user]),
        ([system, user], [{**system, "tools": tools}, user]),
        ([user, system], [{"role": "system", "content": "", "tools": tools}, user, system]),
    ):
        told = offer(WEATHER, CLOCK).told(given_)
        assert render(tokenizer, told).ids == render(tokenizer, expected).ids
        assert offer(WEATHER, tool_choice="none").told(given_) == offer().told(given_) == given_


# --- forms


def _follow(tokenizer: Tokenizer, made: Offer, seed: int) -> Completion:
    """An answer of random logits that keeps to the form, with a fondness for its end that grows."""
    structure = made.structure()
    assert structure is not None
    form = constrained.Constraint(constrained.compile(structure, tokenizer, tokenizer.vocab_size), {tokenizer.end_id})
    generator, ids = torch.Generator().manual_seed(seed), list[int]()
    while not ids or ids[-1] != tokenizer.end_id:
        logits = torch.randn(tokenizer.vocab_size, generator=generator)
        logits[[tokenizer.end_id, tokenizer.control[CALL]]] += 1.5
        logits[[tokenizer.end_id, *tokenizer.encode('"'), *tokenizer.encode("}")]] += len(ids) / 100
        ids.append(int(logits.masked_fill(~form.allowed(), -torch.inf).argmax()))
        form.advance(ids[-1])
        assert len(ids) < 2000
    return _completion(ids)


def _completion(ids: list[int], reason: Any = "stop", **more: Any) -> Completion:
    return Completion("r", [1], ids, [0.0] * len(ids), "", None, reason, **more)


@settings(max_examples=40)
@given(
    choice=st.sampled_from(["auto", "required", named("weather"), named("clock")]),
    strict=st.booleans(),
    parallel=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_answers_keep_to_their_form(tokenizer: Tokenizer, choice: Any, strict: bool, parallel: bool, seed: int) -> None:
    made = offer({**WEATHER, "strict": strict}, CLOCK, tool_choice=choice, parallel_tool_calls=parallel)
    if choice == "auto" and parallel and not strict:
        assert made.structure() is None
        return
    said = made.read(tokenizer, _follow(tokenizer, made, seed))
    for call in said.calls:
        arguments = json.loads(call["function"]["arguments"])
        if choice != "auto" or (strict and call["function"]["name"] == "weather"):
            parameters = WEATHER["parameters"] if call["function"]["name"] == "weather" else {"maxProperties": 0}
            jsonschema.validate(arguments, parameters)
            assert call["function"]["arguments"] == json.dumps(arguments, ensure_ascii=False)
        assert isinstance(arguments, dict)
    names = [call["function"]["name"] for call in said.calls]
    if choice != "auto":
        assert said.content == "" and said.calls
        assert isinstance(choice, str) or names == [choice["function"]["name"]]
    assert len(names) <= (MAX_CALLS if parallel and isinstance(choice, str) else 1)
    assert said.finish_reason == ("tool_calls" if names else "stop")


def test_forms_allow_what_they_should(tokenizer: Tokenizer) -> None:
    both = [_follow(tokenizer, offer(WEATHER, CLOCK, tool_choice="required"), seed) for seed in range(30)]
    said = [offer(WEATHER, CLOCK).read(tokenizer, answer) for answer in both]
    assert {call["function"]["name"] for s in said for call in s.calls} == {"weather", "clock"}
    assert max(len(s.calls) for s in said) > 1
    free = offer(CLOCK, parallel_tool_calls=False)
    mixed = [free.read(tokenizer, _follow(tokenizer, free, seed)) for seed in range(30)]
    assert {len(s.calls) for s in mixed} == {0, 1} and any(s.content for s in mixed)


def test_parameters_that_cannot_be_kept_to_are_named(tokenizer: Tokenizer) -> None:
    function = {"name": "f", "parameters": {"not": {}, "x-guidance": {"lenient": True}}}
    for made in (offer({**function, "strict": True}), offer(function, tool_choice="required")):
        structure = made.structure()
        assert structure is not None
        with pytest.raises(
            RequestError, match=r'the form that tools asks for cannot be followed: .*Unimplemented keys: \["not"\]'
        ) as e:
            constrained.compile(structure, tokenizer, tokenizer.vocab_size)
        assert e.value.param == "tools"
    assert offer(function).structure() is None


# --- answers


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """`text` with its control tokens between « and » as tokens, the rest as text."""
    ids = list[int]()
    for piece in re.split("(«.*?»)", text):
        short = {"call": CALL, "args": ARGUMENTS}
        ids += [tokenizer.control[short.get(piece[1:-1], piece[1:-1])]] if piece.startswith("«") else tokenizer.encode(piece)
    return ids


def _stream(made: Offer, tokenizer: Tokenizer, done: Completion, every: int = 1, stop: Any = ()) -> tuple[Said, list[Any]]:
    """What all chunks together say, and the pieces of calls."""
    reader = made.reader(tokenizer, stop)
    cuts = [*range(0, len(done.ids), every), len(done.ids)]
    chunks = [Chunk("r", "", "", None, tuple(done.ids[a:b])) for a, b in pairwise(cuts)]
    last = chunks.pop() if chunks else Chunk("r", "", "", None)
    news = [reader.read(chunk) for chunk in chunks] + [reader.read(Chunk("r", "", "", done, last.ids))]
    assert [n.finish_reason for n in news[:-1]] == [None] * (len(news) - 1)
    deltas, calls = [delta for n in news for delta in n.calls], list[Any]()
    for delta in deltas:
        if delta["index"] == len(calls):
            assert delta["function"]["arguments"] == "" and delta["function"]["name"]
            calls.append(json.loads(json.dumps({k: v for k, v in delta.items() if k != "index"})))
        else:
            assert delta["index"] == len(calls) - 1 and delta.keys() == {"index", "function"}
            assert delta["function"].keys() == {"arguments"} and delta["function"]["arguments"]
            calls[-1]["function"]["arguments"] += delta["function"]["arguments"]
    content, reasoning = ("".join(getattr(n, name) for n in news) for name in ("content", "reasoning"))
    assert news[-1].finish_reason is not None
    return Said(content, reasoning or None, calls, news[-1].finish_reason), deltas


ANSWERS: dict[str, tuple[str, str, list[tuple[str, str]], str]] = {
    "only text": ("Hello.«<|end|>»", "Hello.", [], "stop"),
    "one call": ('«call»weather«args»{"city": "Bonn"}«<|end|>»', "", [("weather", '{"city": "Bonn"}')], "tool_calls"),
    "text and call": ("Let me see.\n«call»clock«args»{}«<|end|>»", "Let me see.\n", [("clock", "{}")], "tool_calls"),
    "two calls": (
        "«call»clock«args»{}«call»weather«args» \n{}«<|end|>»",
        "",
        [("clock", "{}"), ("weather", " \n{}")],
        "tool_calls",
    ),
    "thought": ("«<think>»clock?«</think>»«call»clock«args»{}«<|end|>»", "", [("clock", "{}")], "tool_calls"),
    "invalid arguments": ('«call»clock«args»{"a": oops«<|end|>»', "", [("clock", '{"a": oops')], "tool_calls"),
    "letters that are cut": ('«call»clock«args»{"ü": "🔥"}«<|end|>»', "", [("clock", '{"ü": "🔥"}')], "tool_calls"),
    "unknown tool": ("So: «call»rm«args»{}«<|end|>»", "So: rm{}", [], "stop"),
    "unknown, then known": ("«call»rm«args»{}«call»clock«args»{}«<|end|>»", "rm{}", [("clock", "{}")], "tool_calls"),
    "known, then unknown": ("«call»clock«args»{}«call»rm«args»{}«<|end|>»", "rm{}", [("clock", "{}")], "tool_calls"),
    "no arguments": ("«call»clock«<|end|>»", "clock", [], "stop"),
    "empty arguments": ("«call»clock«args»«<|end|>»", "clock", [], "stop"),
    "blank arguments": ("«call»clock«args» \n«<|end|>»", "clock \n", [], "stop"),
    "a list": ("«call»clock«args» [1]«<|end|>»", "clock [1]", [], "stop"),
    "no name": ("«call»«args»{}«<|end|>»", "{}", [], "stop"),
    "nothing": ("«<|end|>»", "", [], "stop"),
    "arguments alone": ("a«args»{}«<|end|>»", "a{}", [], "stop"),
    "names of tokens": (f"{CALL}clock{ARGUMENTS}{{}}<|end|>«<|end|>»", f"{CALL}clock{ARGUMENTS}{{}}<|end|>", [], "stop"),
    "names of tokens within": (
        f'«call»clock«args»{{"a": "{CALL}weather{ARGUMENTS}{{}}<|end|>"}}«<|end|>»',
        "",
        [("clock", f'{{"a": "{CALL}weather{ARGUMENTS}{{}}<|end|>"}}')],
        "tool_calls",
    ),
    "JSON that looks like a call": (
        '{"name": "clock", "arguments": {}}«<|end|>»',
        '{"name": "clock", "arguments": {}}',
        [],
        "stop",
    ),
}


@pytest.mark.parametrize("every", [1, 3, 1000])
@pytest.mark.parametrize("name", ANSWERS)
def test_answers_whole_and_streamed(tokenizer: Tokenizer, name: str, every: int) -> None:
    text, content, calls, reason = ANSWERS[name]
    made, done = offer(WEATHER, CLOCK), _completion(_ids(tokenizer, text))
    said = made.read(tokenizer, done)
    assert (said.content, said.finish_reason) == (content, reason)
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in said.calls] == calls
    assert len({call["id"] for call in said.calls}) == len(calls)
    assert _stream(made, tokenizer, done, every)[0] == said
    # Without tools on offer nothing is a call.
    assert offer().read(tokenizer, done).calls == [] == offer(CLOCK, tool_choice="none").read(tokenizer, done).calls


def test_arguments_come_in_pieces(tokenizer: Tokenizer) -> None:
    done = _completion(_ids(tokenizer, '«call»weather«args»{"city": "Bonn"}«<|end|>»'))
    deltas = _stream(offer(WEATHER), tokenizer, done)[1]
    assert deltas[0]["function"] == {"name": "weather", "arguments": ""} and len(deltas) > 5
    assert "".join(d["function"]["arguments"] for d in deltas) == '{"city": "Bonn"}'


@pytest.mark.parametrize("every", [1, 2, 50])
def test_an_answer_that_is_cut_short(tokenizer: Tokenizer, every: int) -> None:
    made, ids = offer(WEATHER, CLOCK), _ids(tokenizer, '«call»weather«args»{"ci')
    said = made.read(tokenizer, _completion(ids, "length"))
    assert said.finish_reason == "length" and said.calls[0]["function"] == {"name": "weather", "arguments": '{"ci'}
    assert _stream(made, tokenizer, _completion(ids, "length"), every)[0] == said
    half = made.read(tokenizer, _completion(ids[:3], "length"))
    assert (half.calls, half.finish_reason) == ([], "length") and "weather".startswith(half.content)
    # The token of stop_ids that ended an answer is no part of it.
    stopped = _completion([*ids, tokenizer.encode("x")[0]], "stop", stop_reason=tokenizer.encode("x")[0])
    assert made.read(tokenizer, stopped).calls[0]["function"]["arguments"] == '{"ci'
    assert _stream(made, tokenizer, stopped, every)[0].calls[0]["function"]["arguments"] == '{"ci'


def test_stop_texts_cut_the_text_and_not_the_calls(tokenizer: Tokenizer) -> None:
    made, done = offer(CLOCK), _completion(_ids(tokenizer, "a STOP b«call»clock«args»{STOP}"))
    said = made.read(tokenizer, done, ("STOP",))
    assert said.content == "a " and said.calls[0]["function"]["arguments"] == "{STOP}"
    assert _stream(made, tokenizer, done, 1, ("STOP",))[0] == said


def test_a_stop_text_cuts_no_thought_that_comes_after_it(tokenizer: Tokenizer) -> None:
    # The engine takes the unknown tool for a call and goes on; the reader knows it to be text, which ends at "}".
    made, done = offer(CLOCK), _completion(_ids(tokenizer, "«call»}x«args»«<think>»so?«</think>»«call»clock«args»{}"))
    said = made.read(tokenizer, done, ("}",))
    assert (said.content, said.reasoning, len(said.calls)) == ("", "so?", 1)
    assert _stream(made, tokenizer, done, 1, ("}",))[0] == said


_PIECES = st.sampled_from(
    [
        *(f"«{name}»" for name in ("call", "args", "<think>", "</think>", "<|user|>", "<|end|>")),
        *("«call»clock«args»", "«call»weather", "clock", "weather", "{", "}", '{"a": "ü"}', " ", "\n", "STOP", "ST", "🔥"),
        *CONTROL_TOKENS,
    ]
)


@settings(max_examples=300)
@given(pieces=st.lists(_PIECES, max_size=12), bytes_=st.lists(st.integers(16, 271), max_size=4), data=st.data())
def test_any_answer_says_the_same_whole_and_streamed(
    tokenizer: Tokenizer, pieces: list[str], bytes_: list[int], data: st.DataObject
) -> None:
    ids = [id for piece in pieces for id in _ids(tokenizer, piece)]
    at = data.draw(st.integers(0, len(ids)))
    ids = [*ids[:at], *bytes_, *ids[at:]]
    stop = data.draw(st.sampled_from([(), ("STOP",), ("}", "kw"), ("\n",)]))
    decoder = StreamDecoder(tokenizer, stop)
    for n, id in enumerate(ids, 1):
        decoder.push(id)
        if decoder.stopped_by is not None:  # the engine goes no further
            ids = ids[:n]
            break
    made, done = offer(WEATHER, CLOCK), _completion(ids)
    said = made.read(tokenizer, done, stop)
    streamed = _stream(made, tokenizer, done, data.draw(st.integers(1, 9)), stop)[0]
    assert streamed == said or (said.reasoning == "" and streamed == Said(said.content, None, said.calls, said.finish_reason))


@given(text=st.lists(st.sampled_from([*CONTROL_TOKENS, "clock", "{}", " "])).map("".join))
def test_no_text_changes_what_is_a_call(tokenizer: Tokenizer, text: str) -> None:
    made = offer(WEATHER, CLOCK)
    said = made.read(tokenizer, _completion(tokenizer.encode(text)))
    assert said == Said(text, None, [], "stop")
    call = {"id": text, "function": {"name": "clock", "arguments": text}}
    conversation = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": text, "tool_calls": [call]},
        {"role": "tool", "content": text, "tool_call_id": text},
    ]
    t = tokenizer
    control = [id for id in render(t, made.told(conversation), generation_prompt=True).ids if id < 16]
    assert control == [
        *(t.bos_id, t.system_id, t.control[TOOL_DEFINITION], t.control[TOOL_DEFINITION], t.end_id, t.user_id, t.end_id),
        *(t.assistant_id, t.control[CALL], t.control[ARGUMENTS], t.end_id, t.control["<|tool|>"], t.end_id, t.assistant_id),
    ]


def test_bodies_are_what_the_openai_client_expects(tokenizer: Tokenizer) -> None:
    made, done = offer(CLOCK), _completion(_ids(tokenizer, "«call»clock«args»{}«call»clock«args»{}«<|end|>»"))
    said = made.read(tokenizer, done)
    message = ChatCompletionMessage.model_validate({"role": "assistant", "content": None, "tool_calls": said.calls}, strict=True)
    assert message.tool_calls is not None and [call.type for call in message.tool_calls] == ["function", "function"]
    for delta in _stream(made, tokenizer, done)[1]:
        parsed = ChoiceDelta.model_validate({"tool_calls": [delta]}, strict=True)
        assert parsed.tool_calls is not None and parsed.tool_calls[0].index == delta["index"]


def test_a_call_of_an_answer_can_be_sent_back(tokenizer: Tokenizer) -> None:
    ids = _ids(tokenizer, 'So.«call»weather«args»{"city": "Bonn"}«call»clock«args»{}«<|end|>»')
    said = offer(WEATHER, CLOCK).read(tokenizer, _completion(ids))
    asked = read(json.dumps({"tool_calls": list(said.calls)}).encode(), Asked)
    assert asked.tool_calls is not None
    message = {"role": "assistant", "content": said.content, "tool_calls": [call.plain() for call in asked.tool_calls]}
    assert render(tokenizer, [message]).ids[2:] == ids


def test_a_named_choice_is_one_function() -> None:
    asked = read(json.dumps({"tool_choice": named("clock")}).encode(), Asked)
    assert isinstance(asked.tool_choice, NamedChoice) and asked.tool_choice.function.name == "clock"
