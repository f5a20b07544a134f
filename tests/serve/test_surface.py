"""Every route with a real, tiny model and OpenAI's own client: what goes in reaches the engine, what comes out is its."""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import replace

import httpx
import numpy as np
import openai
import pytest
import torch

import athanor
from athanor.core.errors import ConfigError
from athanor.lm import LM
from athanor.models import bert
from athanor.serve.app import Options, create_server
from athanor.serve.models import Served
from athanor.tokenizer.chat import render
from athanor.types import Request, SamplingParams, Structure
from tests.test_families import byte_level, made, unigram

HELLO = [{"role": "user", "content": "The quick brown fox?"}]
PROMPT = "The quick brown"


@pytest.fixture(scope="module")
def encoder(tokenizer):
    torch.manual_seed(1)
    config = bert.Config(vocab_size=tokenizer.vocab_size, d_model=32, n_layers=1, n_heads=2, d_ff=32, max_positions=64)
    return LM(bert.Model(config).eval(), tokenizer)


@pytest.fixture(scope="module")
def engine(lm):
    return lm.engine()


@pytest.fixture(scope="module")
def served(lm, engine, encoder, running):
    vectors = Served("vectors", encoder.tokenizer, None, encoder)
    with running(create_server([Served("tiny", lm.tokenizer, engine, lm), vectors])) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    with served.client() as client:
        yield client


@pytest.fixture(scope="module")
def raw(served):
    with httpx.Client(base_url=served.url, timeout=60) as raw:
        yield raw


def chat(client, messages=HELLO, *, extra=None, **params):
    params = {"model": "tiny", "max_tokens": 12, "seed": 1, **params}
    return client.chat.completions.create(messages=messages, extra_body=extra, **params)


def complete(client, prompt=PROMPT, *, extra=None, **params):
    params = {"model": "tiny", "max_tokens": 12, "seed": 1, **params}
    return client.completions.create(prompt=prompt, extra_body=extra, **params)


def offline(lm, ids, **params):
    return lm.engine().generate([Request("offline", ids, SamplingParams(**{"max_tokens": 12, "seed": 1, **params}))])[0]


def of_chat(lm, messages=HELLO, **params):
    return offline(lm, render(lm.tokenizer, messages, generation_prompt=True).ids, **params)


def of_text(lm, text=PROMPT, **params):
    return offline(lm, lm.tokenizer.prompt(text), **params)


LETTER = 40  # some token of text

# OpenAI's parameters by name, the others in the body; and what the engine makes of them.
PARAMETERS = [
    ({"temperature": 0.3}, {}, {"temperature": 0.3}),
    ({"temperature": 0}, {}, {"temperature": 0.0}),
    ({"top_p": 0.5}, {}, {"top_p": 0.5}),
    ({"max_tokens": 3}, {}, {"max_tokens": 3}),
    ({"seed": 5}, {}, {"seed": 5}),
    ({"stop": list("etaoinshrdlu12,.")}, {}, {"stop": tuple("etaoinshrdlu12,.")}),
    ({"presence_penalty": 2}, {}, {"presence_penalty": 2.0}),
    ({"frequency_penalty": 2}, {}, {"frequency_penalty": 2.0}),
    ({"logit_bias": {str(LETTER): 100}}, {}, {"logit_bias": ((LETTER, 100.0),)}),
    ({}, {"top_k": 2}, {"top_k": 2}),
    ({}, {"min_p": 0.5}, {"min_p": 0.5}),
    ({}, {"repetition_penalty": 5}, {"repetition_penalty": 5.0}),
    ({}, {"allowed_token_ids": [LETTER, LETTER + 1]}, {"allowed_ids": (LETTER, LETTER + 1)}),
    ({}, {"bad_words": ["e", "a"]}, {"bad_words": ("e", "a")}),
    ({}, {"stop_token_ids": list(range(40, 104))}, {"stop_ids": tuple(range(40, 104))}),
    ({}, {"min_tokens": 12}, {"min_tokens": 12}),
    ({"logit_bias": {"2": 100}}, {"ignore_eos": True}, {"logit_bias": ((2, 100.0),), "ignore_eos": True}),
]


