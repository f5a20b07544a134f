import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from athanor.core.errors import DataError
from athanor.evals.scores import summarise, wilson

Z = 1.959963984540054


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_intervals_of_newcombe(successes, n, low, high):
    """Newcombe 1998, Two-sided confidence intervals for the single proportion, table I, method 3."""
    score = wilson(successes, n)
    assert (round(score.low, 4), round(score.high, 4)) == (low, high)
    assert (score.value, score.n) == (successes / n, n)


@given(st.integers(1, 5000), st.floats(0, 1))
def test_the_bounds_are_where_the_score_test_stops_rejecting(n, share):
    """Both ends solve (p - x)^2 = z^2 x (1 - x) / n, the definition of Wilson's interval."""
    score = wilson(share * n, n)
    assert 0 <= score.low <= score.value <= score.high <= 1
    for x in (score.low, score.high):
        assert (score.value - x) ** 2 == pytest.approx(Z**2 * x * (1 - x) / n, abs=1e-9)


@given(st.integers(1, 500), st.data())
def test_failures_mirror_successes(n, data):
    k = data.draw(st.integers(0, n))
    score, mirror = wilson(k, n), wilson(n - k, n)
    assert score.low == pytest.approx(1 - mirror.high, abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5), (float("nan"), 5)])
def test_what_is_no_share(successes, n):
    with pytest.raises(DataError, match=f"{successes} successes of {n} trials is no share"):
        wilson(successes, n)


@dataclass
class Judged:
    skill: str
    language: str
    correct: float
    well_formed: bool = True
    stopped: bool = True


def test_a_summary_overall_per_skill_and_per_language():
    results = [
        Judged("b", "zh", 1.0),
        Judged("a", "en", 0.0, well_formed=False, stopped=False),
        Judged("a", "zh", 1.0, well_formed=False),
        Judged("a", "en", 0.5),
    ]
    summary = summarise(results)
    assert summary["accuracy"]["value"] == 0.625
    assert summary["accuracy"]["n"] == 4
    assert (summary["format_rate"], summary["stop_rate"]) == (0.5, 0.75)
    assert {k: (v["value"], v["n"]) for k, v in summary["skills"].items()} == {"a": (0.5, 3), "b": (1.0, 1)}
    assert {k: (v["value"], v["n"]) for k, v in summary["languages"].items()} == {"en": (0.25, 2), "zh": (1.0, 2)}
    assert summary["skills"]["b"]["low"] == wilson(1, 1).low
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_nothing_to_summarise():
    with pytest.raises(DataError, match="0 successes of 0 trials is no share"):
        summarise([])
