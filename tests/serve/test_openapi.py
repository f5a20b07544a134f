"""The OpenAPI description: it is valid, it has every route, and requests generated from it find no failure.

`pytest -m slow` generates many; by default there are a few for each route.
"""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from starlette.routing import Route as Path

from athanor.serve.app import Options, create_server
from athanor.serve.body import Strict
from athanor.serve.describe import ROUTES, description
from athanor.serve.models import Served

HELLO = [{"role": "user", "content": "hello"}]
# What a generated body asks for may be more than the context holds: a refusal of valid bodies is no failure here.
LEFT_OUT = {"positive_data_acceptance"}


@pytest.fixture(scope="module")
def served(lm, running):
    app = create_server([Served("tiny", lm.tokenizer, lm.engine(), lm)], Options(default_max_tokens=8, timeout=60))
    with running(app) as served:
        yield served


def validator(name, schema):
    return Draft202012Validator({**schema["components"]["schemas"][name], "components": schema["components"]})


def test_every_route_is_described(served):
    described = {
        (method.upper(), path)
        for path, operations in httpx.get(f"{served.url}/openapi.json").json()["paths"].items()
        for method in operations
    }
    routes = {(m, r.path.replace(":path", "")) for r in served.app.routes if isinstance(r, Path) for m in r.methods}
    assert described == routes


@pytest.mark.parametrize("keys", [True, False])
def test_keys_are_described(keys):
    paths = description(["a"], keys=keys)["paths"]
    asks = {
        path for path, operations in paths.items() for o in operations.values() if "security" in o and "401" in o["responses"]
    }
    assert asks == ({r.path for r in ROUTES} - {"/health"} if keys else set())


BODIES = [
    ("ChatRequest", {"model": "tiny", "messages": HELLO}, True),
    ("ChatRequest", {"model": "tiny", "messages": HELLO, "temperature": None, "user": 5, "logit_bias": {"1": 2}}, True),
    ("ChatRequest", {"model": "tiny", "messages": HELLO, "tools": [], "stop": ["a"], "response_format": {"type": "text"}}, True),
    ("ChatRequest", {"model": "other", "messages": HELLO}, False),
    ("ChatRequest", {"model": "tiny", "messages": []}, False),
    ("ChatRequest", {"model": "tiny", "messages": HELLO, "temprature": 1}, False),
    ("ChatRequest", {"model": "tiny", "messages": HELLO, "temperature": 3}, False),
    ("ChatRequest", {"model": "tiny", "messages": HELLO, "tools": [1]}, False),
    ("ChatRequest", {"model": "tiny", "messages": HELLO, "logit_bias": {"a": 2}}, False),
    ("ChatRequest", {"model": "tiny", "messages": [{"role": "user", "content": "a", "name": "B"}]}, False),
    ("CompletionRequest", {"model": "tiny", "prompt": [[1], [2]]}, True),
    ("CompletionRequest", {"model": "tiny", "prompt": {}}, False),
    ("EmbeddingRequest", {"model": "tiny", "input": "a", "dimensions": 3}, False),
    ("TokenizeRequest", {"model": None, "prompt": "a"}, True),
]
WHERE = {r.body.__name__: r.path for r in ROUTES if r.body}


@pytest.mark.parametrize(("name", "body", "good"), BODIES)
def test_the_description_says_what_the_server_does(served, name, body, good):
    schema = httpx.get(f"{served.url}/openapi.json").json()
    assert validator(name, schema).is_valid(body) == good
    assert (httpx.post(served.url + WHERE[name], json=body).status_code == 200) == good


def test_answers_are_as_described(served):
    schema = httpx.get(f"{served.url}/openapi.json").json()
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            body = {"/v1/completions": {"prompt": "a", "logprobs": 2, "echo": True}, "/detokenize": {"tokens": [20]}}.get(
                path, {"input": "a"} if path in ("/v1/responses", "/v1/embeddings") else {"messages": HELLO}
            )
            asked = {"json": {"model": "tiny", **body}} if method == "post" else {}
            response = httpx.request(method, served.url + path.replace("{name}", "tiny"), **asked)
            assert response.status_code == 200, response.text
            content = operation["responses"]["200"]["content"]
            if "application/json" in content:
                told = {**content["application/json"]["schema"], "components": schema["components"]}
                Draft202012Validator(told).validate(response.json())


def test_a_model_of_ours_is_no_more_than_it_says():
    """Every unsupported or inert field that a body names stands in its description."""

    def kinds(cls):
        return [cls, *(k for sub in cls.__subclasses__() for k in kinds(sub))]

    described = description(["a"], keys=False)["components"]["schemas"]
    for kind in kinds(Strict):
        if kind.__module__.startswith("athanor.serve") and kind.__name__ in described:
            fields = described[kind.__name__]["properties"]
            assert set(fields) == {*kind.names(), *kind.UNSUPPORTED, *kind.INERT}


def generated(served, examples):
    """Call every operation with generated requests, good and bad, under all checks but those left out; how many there were."""
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    count = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in GenerationMode if operation.body else (GenerationMode.POSITIVE,):

            @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case):
                nonlocal count
                count += 1
                case.call_and_validate(checks=[f for f in CHECKS.get_all() if f.__name__ not in LEFT_OUT], timeout=60)

            check()
    return count


def test_a_few_generated_requests(served):
    assert generated(served, 5) > 60
    names = {check.__name__ for check in CHECKS.get_all()}  # what the description is checked for
    assert names >= {"not_a_server_error", "status_code_conformance", "response_schema_conformance", "negative_data_rejection"}


@pytest.mark.slow
def test_many_generated_requests(served):
    assert generated(served, 900) > 10_000  # three minutes
    assert httpx.get(f"{served.url}/load").json() == {"server_load": 0}
