"""What a load test asks for follows its laws, and its figures are what they say."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from athanor.core.errors import ConfigError
from athanor.serve.load import Load, Mix, Outcome, Result, plan, running, spread

N = 20_000


@pytest.fixture(scope="module")
def asks():
    return plan(Load(rate=5.0, requests=N), Mix(prompt=(10, 20), output=(1, 40), leave=0.25))


def test_requests_come_as_a_poisson_process(asks):
    """Its gaps are exponential (mean and deviation 1/rate, P(gap > t) = exp(-rate t)) and each is independent of the last."""
    gaps = [b.at - a.at for a, b in zip([replace(asks[0], at=0.0), *asks], asks, strict=False)]
    close = 5 / math.sqrt(N)  # five standard errors of a mean whose deviation is 1
    assert statistics.mean(gaps) * 5 == pytest.approx(1, abs=close)
    assert statistics.stdev(gaps) * 5 == pytest.approx(1, abs=2 * close)
    for t in (0.05, 0.2, 0.5):
        assert sum(gap > t for gap in gaps) / N == pytest.approx(math.exp(-5 * t), abs=close)
    assert statistics.correlation(gaps[:-1], gaps[1:]) == pytest.approx(0, abs=close)


def test_lengths_are_drawn_evenly_and_leavers_leave_in_the_middle(asks):
    for field, low, high in (("prompt", 10, 20), ("output", 1, 40)):
        values = [getattr(ask, field) for ask in asks]
        assert (min(values), max(values)) == (low, high)
        share = 1 / (high - low + 1)
        for value in range(low, high + 1):
            assert values.count(value) / N == pytest.approx(share, abs=5 * math.sqrt(share / N))
    leavers = [ask for ask in asks if ask.leave is not None]
    assert len(leavers) / N == pytest.approx(0.25, abs=0.02)
    assert all(1 <= ask.leave <= max(1, ask.output - 1) for ask in leavers)
    assert len({ask.seed for ask in asks}) > 0.99 * N


def test_the_seed_decides_all_and_every_option_something():
    load, mix = Load(), Mix()
    first = plan(load, mix)
    assert plan(load, mix) == first
    changed = [
        (replace(load, seed=1), mix),
        (replace(load, rate=5.0), mix),
        (replace(load, rate=None), mix),
        (replace(load, requests=3), mix),
        (load, replace(mix, prompt=(1, 5))),
        (load, replace(mix, output=(1, 5))),
        (load, replace(mix, leave=0.5)),
    ]
    assert all(plan(*options) != first for options in changed)
    assert {ask.at for ask in plan(replace(load, rate=None), mix)} == {0.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Load(requests=0), r"requests \(0\) must be at least 1"),
        (Load(clients=0), r"clients \(0\) must be at least 1"),
        (Load(rate=0.0), r"rate \(0.0\) must be a finite number above 0, or be left out"),
        (Load(seconds=-1.0), r"seconds \(-1.0\) must be a finite number above 0"),
        (Load(timeout=math.inf), r"timeout \(inf\) must be a finite number above 0"),
        (Mix(prompt=(0, 4)), r"mix.prompt \(0 4\) must be two numbers of tokens from 1 up, the smaller one first"),
        (Mix(output=(5, 4)), r"mix.output \(5 4\) must be two numbers of tokens"),
        (Mix(leave=1.5), r"mix.leave \(1.5\) must be a share, 0 to 1"),
        (Mix(temperature=-1.0), r"mix.temperature \(-1.0\) must be a finite number, 0 or more"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        options.check()


def test_figures_of_known_outcomes():
    outcomes = [
        Outcome(planned=0.0, sent=0.0, first=1.0, last=3.0, ended=3.0, prompt_tokens=10, tokens=5, finish="stop"),
        Outcome(planned=0.5, sent=1.0, first=1.5, last=1.5, ended=2.0, prompt_tokens=20, tokens=1, finish="length"),
        Outcome(planned=2.0, sent=2.0, first=2.5, last=3.5, ended=4.0, tokens=3, left=True),
        Outcome(planned=3.0, sent=3.0, ended=5.0, error="HTTP 429", message="later"),
        Outcome(planned=3.0, sent=3.0, ended=5.0, error="HTTP 429", message="much later"),
    ]
    figures = Result("m", outcomes, unsent=2).summary()
    assert figures["seconds"] == 5.0
    assert figures["requests"] == {"complete": 2, "left": 1, "failed": 2, "unsent": 2}
    assert figures["errors"] == {"HTTP 429": {"count": 2, "first": "later"}}
    assert figures["finish"] == {"stop": 1, "length": 1}
    assert figures["tokens"] == {"prompt": 30, "output": 9}
    assert figures["throughput"] == {
        "requests_per_second": 0.4,
        "output_tokens_per_second": 1.8,
        "prompt_tokens_per_second": 6.0,
    }
    assert figures["seconds_to_first_token"] == {
        "n": 2, "mean": 0.75, "median": 0.75, "p95": 0.975, "p99": 0.995, "max": 1.0
    }  # fmt: skip
    assert (figures["seconds_per_token"]["n"], figures["seconds_per_token"]["mean"]) == (1, 0.5)
    assert figures["seconds_to_answer"]["max"] == 3.0
    assert figures["seconds_late"]["max"] == 0.5
    assert figures["most_in_flight"] == 3


def test_figures_of_nothing():
    figures = Result("m").summary()
    assert figures["seconds_to_first_token"] is None and figures["throughput"]["requests_per_second"] is None
    assert spread([]) is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_a_spread_agrees_with_the_standard_library(values):
    found = spread(values)
    assert found["median"] == pytest.approx(statistics.median(values), abs=1e-6)
    cuts = statistics.quantiles([*values, *values] if len(values) == 1 else values, n=100, method="inclusive")
    assert (found["p95"], found["p99"]) == (pytest.approx(cuts[94], abs=1e-6), pytest.approx(cuts[98], abs=1e-6))


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), max_size=20))
def test_requests_in_flight_at_any_moment(spans):
    outcomes = [Outcome(0.0, float(begin), ended=float(begin + length)) for begin, length in spans]
    times, counts = running(outcomes)
    assert times == sorted(times)
    for moment in (i + 0.5 for i in range(45)):
        now = [count for at, count in zip(times, counts, strict=True) if at < moment]
        assert (now[-1] if now else 0) == sum(begin < moment < begin + length for begin, length in spans)
