"""Keys, limits, deadlines, the access log, metrics."""

from __future__ import annotations

import json
import logging
import socket

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from athanor.core.errors import MissingExtraError
from athanor.serve import guard, page
from athanor.serve.app import Options, create_app, create_server
from athanor.serve.describe import ROUTES
from athanor.serve.metrics import COUNTERS, GAUGES, HISTOGRAMS
from athanor.serve.models import Served

HELLO = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"
KEYS = ("first-key", "schlüssel")


# Keys.


@pytest.fixture(scope="module")
def locked(fake, tokenizer, running):
    with running(create_app(fake(), tokenizer, "first", api_keys=KEYS)) as served, httpx.Client(base_url=served.url) as raw:
        yield raw


@pytest.mark.parametrize("route", ROUTES, ids=lambda r: r.path)
def test_every_route_but_health_asks_for_a_key(locked, route):
    path, ask = route.path.replace("{name}", "first"), locked.post if route.body else locked.get
    if route.path == "/health":
        assert ask(path).status_code == 200
        return
    for key in ("", "Bearer", "Bearer nothing", "first-key", "Basic first-key", "Bearer first-key2", "Bearer first-ke"):
        response = ask(path, headers={"authorization": key})
        assert response.status_code == 401, key
        error = response.json()["error"]
        assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
        assert response.headers["www-authenticate"] == "Bearer"
    for key in KEYS:
        for scheme in ("Bearer", "bearer"):
            # Any answer of the route itself; without a body, posts are refused for that.
            status = ask(path, headers={"authorization": f"{scheme} {key}".encode("latin-1")}).status_code
            assert status == (415 if route.body else 200)


def test_who_has_no_key_learns_nothing(locked):
    for path in ("/nothing", "/v1/models/nothing", "/health/"):
        response = locked.get(path)
        assert response.status_code == 401
        assert "first" not in response.text
    assert locked.post("/health").status_code == 405
    assert locked.get("/docs").status_code == 401


def test_the_client_of_openai_sends_its_key(fake, tokenizer, running):
    with running(create_app(fake(), tokenizer, "first", api_keys=("none",))) as served:  # the fixture's client sends "none"
        with served.client() as client:
            assert client.chat.completions.create(model="first", messages=HELLO).choices[0].message.content == "hello"
        refused = pytest.raises(openai.AuthenticationError, match="send 'Authorization: Bearer KEY'")
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="other", max_retries=0) as client, refused:
            client.models.list()


def test_the_page_asks_for_the_key_itself(fake, tokenizer, running):
    options = Options(api_keys=KEYS, public=page.PUBLIC)
    app = create_server([Served("first", tokenizer, fake())], options)
    page.install(app)
    with running(app) as served, httpx.Client(base_url=served.url) as raw:
        assert {raw.get(path).status_code for path in page.PUBLIC} == {200}
        assert raw.get("/report").status_code == raw.get("/v1/models").status_code == 401


# Limits.


def test_headers_over_the_limit(fake, tokenizer, running):
    with running(create_app(fake(), tokenizer, "first")) as served:
        response = httpx.get(f"{served.url}/health", headers={f"x-{i}": "x" * 1000 for i in range(20)})
        assert response.status_code == 431
        assert "longer than 16,384 bytes" in response.json()["error"]["message"]
        assert httpx.get(f"{served.url}/health", headers={"x": "x" * 16000}).status_code == 200


def test_a_body_that_does_not_come(fake, tokenizer, running, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.05)
    with running(create_app(fake(), tokenizer, "first")) as served, socket.create_connection(tuple_of(served.url)) as sock:
        head = "Host: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\nConnection: close\r\n\r\n"
        sock.sendall(f"POST {CHAT} HTTP/1.1\r\n{head}{{".encode())
        answer = b"".join(iter(lambda: sock.recv(10**5), b""))
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"the body did not come within 0.05 s: send it faster" in answer


def tuple_of(url):
    host, _, port = url.removeprefix("http://").partition(":")
    return host, int(port)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_an_answer_that_takes_too_long(fake, tokenizer, running, path):
    engine = fake(lambda r: "x" * 10**7, max_len=10**8)
    what = {CHAT: {"messages": HELLO}, "/v1/completions": {"prompt": "a", "max_tokens": 10**6}, "/v1/responses": {"input": "a"}}
    with running(create_app(engine, tokenizer, "first", timeout=0.05)) as served:
        body = {"model": "first", **what[path]}
        response = httpx.post(served.url + path, json=body, timeout=60)
        assert response.status_code == 504
        error = response.json()["error"]
        assert (error["code"], error["type"]) == ("timeout", "server_error")
        assert "longer than the 0.05 s that this server gives one" in error["message"]
        streamed = httpx.post(served.url + path, json={**body, "stream": True}, timeout=60)
        assert streamed.status_code == 200
        assert "longer than the 0.05 s" in streamed.text
        assert "[DONE]" not in streamed.text
        assert httpx.get(f"{served.url}/load").json() == {"server_load": 0}
    assert len(engine.aborted) == 2


def test_a_quick_answer_meets_its_deadline(fake, tokenizer, running):
    with running(create_app(fake(), tokenizer, "first", timeout=60)) as served, served.client() as client:
        assert client.chat.completions.create(model="first", messages=HELLO).choices[0].message.content == "hello"


def test_what_needs_a_library_that_is_not_there(fake, tokenizer, running):
    engine = fake()
    engine.fail_add.append(MissingExtraError("forms of answers need llguidance: pip install 'athanor-lm[forms]'"))
    with running(create_app(engine, tokenizer, "first")) as served, served.client() as client:
        with pytest.raises(openai.InternalServerError, match="need llguidance") as error:
            client.chat.completions.create(model="first", messages=HELLO)
        assert (error.value.status_code, error.value.code) == (501, "not_installed")
        assert client.chat.completions.create(model="first", messages=HELLO).choices[0].message.content == "hello"