@pytest.mark.parametrize(("given", "extra", "params"), PARAMETERS, ids=lambda p: ",".join(p) or "-")
def test_every_sampling_parameter_of_chat(client, lm, given, extra, params):
    answer, expected = chat(client, extra=extra, **given), of_chat(lm, **params)
    (choice,) = answer.choices
    assert choice.message.content == expected.text
    assert getattr(choice.message, "reasoning", None) == expected.reasoning
    assert (choice.finish_reason, choice.stop_reason) == (expected.finish_reason, expected.stop_reason)
    assert answer.usage.completion_tokens == len(expected.ids)


@pytest.mark.parametrize(("given", "extra", "params"), PARAMETERS, ids=lambda p: ",".join(p) or "-")
def test_every_sampling_parameter_of_completions(client, lm, given, extra, params):
    answer, expected = complete(client, extra=extra, **given), of_text(lm, **params)
    (choice,) = answer.choices
    assert choice.text == expected.text
    assert (choice.finish_reason, choice.stop_reason) == (expected.finish_reason, expected.stop_reason)
    streamed = list(complete(client, extra=extra, **given, stream=True))
    assert "".join(c.choices[0].text for c in streamed) == choice.text
    assert [c.choices[0].finish_reason for c in streamed if c.choices[0].finish_reason] == [choice.finish_reason]


def test_the_parameters_change_something(lm):
    """Or the tests above would prove little."""
    for _, _, params in PARAMETERS:
        others = dict(list(params.items())[:-1])
        assert of_chat(lm, **params).ids != of_chat(lm, **others).ids, params


# Chat.


def test_logprobs_of_chat(client, lm):
    expected = of_chat(lm, logprobs=3)
    answer = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert [t.logprob for t in answer] == [t.logprob for t in expected.top_logprobs]
    assert [[x.logprob for x in t.top_logprobs] for t in answer] == [[p for _, p in t.top] for t in expected.top_logprobs]
    assert [t.token for t in answer] == [lm.tokenizer.token(id) for id in expected.ids]
    assert bytes(b for t in answer for b in t.bytes or ()) == b"".join(map(lm.tokenizer.token_bytes, expected.ids))
    streamed = [c.choices[0] for c in chat(client, logprobs=True, top_logprobs=3, stream=True)]
    assert [t for c in streamed if c.logprobs for t in c.logprobs.content] == answer
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert chat(client).choices[0].logprobs is None


def test_more_logprobs_than_there_are_and_the_server_goes_on(client):
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, logprobs=True, top_logprobs=21)
    assert error.value.param == "top_logprobs"
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, logprobs=21)
    assert error.value.param == "logprobs"
    chat(client, logprobs=True, top_logprobs=20)
    assert complete(client, logprobs=20).choices[0].logprobs.tokens


def test_prompt_logprobs_and_token_ids(client, lm):
    expected = of_chat(lm, prompt_logprobs=2)
    answer = chat(client, extra={"prompt_logprobs": 2, "return_token_ids": True})
    assert answer.prompt_token_ids == list(expected.prompt_ids)
    assert answer.choices[0].token_ids == list(expected.ids)
    first, *others = answer.prompt_logprobs
    assert first is None
    for told, t in zip(others, expected.prompt_logprobs[1:], strict=True):
        assert told[str(t.id)]["logprob"] == t.logprob
        assert {int(k): v["logprob"] for k, v in told.items()} == {t.id: t.logprob, **dict(t.top)}
        assert [told[str(id)]["rank"] for id, _ in t.top] == [1, 2]
        assert told[str(t.id)]["decoded_token"] == lm.tokenizer.token(t.id)
    chunks = list(chat(client, extra={"return_token_ids": True}, stream=True))
    assert chunks[0].prompt_token_ids == list(expected.prompt_ids)
    assert [id for c in chunks for id in getattr(c.choices[0], "token_ids", [])] == list(expected.ids)
    plain = chat(client)
    assert not hasattr(plain, "prompt_token_ids")
    assert not hasattr(plain, "prompt_logprobs")


