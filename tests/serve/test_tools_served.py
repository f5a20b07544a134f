"""Calls of tools through HTTP, with OpenAI's own client and a real engine."""

import json

import openai
import pytest

from athanor.infer.engine import Engine
from athanor.serve.app import create_server
from athanor.serve.models import Served

pytest.importorskip("llguidance")
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bonn", "Rom"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
HELLO = [{"role": "user", "content": "How is it?"}]


@pytest.fixture(scope="module")
def client(tokenizer, tiny, running):
    """Of a random model that holds the description of tools."""
    engine = Engine(tiny(max_positions=1024), tokenizer)
    with running(create_server([Served("tiny", tokenizer, engine)])) as served, served.client() as client:
        yield client


def ask(client, **more):
    given = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "seed": 1, "reasoning_effort": "none"}
    return client.chat.completions.create(model="tiny", messages=HELLO, **given | more)


def test_a_call_that_is_demanded_comes_whole_and_in_pieces(client):
    choice = ask(client).choices[0]
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content, call.function.name) == ("tool_calls", None, "weather")
    assert json.loads(call.function.arguments)["city"] in ("Bonn", "Rom")
    name, arguments, reasons = "", "", []
    for chunk in ask(client, stream=True):
        for piece in chunk.choices[0].delta.tool_calls or ():
            name += piece.function.name or ""
            arguments += piece.function.arguments or ""
        reasons.append(chunk.choices[0].finish_reason)
    assert (name, arguments) == ("weather", call.function.arguments)
    assert [r for r in reasons if r] == ["tool_calls"]


def test_the_named_tool_is_called(client):
    for name in ("clock", "weather"):
        chosen = {"type": "function", "function": {"name": name}}
        choice = ask(client, tools=[WEATHER, CLOCK], tool_choice=chosen, parallel_tool_calls=None).choices[0]
        assert [call.function.name for call in choice.message.tool_calls] == [name]


def test_what_a_tool_answered_is_read(client):
    call = ask(client).choices[0].message
    back = [
        *HELLO,
        call.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "<|end|> warm"},
    ]
    spent = client.chat.completions.create(model="tiny", messages=back, tools=[WEATHER], max_tokens=1).usage
    alone = client.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER], max_tokens=1).usage
    assert spent.prompt_tokens > alone.prompt_tokens
    none = client.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER], tool_choice="none", max_tokens=1).usage
    assert none.prompt_tokens < alone.prompt_tokens  # the model does not even read of them


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [], "tool_choice": "required", "parallel_tool_calls": None}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "wether"}}}, "tool_choice.function.name"),
        ({"response_format": {"type": "json_object"}}, "tools"),
        ({"extra_body": {"min_tokens": 3}}, "min_tokens"),
    ],
)
def test_what_does_not_go_together_is_refused(client, more, param):
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, **more)
    assert error.value.body["param"] == param


def test_a_message_without_content_or_calls_is_refused(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=[{"role": "assistant"}])
    assert error.value.body["param"] == "messages[0].content"
