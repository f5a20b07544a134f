"""bench/muon.py: schedules, turns and the point where a curve reaches a value; how fast anything is, is not asked here."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from athanor.core.errors import ConfigError

SCRIPT = Path(__file__).parents[2] / "bench" / "muon.py"


@pytest.fixture(scope="module")
def bench():
    """The script; it is no installed module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield importlib.import_module("muon")
    del sys.modules["muon"]


def test_the_schedule_rises_and_falls(bench):
    values = [bench.factor(i / 100) for i in range(101)]
    assert values[:6] == sorted(values[:6]) and values[5] == pytest.approx(1.0)
    assert values[5:] == sorted(values[5:], reverse=True)
    assert values[0] == values[100] == pytest.approx(0.05)
    assert bench.factor(1.3) == values[100]


def test_where_a_curve_reaches_a_value(bench):
    curve = [(10.0, 1, 3.0), (20.0, 2, 2.0), (30.0, 3, 1.5)]
    assert bench.reached(curve, 2.5) == pytest.approx(15.0)
    assert bench.reached(curve, 1.5) == pytest.approx(30.0)
    assert bench.reached(curve, 3.5) == 10.0
    assert bench.reached(curve, 1.0) is None


class Told:
    """A contender whose turns are noted, each of a second."""

    def __init__(self, name, budget, log):
        self.name, self.budget, self.log, self.left = name, budget, log, budget

    @property
    def done(self):
        return self.left <= 0

    def turn(self, seconds):
        self.log.append((self.name, seconds))
        self.left -= 1


def test_turns_alternate_and_fit_the_budgets(bench):
    log = []
    bench.compete([Told("a", 4, log), Told("b", 2, log)])
    assert [name for name, _ in log] == ["a", "b", "b", "a", "a", "a"]
    assert {name: seconds for name, seconds in log} == {"a": bench.TURN, "b": bench.TURN / 2}


def test_a_budget_of_nothing_is_refused(bench, capsys):
    with pytest.raises(ConfigError, match=re.escape("--seconds (0) must be above 0: 180 is usual")):
        bench.arguments(["--seconds", "0"])
    assert bench.main(["--seconds", "-1"]) == 1
    assert "bench/muon.py: --seconds (-1) must be above 0" in capsys.readouterr().err


@pytest.mark.slow
def test_from_end_to_end(bench, tmp_path, capsys):
    small = ["--shape", "32", "2", "2", "1", "64", "--batch-tokens", "512", "--context", "64", "--sample", "200000"]
    out = tmp_path / "muon.json"
    assert (
        bench.main(
            [
                "--seconds",
                "1",
                "--rates",
                "1e-3",
                "1e-2",
                "--muon-rates",
                "1e-3",
                *small,
                "--work",
                str(tmp_path / "run"),
                "--json",
                str(out),
            ]
        )
        == 0
    )
    found, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert found["sweep"]["adamw"].keys() == {"0.001", "0.01"} and not found["sweep"]["muon"]
    assert [c["budget"] for c in found["contenders"].values()] == [1.0, 1.0, 0.75]
    for name, c in found["contenders"].items():
        seconds = [s for s, _, _ in c["curve"]]
        assert seconds == sorted(seconds) and seconds[-1] >= c["budget"], name
        assert name in shown
    assert f"{found['target']:.4f}" in shown