def test_a_truncated_prompt_is_counted(client, lm):
    whole = of_chat(lm).prompt_ids
    answer = chat(client, extra={"truncate_prompt_tokens": 5})
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.prompt_tokens_details.truncated_tokens == len(whole) - 5
    assert answer.choices[0].message.content == offline(lm, whole[-5:]).text
    whole_usage = chat(client, extra={"truncate_prompt_tokens": 1000}).usage
    assert (whole_usage.prompt_tokens, whole_usage.prompt_tokens_details.truncated_tokens) == (len(whole), 0)
    assert not hasattr(chat(client).usage.prompt_tokens_details, "truncated_tokens")


def test_continue_final_message(client, lm):
    messages = [*HELLO, {"role": "assistant", "content": "The dog", "reasoning": "why"}]
    ids = render(lm.tokenizer, messages).ids
    assert ids[-1] == lm.tokenizer.end_id
    answer = chat(client, messages, extra={"continue_final_message": True, "return_token_ids": True})
    assert answer.prompt_token_ids == ids[:-1]
    assert answer.choices[0].message.content == offline(lm, ids[:-1]).text
    bare = chat(client, extra={"add_generation_prompt": False, "return_token_ids": True})
    assert bare.prompt_token_ids == render(lm.tokenizer, HELLO).ids


def test_an_answer_without_reasoning(client, lm):
    bias = {str(lm.tokenizer.think_id): 100}
    assert chat(client, logit_bias=bias).choices[0].message.reasoning is not None
    silent = chat(client, reasoning_effort="none", logit_bias=bias, extra={"return_token_ids": True}).choices[0]
    assert lm.tokenizer.think_id not in silent.token_ids
    assert not hasattr(silent.message, "reasoning")


