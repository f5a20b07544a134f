import random
import sys
from itertools import islice

import pytest

from athanor.core.errors import MissingExtraError, PluginError
from athanor.evals import skill
from athanor.types import Message


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(MissingExtraError, match=r"skill 'reasoning_gym:never_used' needs .* pip install reasoning-gym"):
        skill.skill("reasoning_gym:never_used")


def test_the_house_lists_its_own_skills_only():
    assert not [name for name in skill.names() if ":" in name or name == "reasoning_gym"]


@pytest.fixture
def gym():
    return pytest.importorskip("reasoning_gym")


@pytest.mark.parametrize("task", ["leg_counting", "chain_sum", "gcd"])
def test_a_task_is_a_skill(gym, task):
    name = f"reasoning_gym:{task}"
    found = skill.heldout([name], 20, 0)
    assert len({e.problem.key for e in found}) == 20
    for e in found:
        question, answer = e.conversation
        assert (e.skill, e.language) == (name, "en")
        assert question.content == e.problem.key == e.problem.data["question"]
        assert answer.reasoning is None
        assert skill.score(e, answer) == 1
        assert skill.score(e, Message("assistant", "no")) < 1
    assert [e.conversation for e in found] == [e.conversation for e in skill.heldout([name], 20, 0)]


def test_the_score_is_that_of_the_data_set(gym):
    """Its metric looks at more than the reference: any valid arrangement counts."""
    data = gym.create_dataset("leg_counting", size=1, seed=0)
    (example,) = skill.heldout(["reasoning_gym:leg_counting"], 1, 0)
    for text in (example.conversation[1].content, "1", "a1"):
        assert skill.score(example, Message("assistant", text)) == data.score_answer(text, example.problem.data)


def test_tasks_of_gym_and_house_together(gym):
    found = islice(skill.examples(["add", "reasoning_gym:chain_sum"], "train", 0), 4)
    assert [e.skill for e in found] == ["add", "reasoning_gym:chain_sum"] * 2


def test_tasks_that_cannot_be_used(gym):
    with pytest.raises(PluginError, match=r"no task 'leg_count' in reasoning-gym; did you mean 'leg_counting'\?"):
        skill.skill("reasoning_gym:leg_count")
    with pytest.raises(PluginError, match="'reasoning_gym:composite' cannot be used with its default settings"):
        skill.skill("reasoning_gym:composite")
    with pytest.raises(PluginError, match="'reasoning_gym:graph_color' gives no reference answer: choose another task"):
        skill.skill("reasoning_gym:graph_color").problem(random.Random(0))