def test_more_answers_than_the_server_takes_are_refused_for_good(fake, tokenizer, running):
    with running(create_app(fake(), tokenizer, "first", max_queue=3)) as served, served.client() as client:
        with pytest.raises(openai.BadRequestError, match="4 answers are asked for, and this server takes 3 at once"):
            client.completions.create(model="first", prompt=["a", "b"], n=2)
        assert len(client.completions.create(model="first", prompt=["a", "b", "c"]).choices) == 3


# The access log.


def test_every_request_is_a_line_of_the_access_log(fake, tokenizer, running, caplog):
    app = create_app(fake(), tokenizer, "first", api_keys=("none",))
    with caplog.at_level(logging.INFO, "athanor.access"), running(app) as served, served.client() as client:
        client.chat.completions.create(model="first", messages=HELLO, n=2)
        list(client.completions.create(model="first", prompt="secret text", stream=True))
        httpx.get(f"{served.url}/v1/models%0A/x?key=secret")
        with pytest.raises(openai.NotFoundError) as error:
            client.models.retrieve("other")
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "athanor.access"]
    assert [(x["method"], x["path"], x["status"]) for x in lines] == [
        ("POST", CHAT, 200),
        ("POST", "/v1/completions", 200),
        ("GET", "/v1/models\n/x", 401),
        ("GET", "/v1/models/other", 404),
    ]
    assert (lines[0]["model"], lines[0]["completion_tokens"], lines[1]["completion_tokens"]) == ("first", 10, 5)
    assert lines[0]["answer"].startswith("chatcmpl-")
    assert lines[3]["request_id"] == error.value.response.headers["x-request-id"]
    assert lines[3]["bytes"] == len(error.value.response.content)
    assert all(x["client"] == "127.0.0.1" and x["seconds"] >= 0 and x["time"].endswith("+00:00") for x in lines)
    text = caplog.text
    assert "secret" not in text and "none" not in text
    assert all("\n" not in record.getMessage() for record in caplog.records)


def test_without_the_log_nothing_is_written(fake, tokenizer, running, caplog):
    with running(create_app(fake(), tokenizer, "first")) as served:
        httpx.get(f"{served.url}/health")
    assert not [record for record in caplog.records if record.name == "athanor.access"]


# Metrics.


def samples(url):
    """{(name, labels but the model and the engine): value} of one model each."""
    response = httpx.get(f"{url}/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "engine"}
            assert sample.labels["engine"] == "0"
            model = labels.pop("model_name")
            found.setdefault(model, {})[(sample.name, *labels.values())] = sample.value
    return found


def test_metrics(fake, tokenizer, running):
    engine, other = fake(), fake()
    with running(create_server([Served("a/b", tokenizer, engine), Served("c", tokenizer, other)])) as served:
        with served.client() as client:
            prompt = client.chat.completions.create(model="a/b", messages=HELLO, n=2).usage.prompt_tokens
            client.completions.create(model="a/b", prompt="a", max_tokens=3)
        found = samples(served.url)
        mine = found["a/b"]
        assert mine["athanor:request_success_total", "stop"] == 2
        assert mine["athanor:request_success_total", "length"] == 1
        assert mine["athanor:prompt_tokens_total",] == 2 * prompt + 2
        assert mine["athanor:generation_tokens_total",] == 2 * 5 + 3
        assert mine["athanor:num_requests_running",] == 0
        for name, seconds in (
            ("request_queue_time_seconds", 0.5),
            ("request_prefill_time_seconds", 1.0),
            ("request_decode_time_seconds", 2.0),
            ("time_to_first_token_seconds", 1.5),
            ("e2e_request_latency_seconds", 3.5),
        ):
            assert mine[f"athanor:{name}_count",] == 3
            assert mine[f"athanor:{name}_sum",] == pytest.approx(3 * seconds)
        assert mine["athanor:inter_token_latency_seconds_count",] == 2 * 4 + 2
        assert mine["athanor:inter_token_latency_seconds_sum",] > 0
        assert mine["athanor:iteration_tokens_total_sum",] == 2 * 5 + 3
        assert ("athanor:request_success_total", "stop") not in found["c"]


def test_all_names_of_metrics(lm, running):
    """With a real engine: those of the dashboards, under our prefix."""
    with running(create_server([Served("tiny", lm.tokenizer, lm.engine())])) as served, served.client() as client:
        for _ in range(2):
            client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, extra_body={"ignore_eos": True})
        found = samples(served.url)["tiny"]
    names = {key[0] for key in found}
    assert names >= {f"athanor:{name}" for name, *_ in GAUGES} | {f"athanor:{name}_total" for name, *_ in COUNTERS}
    assert names >= {f"athanor:{name}_count" for name, *_ in HISTOGRAMS}
    assert len(GAUGES) + len(COUNTERS) + len(HISTOGRAMS) + 1 == 16  # as many as the list of names has
    assert found["athanor:num_requests_running",] == found["athanor:num_requests_waiting",] == 0
    assert found["athanor:generation_tokens_total",] == 10
    assert found["athanor:e2e_request_latency_seconds_count",] == 2
    assert found["athanor:prefix_cache_queries_total",] > 0


def test_what_is_given_up_counts_as_aborted(fake, tokenizer, running):
    engine = fake(lambda r: "x" * 10**7, max_len=10**8)
    with running(create_app(engine, tokenizer, "first", timeout=0.05)) as served:
        httpx.post(served.url + CHAT, json={"model": "first", "messages": HELLO}, timeout=60)
        assert samples(served.url)["first"]["athanor:request_success_total", "abort"] == 1