def test_usage_in_every_event(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = chat(client, stream=True, stream_options=options, n=2, max_tokens=4)
    assert last.choices == []
    assert last.usage.prompt_tokens_details.cached_tokens >= 0
    for i in range(2):
        mine = [c.usage for c in chunks if c.choices[0].index == i]
        assert mine[0].completion_tokens == 0
        assert all(u.prompt_tokens_details is None for u in mine)  # what was cached is known at the end
        counts = [u.completion_tokens for u in mine]
        assert counts == sorted(counts)
        assert all(u.total_tokens == u.prompt_tokens + u.completion_tokens for u in mine)
    ends = [c.usage.completion_tokens for c in chunks if c.choices[0].finish_reason]
    assert last.usage.completion_tokens == sum(ends)
    assert all(c.usage is None for c in chat(client, stream=True))


def test_forms_of_answers_reach_the_engine(fake, tokenizer, running):
    engine = fake()
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    with running(create_server([Served("tiny", tokenizer, engine)])) as served, served.client() as client:
        chat(client, response_format=form)
        assert engine.seen[-1].params.structure == Structure("json_schema", '{"type": "object"}')
        chat(client, extra={"structured_outputs": {"choice": ["a"]}, "priority": -3})
        assert engine.seen[-1].params.structure == Structure("choice", '["a"]')
        assert engine.seen[-1].priority == -3
        complete(client, extra={"structured_outputs": {"regex": "a"}, "priority": 7})
        assert (engine.seen[-1].params.structure, engine.seen[-1].priority) == (Structure("regex", "a"), 7)


def test_cached_tokens_are_told(fake, tokenizer, running):
    engine = fake()
    engine.cached = 6
    with running(create_server([Served("tiny", tokenizer, engine)])) as served, served.client() as client:
        assert chat(client, n=2).usage.prompt_tokens_details.cached_tokens == 6
        assert complete(client, [PROMPT] * 2, n=2).usage.prompt_tokens_details.cached_tokens == 12
        answer = client.responses.create(model="tiny", input="hello")
        assert answer.usage.input_tokens_details.cached_tokens == 6


@pytest.mark.parametrize("field", ["logit_bias", "allowed_token_ids", "stop_token_ids"])
def test_ids_that_are_no_tokens(client, lm, field):
    size = lm.config.vocab_size
    value = {str(size): 1} if field == "logit_bias" else [size]
    for ask in (chat, complete):
        with pytest.raises(
            openai.BadRequestError, match=rf"'{field}' has the token id {size}, and the model's lie in \[0, {size}\)"
        ):
            ask(client, extra={field: value})


# Completions.


def test_the_four_forms_of_a_prompt(client, lm):
    ids = lm.tokenizer.prompt(PROMPT)
    text = of_text(lm).text
    assert complete(client, ids).choices[0].text == text
    both = complete(client, [PROMPT, "dog"])
    assert [c.text for c in both.choices] == [text, of_text(lm, "dog").text]
    assert [c.text for c in complete(client, [ids, ids[:2]]).choices] == [text, offline(lm, ids[:2]).text]
    four = complete(client, [PROMPT, "dog"], n=2, seed=3)
    assert [c.index for c in four.choices] == [0, 1, 2, 3]
    assert [c.text for c in four.choices] == [of_text(lm, p, seed=s).text for p in (PROMPT, "dog") for s in (3, 4)]
    prompts = len(ids) + len(lm.tokenizer.prompt("dog"))
    assert (four.usage.prompt_tokens, both.usage.prompt_tokens) == (prompts, prompts)
    texts = dict.fromkeys(range(4), "")
    for chunk in complete(client, [PROMPT, "dog"], n=2, seed=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == [c.text for c in four.choices]


def test_sixteen_tokens_are_the_default(client, lm):
    answer = client.completions.create(model="tiny", prompt=PROMPT, seed=1, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16
    full = lm.tokenizer.prompt("x" * 500)[: lm.config.max_positions - 3]
    answer = client.completions.create(model="tiny", prompt=full, seed=1, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 3
    with pytest.raises(openai.BadRequestError, match=r"max_tokens \(4\) is more than the 3 tokens that 'prompt'"):
        complete(client, full, max_tokens=4)


def test_echo(client, lm):
    expected = of_text(lm)
    assert complete(client, echo=True).choices[0].text == PROMPT + expected.text
    assert "".join(c.choices[0].text for c in complete(client, echo=True, stream=True)) == PROMPT + expected.text
    cut = complete(client, echo=True, extra={"truncate_prompt_tokens": 2}).choices[0].text
    assert cut.startswith(lm.tokenizer.decode(lm.tokenizer.prompt(PROMPT)[-2:]))
    assert not cut.startswith(PROMPT)


def test_logprobs_of_completions(client, lm):
    expected = of_text(lm, logprobs=2)
    choice = complete(client, logprobs=2).choices[0]
    told = choice.logprobs
    assert told.tokens == [lm.tokenizer.token(id) for id in expected.ids]
    assert told.token_logprobs == [t.logprob for t in expected.top_logprobs]
    for top, t in zip(told.top_logprobs, expected.top_logprobs, strict=True):
        pairs = [*t.top, (t.id, t.logprob)]
        texts = {lm.tokenizer.token(id) for id, _ in pairs}
        assert top == {text: max(p for id, p in pairs if lm.tokenizer.token(id) == text) for text in texts}
    assert told.text_offset[0] == 0
    streamed = [c.choices[0].logprobs for c in complete(client, logprobs=2, stream=True) if c.choices[0].logprobs]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [x for part in streamed for x in getattr(part, field)] == getattr(told, field)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_the_log_probability_of_a_text_as_lm_eval_asks_for_it(client, lm, max_tokens):
    """Against a forward pass over the whole text."""
    ids = lm.tokenizer.prompt("The lazy dog says 42")
    answer = complete(client, ids, max_tokens=max_tokens, temperature=0, logprobs=1, echo=True)
    told = answer.choices[0].logprobs
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    logprobs = lm.logits([ids])[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(told.token_logprobs[1 : len(ids)]), expected, atol=1e-4, rtol=0)
    greedy = [top.get(token) == max(top.values()) for token, top in zip(told.tokens[1:], told.top_logprobs[1:], strict=True)]
    assert greedy[: len(ids) - 1] == (logprobs[:-1].argmax(-1) == torch.tensor(ids[1:])).tolist()
    assert len(told.tokens) == len(ids) + max_tokens
    assert answer.usage.completion_tokens == max_tokens
    assert answer.choices[0].text.startswith("The lazy dog says 42")
    assert told.text_offset[:2] == [0, 0]  # the beginning-of-text token has no text
    assert told.text_offset == sorted(told.text_offset)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "stream": True}, "max_tokens"),
        ({"logprobs": 1, "echo": True, "stream": True}, "logprobs"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [5000]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": "long " * 200}, "prompt"),
        ({"messages": HELLO}, "messages"),
    ],
)
def test_completions_that_cannot_be(raw, fields, param):
    response = raw.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT, **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_best_of_one_and_what_changes_nothing(client, lm):
    assert complete(client, best_of=1, user="me").choices[0].text == of_text(lm).text


def test_reasoning_of_a_completion_is_not_lost(client, lm):
    bias = {str(lm.tokenizer.think_id): 100}
    choice = complete(client, logit_bias=bias).choices[0]
    streamed = [c.choices[0] for c in complete(client, logit_bias=bias, stream=True)]
    assert choice.reasoning == of_text(lm, logit_bias=((lm.tokenizer.think_id, 100.0),)).reasoning
    assert "".join(getattr(c, "reasoning", "") for c in streamed) == choice.reasoning


# Embeddings.


@pytest.mark.parametrize("model", ["tiny", "vectors"])
def test_embeddings(client, lm, encoder, model):
    texts = [f"text number {i}" for i in range(40)]  # more than are embedded at once
    source = lm if model == "tiny" else encoder
    expected = source.embed(texts)
    for encoding in ("float", "base64"):
        answer = client.embeddings.create(model=model, input=texts, encoding_format=encoding, user="me")
        rows = [e.embedding for e in answer.data]
        if encoding == "base64":
            rows = [np.frombuffer(base64.b64decode(row), "<f4").tolist() for row in rows]
        torch.testing.assert_close(torch.tensor(rows), expected, atol=1e-5, rtol=0)
    assert [e.index for e in answer.data] == list(range(40))
    tokens = sum(len(source.prompt_ids(text)) for text in texts)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens)
    one = client.embeddings.create(model=model, input="one")  # base64 on the wire, as the client likes it
    torch.testing.assert_close(torch.tensor(one.data[0].embedding), source.embed("one")[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"dimensions": 8}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": [1, 2]}, "input[0]"),
        ({"input": ["a", "b " * 200]}, "input[1]"),
        ({"input": ["a"] * 2049}, "input"),
    ],
)
def test_embeddings_that_cannot_be(raw, fields, param):
    response = raw.post("/v1/embeddings", json={"model": "vectors", "input": "a", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_a_model_that_gives_no_vectors(fake, tokenizer, running):
    app = create_server([Served("tiny", tokenizer, fake())])
    refused = pytest.raises(openai.BadRequestError, match="model 'tiny' gives no vectors: name another")
    with running(app) as served, served.client() as client, refused:
        client.embeddings.create(model="tiny", input="a")


def test_vectors_have_a_deadline(lm, running):
    app = create_server([Served("tiny", lm.tokenizer, None, lm)], Options(timeout=1e-9))
    with running(app) as served, served.client() as client:
        with pytest.raises(openai.InternalServerError, match="the vectors took longer than the 1e-09 s") as error:
            client.embeddings.create(model="tiny", input="a")
        assert error.value.status_code == 504


def test_vectors_for_a_client_that_has_left_are_not_made(tokenizer, encoder, monkeypatch):
    """As an ASGI server tells it."""
    made, sent = [], []
    monkeypatch.setattr(encoder, "embed", made.append)
    app = create_server([Served("vectors", tokenizer, None, encoder)])
    body = json.dumps({"model": "vectors", "input": ["a"] * 40}).encode()

    async def main():
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            return messages.pop() if messages else {"type": "http.disconnect"}

        async def send(message):
            sent.append(message.get("status"))

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": headers, "query_string": b""}
        async with app.router.lifespan_context(app):
            await asyncio.wait_for(app(scope, receive, send), 60)

    asyncio.run(main())
    assert (made, sent[0]) == ([], 499)


# Responses.


def test_a_response(client, lm):
    given = {"model": "tiny", "temperature": 0, "max_output_tokens": 20}
    expected = of_chat(lm, [{"role": "system", "content": "Be kind."}, *HELLO], temperature=0.0, max_tokens=20)
    whole = client.responses.create(input=HELLO[0]["content"], instructions="Be kind.", **given)
    assert whole.output_text == expected.text
    assert (whole.model, whole.object, whole.instructions, whole.max_output_tokens) == ("tiny", "response", "Be kind.", 20)
    assert whole.status == ("completed" if expected.finish_reason == "stop" else "incomplete")
    assert (whole.incomplete_details is not None) == (expected.finish_reason == "length")
    usage = (whole.usage.input_tokens, whole.usage.output_tokens, whole.usage.total_tokens)
    assert usage == (len(expected.prompt_ids), len(expected.ids), len(expected.prompt_ids) + len(expected.ids))
    parts = [{"type": "input_text", "text": "The quick "}, {"type": "input_text", "text": "brown fox?"}]
    messages = [{"role": "developer", "content": "Be kind."}, {"type": "message", "role": "user", "content": parts}]
    assert client.responses.create(input=messages, **given).output_text == expected.text
    cut = client.responses.create(model="tiny", input="hello", max_output_tokens=1)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_a_streamed_response(client):
    given = {"model": "tiny", "input": HELLO, "temperature": 0, "max_output_tokens": 20}
    whole = client.responses.create(**given)
    events = list(client.responses.create(stream=True, **given))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"]
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    (done,) = [e for e in events if e.type == "response.output_text.done"]
    assert done.text == whole.output_text
    last = events[-1]
    assert last.type == f"response.{whole.status}"
    assert last.response.output_text == whole.output_text
    assert last.response.usage == whole.usage
    assert [item.type for item in last.response.output] == [e.item.type for e in events if e.type == "response.output_item.added"]
    added = [e.item.id for e in events if e.type == "response.output_item.added"]
    assert added == [e.item.id for e in events if e.type == "response.output_item.done"]


def test_the_client_puts_a_streamed_response_together(fake, tokenizer, running):
    app = create_server([Served("tiny", tokenizer, fake())])
    with running(app) as served, served.client() as client, client.responses.stream(model="tiny", input="a") as stream:
        assert stream.get_final_response().output_text == "hello"


def test_a_streamed_response_that_fails(fake, tokenizer, running, caplog):
    engine = fake()
    engine.fail.append(RuntimeError("secret"))
    with running(create_server([Served("tiny", tokenizer, engine)])) as served, served.client() as client:
        *_, last = client.responses.create(model="tiny", input="a", stream=True)
    assert (last.type, last.code, "internal error" in last.message) == ("error", "internal_error", True)
    assert "secret" not in last.message


def test_the_reasoning_of_a_response(fake, tokenizer, running):
    class Thinker(fake):
        def step(self):
            for chunk in super().step():
                c = chunk.completion
                if c is None:
                    yield replace(chunk, content="", reasoning=chunk.content)
                else:
                    ids = [tokenizer.think_id, 50, 51, tokenizer.end_think_id, 52]
                    yield replace(chunk, completion=replace(c, ids=ids, text=c.text[-1:], reasoning=c.text[:-1]))

    with running(create_server([Served("tiny", tokenizer, Thinker(lambda r: "because!"))])) as served, served.client() as client:
        whole = client.responses.create(model="tiny", input="why?")
        assert [item.type for item in whole.output] == ["reasoning", "message"]
        assert (whole.output[0].content[0].text, whole.output_text) == ("because", "!")
        assert whole.usage.output_tokens_details.reasoning_tokens == 2
        events = list(client.responses.create(model="tiny", input="why?", stream=True))
        assert "".join(e.delta for e in events if e.type == "response.reasoning_text.delta") == "because"
        last = events[-1].response
        assert [item.type for item in last.output] == ["reasoning", "message"]
        assert (last.output[0].content[0].text, last.output_text) == ("because", "!")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"seed": 1}, "seed"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "text": ""}]}]}, "input[0].content[0].type"),
        ({"max_output_tokens": 500}, "max_output_tokens"),
        ({"input": "long " * 200}, "input"),
    ],
)
def test_responses_that_cannot_be(raw, fields, param):
    response = raw.post("/v1/responses", json={"model": "tiny", "input": "a", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_every_field_of_the_openai_client_is_known():
    from openai.types import completion_create_params, embedding_create_params
    from openai.types.responses import response_create_params

    from athanor.serve.completions import CompletionRequest
    from athanor.serve.embeddings import EmbeddingRequest
    from athanor.serve.responses import ResponseRequest

    for kind, given in (
        (CompletionRequest, completion_create_params.CompletionCreateParamsBase),
        (ResponseRequest, response_create_params.ResponseCreateParamsBase),
        (EmbeddingRequest, embedding_create_params.EmbeddingCreateParams),
    ):
        assert set(given.__annotations__) <= {*kind.names(), *kind.INERT, *kind.UNSUPPORTED}
        assert not set(kind.names()) & {*kind.INERT, *kind.UNSUPPORTED}


# Tokens and the rest.


def test_tokens_and_back(raw, lm):
    tokenizer = lm.tokenizer
    answer = raw.post("/tokenize", json={"model": "tiny", "prompt": PROMPT}).json()
    ids = tokenizer.prompt(PROMPT)
    assert answer == {"count": len(ids), "max_model_len": lm.config.max_positions, "tokens": ids}
    bare = raw.post("/tokenize", json={"prompt": PROMPT, "add_special_tokens": False, "return_token_strs": True}).json()
    assert bare["tokens"] == tokenizer.encode(PROMPT)
    assert "".join(bare["token_strs"]) == PROMPT
    assert raw.post("/detokenize", json={"model": "tiny", "tokens": ids}).json() == {"prompt": PROMPT}
    for flag in (True, False):
        asked = {"messages": HELLO, "add_generation_prompt": flag}
        assert raw.post("/tokenize", json=asked).json()["tokens"] == render(tokenizer, HELLO, generation_prompt=flag).ids
    assert (
        raw.post("/tokenize", json={"messages": HELLO}).json()["tokens"] == render(tokenizer, HELLO, generation_prompt=True).ids
    )


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/detokenize", {"tokens": [5000]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ],
)
def test_what_has_no_tokens(raw, path, body, param):
    response = raw.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_version_and_load(raw):
    assert raw.get("/version").json() == {"version": athanor.__version__}
    assert raw.get("/load").json() == {"server_load": 0}


def test_load_counts_what_is_unfinished(fake, tokenizer, running):
    engine = fake()
    engine.gate.clear()
    with running(create_server([Served("tiny", tokenizer, engine)])) as served, httpx.Client(base_url=served.url) as raw:
        body = {"model": "tiny", "messages": HELLO, "stream": True, "n": 3}
        with raw.stream("POST", "/v1/chat/completions", json=body) as held:
            assert httpx.get(f"{served.url}/load").json() == {"server_load": 3}
            engine.gate.set()
            held.read()
        assert raw.get("/load").json() == {"server_load": 0}


# Models of other kinds.


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, running):
    """A decoder and an encoder-decoder of other programs, with tokenizers of theirs."""
    folder = tmp_path_factory.mktemp("foreign")
    made(("gpt2", "tiny"), folder / "gpt2", byte_level)
    made(("t5", "tiny"), folder / "t5", unigram, eos_token_id=1, decoder_start_token_id=2)
    lms = {name: athanor.load(folder / name) for name in ("gpt2", "t5")}
    app = create_server([replace(Served.of(lm), name=name) for name, lm in lms.items()])
    with running(app) as served, served.client() as client:
        yield client, lms


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_models_of_other_programs(foreign, name):
    client, lms = foreign
    given = {"temperature": 0, "max_tokens": 8}
    expected = lms[name].complete("hello there", temperature=0.0, max_tokens=8)
    answer = client.completions.create(model=name, prompt="hello there", logprobs=1, **given)
    assert answer.choices[0].text == expected.text
    assert answer.usage.prompt_tokens == len(expected.prompt_ids)
    assert len(answer.choices[0].logprobs.tokens) == len(expected.ids)
    streamed = client.completions.create(model=name, prompt="hello there", stream=True, **given)
    assert "".join(c.choices[0].text for c in streamed) == expected.text
    with pytest.raises(openai.BadRequestError, match="a tokenizer of another program, in which our chat template has no tokens"):
        chat(client, model=name)
    vectors = client.embeddings.create(model=name, input="hello there")
    torch.testing.assert_close(torch.tensor(vectors.data[0].embedding), lms[name].embed("hello there")[0], atol=1e-5, rtol=0)


