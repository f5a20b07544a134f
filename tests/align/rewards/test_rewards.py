import sys
from itertools import product

import pytest

from athanor.align.outcome import Outcome
from athanor.core import plugins

ROOM = "align.rewards"
OUTCOMES = [Outcome(c, w, s, t) for c, w, s, t in product((0.0, 0.3, 1.0), (False, True), (False, True), (1, 96))]


def reward(name):
    return plugins.require(ROOM, name, "reward").reward


@pytest.mark.parametrize("name", plugins.names(ROOM))
def test_rewards_lie_between_0_and_1_and_vary(name):
    values = {reward(name)(outcome) for outcome in OUTCOMES}
    assert {type(v) for v in values} == {float}
    assert min(values) == 0 < max(values) == 1


def test_answer_is_the_metric_whatever_the_form():
    assert all(reward("answer")(outcome) == outcome.correct for outcome in OUTCOMES)


def test_format_looks_at_the_form_alone():
    assert all(reward("format")(outcome) == outcome.well_formed for outcome in OUTCOMES)


def test_one_file_adds_a_reward(tmp_path, monkeypatch):
    monkeypatch.setenv("ATHANOR_PLUGINS", str(tmp_path))
    (tmp_path / "align" / "rewards").mkdir(parents=True)
    (tmp_path / "align" / "rewards" / "brief.py").write_text(
        '"""1 for at most ten tokens."""\n\n\ndef reward(outcome):\n    return float(outcome.tokens <= 10)\n'
    )
    assert plugins.names(ROOM) == ["answer", "brief", "format"]
    assert [reward("brief")(Outcome(1.0, True, True, t)) for t in (10, 11)] == [1.0, 0.0]
    del sys.modules["athanor_plugins.align.rewards.brief"]
