"""docs/serving.md is true in both languages: routes, parameters, limits, metrics."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from athanor.serve import guard, process, sampling
from athanor.serve.completions import MAX_PROMPTS, CompletionRequest
from athanor.serve.describe import ROUTES
from athanor.serve.metrics import COUNTERS, GAUGES, HISTOGRAMS
from athanor.serve.protocol import ChatRequest

DOCS = Path(__file__).resolve().parents[2] / "docs"


def text_of(name):
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.fixture(params=["serving.md", "serving.zh-CN.md"])
def text(request):
    return text_of(request.param)


def spans(text):
    return set(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)))


def test_every_route_is_there(text):
    routes = {f"{'POST' if r.body else 'GET'} {r.path}" for r in ROUTES}
    assert {s for s in spans(text) if re.match("(GET|POST) /", s)} == routes


def test_every_shared_parameter_is_there_and_no_other(text):
    known = {*ChatRequest.names(), *CompletionRequest.names()}
    (told,) = re.findall(r"`temperature`.*?`continuous_usage_stats`", text, re.S)
    told = {s for s in spans(told) if s not in ("include_usage", "continuous_usage_stats", "extra_body")}
    both = {*ChatRequest.names()} & {*CompletionRequest.names()}
    assert told == both - {"model", "response_format", "structured_outputs"}
    assert {"response_format", "structured_outputs", "continue_final_message", "reasoning_effort", "echo"} <= spans(text) & known


def test_limits_are_those_of_the_code(text):
    numbers = set(re.findall(r"\d[\d,]*", text))
    limits = (guard.MAX_BODY >> 20, guard.MAX_HEADERS >> 10, sampling.MAX_CHOICES, sampling.MAX_STOPS, MAX_PROMPTS)
    assert {*map(str, limits), f"{process.GRACE:g}", f"{sampling.MAX_STRUCTURE:,}", str(sampling.MAX_DEPTH)} <= numbers


def test_every_metric_is_there_and_no_other(text):
    names = {f"athanor:{name}" for name, *_ in (*GAUGES, *HISTOGRAMS)} | {f"athanor:{name}_total" for name, *_ in COUNTERS}
    assert {s for s in spans(text) if s.startswith("athanor:")} - {"athanor:"} == names | {"athanor:request_success_total"}


def test_both_languages_name_the_same():
    assert spans(text_of("serving.md")) == spans(text_of("serving.zh-CN.md"))