def test_a_source_may_be_as_long_as_the_context(foreign):
    client, lms = foreign
    context = lms["t5"].engine().max_len
    answer = client.completions.create(model="t5", prompt=[5] * context, max_tokens=4, extra_body={"ignore_eos": True})
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (context, 4)
    with pytest.raises(openai.BadRequestError, match=rf"'prompt' is {context + 1} tokens long, but the context has {context}"):
        client.completions.create(model="t5", prompt=[5] * (context + 1))


def test_a_prompt_without_tokens(fake, tokenizer, running, monkeypatch):
    monkeypatch.setattr(tokenizer, "prompt", tokenizer.encode)  # as of a tokenizer that puts nothing before a text
    with running(create_server([Served("tiny", tokenizer, fake())])) as served, served.client() as client:
        with pytest.raises(openai.BadRequestError, match="'prompt' has no tokens, so there is nothing to go on from") as error:
            complete(client, "")
        assert error.value.param == "prompt"


# Several models.


def test_models_by_name(client, lm, engine, encoder):
    assert [m.id for m in client.models.list()] == ["tiny", "vectors"]
    assert client.models.retrieve("vectors").max_model_len == encoder.config.max_positions
    with pytest.raises(openai.NotFoundError, match=r"'tinny'; did you mean 'tiny'\?: this server has 'tiny', 'vectors'") as error:
        chat(client, model="tinny")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    for ask in (complete, chat):
        with pytest.raises(openai.BadRequestError, match="this model generates no text") as error:
            ask(client, model="vectors")
        assert error.value.param == "model"


def test_two_engines_answer_side_by_side(fake, tokenizer, running):
    first, second = fake(lambda r: "one"), fake(lambda r: "two")
    with (
        running(create_server([Served("a/b", tokenizer, first), Served("c", tokenizer, second)])) as served,
        served.client() as client,
    ):
        assert chat(client, model="a/b").choices[0].message.content == "one"
        assert chat(client, model="c").choices[0].message.content == "two"
        assert client.models.retrieve("a/b").id == "a/b"
    assert (len(first.seen), len(second.seen)) == (1, 1)


def test_models_that_cannot_be_told_apart(fake, tokenizer):
    with pytest.raises(ConfigError, match="two models have the name 'a', by which clients choose"):
        create_server([Served("a", tokenizer, fake()), Served("a", tokenizer, fake())])
    with pytest.raises(ConfigError, match="no model is given: name a run folder"):
        create_server([])


def test_bodies_are_json_without_nan(raw):
    text = raw.post(
        "/v1/completions", json={"model": "tiny", "prompt": PROMPT, "logprobs": 20, "echo": True, "max_tokens": 5}
    ).text
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
