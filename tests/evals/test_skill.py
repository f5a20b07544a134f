import random
import sys
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from athanor.core import plugins
from athanor.core.errors import ConfigError, PluginError
from athanor.evals import skill
from athanor.evals.skill import examples, heldout, score, split_of
from athanor.types import Message

DOUBLE = '''"""Double a number."""
from athanor.evals.skill import Problem


def problem(rng):
    n = rng.randrange(5000)
    return Problem(str(n), {"en": (f"Twice {n}?",), "zh": (f"{n}的两倍？",)}, "", {"en": str(2 * n), "zh": f"是{2 * n}"})
'''


@pytest.fixture
def write(tmp_path, monkeypatch):
    """`write(name, text)` adds a skill for one test."""
    monkeypatch.setattr(plugins, "_folders", [])
    monkeypatch.delenv("ATHANOR_PLUGINS", raising=False)
    plugins.add_folder(tmp_path)
    folder = tmp_path / "evals" / "tasks"
    folder.mkdir(parents=True)
    skill.skill.cache_clear()
    yield lambda name, text: (folder / f"{name}.py").write_text(text)
    skill.skill.cache_clear()
    for name in [n for n in sys.modules if n.startswith("athanor_plugins.")]:
        del sys.modules[name]


def texts(found):
    return [(e.skill, e.language, e.conversation) for e in found]


def test_the_same_names_split_and_seed_give_the_same_examples():
    def take(seed, split="train"):
        return texts(islice(examples(["add", "reverse"], split, seed), 200))

    assert take(7) == take(7)
    assert take(7) != take(8)
    assert take(7) != take(7, "heldout")


def test_skills_come_in_turn_each_with_a_stream_of_its_own():
    both = list(islice(examples(["add", "clock"], "train", 0), 100))
    assert [e.skill for e in both] == ["add", "clock"] * 50
    assert texts(both[1::2]) == texts(islice(examples(["clock"], "train", 0), 50))


def test_examples_are_conversations_in_all_languages_and_phrasings():
    found = list(islice(examples(["add"], "train", 0), 600))
    assert {tuple(m.role for m in e.conversation) for e in found} == {("user", "assistant")}
    assert all(e.conversation[0].content in e.problem.question[e.language] for e in found)
    assert all(e.conversation[0].reasoning is None for e in found)
    places = Counter((e.language, e.problem.question[e.language].index(e.conversation[0].content)) for e in found)
    assert len(places) == 6
    assert min(places.values()) > 60


def test_reasoning_and_answer_of_one_language_and_none_for_no_reasoning(write):
    write("double", DOUBLE)
    for e in islice(examples(["double"], "train", 0), 50):
        assert e.conversation[1].reasoning is None
        assert e.conversation[1].content == e.problem.answer[e.language]


@given(st.text(), st.text())
def test_a_key_lies_on_one_side(name, key):
    assert split_of(name, key) in ("train", "heldout")
    assert split_of(name, key) == split_of(name, key)


def test_the_sides_of_a_problem_never_change():
    """Pinned: another rule would let problems that models were trained on into the held-out ones."""
    assert [k for k in range(60) if split_of("add", str(k)) == "heldout"] == [7, 10, 22, 31, 41, 42, 43, 51]


def test_one_key_in_ten_is_held_out():
    assert sum(split_of("x", str(k)) == "heldout" for k in range(20_000)) == pytest.approx(2000, abs=150)


def test_heldout_shares_are_equal_and_no_problem_comes_twice():
    found = heldout(["add", "clock", "reverse"], 100, 0)
    assert Counter(e.skill for e in found) == {"add": 34, "clock": 33, "reverse": 33}
    assert len({(e.skill, e.problem.key) for e in found}) == 100
    assert all(split_of(e.skill, e.problem.key) == "heldout" for e in found)


def test_a_longer_heldout_list_continues_the_shorter():
    assert texts(heldout(["add", "clock"], 90, 3))[:37] == texts(heldout(["add", "clock"], 37, 3))
    assert texts(heldout(["add"], 30, 3)) != texts(heldout(["add"], 30, 4))


def test_a_whole_heldout_side_can_be_had():
    every = {key for a in range(10, 100) for b in range(a, 100) if split_of("add", key := f"{a}+{b}") == "heldout"}
    assert {e.problem.key for e in heldout(["add"], len(every), 0)} == every
    with pytest.raises(
        PluginError, match=f"'add' has {len(every)} held-out problems and {len(every) + 1} are asked for: .* at most {len(every)}"
    ):
        heldout(["add"], len(every) + 1, 0)


def test_a_skill_without_problems_on_a_side(write):
    write("one", DOUBLE.replace("rng.randrange(5000)", "1"))
    side = split_of("one", "1")
    other = "heldout" if side == "train" else "train"
    assert next(examples(["one"], side, 0)).problem.key == "1"
    with pytest.raises(PluginError, match=f"'one' gave no {other} problem in 20000 draws: let its problem"):
        next(examples(["one"], other, 0))


def test_names_that_cannot_be_used():
    with pytest.raises(ConfigError, match="skills is empty: name at least one"):
        next(examples([], "train", 0))
    with pytest.raises(ConfigError, match="names 'add' twice: name each skill once"):
        heldout(["add", "clock", "add"], 10, 0)
    with pytest.raises(ConfigError, match=r"n \(1\) held-out problems for 2 skills .* ask for 2 or more"):
        heldout(["add", "clock"], 1, 0)
    with pytest.raises(PluginError, match=r"no 'substract' in 'evals.tasks'; did you mean 'subtract'\?"):
        skill.skill("substract")


def test_score_is_exact_match_after_strip():
    (example,) = heldout(["add"], 1, 0)
    answer = example.conversation[1].content
    assert score(example, Message("assistant", f" {answer}\n")) == 1
    for wrong in ("", answer + "0", f"{answer} {answer}", "x"):
        assert score(example, Message("assistant", wrong, reasoning=answer)) == 0


def test_one_file_adds_a_skill(write):
    assert "double" not in skill.names()
    write("double", DOUBLE)
    assert "double" in skill.names()
    assert skill.skill("double").description == "Double a number."
    assert {e.skill for e in islice(examples(["add", "double"], "train", 0), 10)} == {"add", "double"}
    found = heldout(["double"], 200, 0)
    assert len({e.problem.key for e in found}) == 200
    assert all(score(e, e.conversation[1]) == 1 for e in found)


def test_a_skill_found_through_the_environment(tmp_path, monkeypatch, write):
    folder = tmp_path / "elsewhere" / "evals" / "tasks"
    folder.mkdir(parents=True)
    (folder / "double.py").write_text(DOUBLE)
    monkeypatch.setenv("ATHANOR_PLUGINS", str(tmp_path / "elsewhere"))
    assert "double" in skill.names()
    assert heldout(["double"], 3, 0)[0].skill == "double"


def test_a_skill_with_a_metric_of_its_own(write):
    write(
        "close",
        DOUBLE + "\n\ndef score(problem, answer):\n    return 0.5 * (answer != '') + 0.5 * (answer == problem.answer['en'])\n",
    )
    (example,) = heldout(["close"], 1, 0)
    right = example.problem.answer["en"]
    assert [score(example, Message("assistant", text)) for text in (right, "x", "")] == [1, 0.5, 0]


@pytest.mark.parametrize("value", ["1.5", "-0.1", "float('nan')"])
def test_a_metric_must_stay_between_0_and_1(write, value):
    write("loud", DOUBLE + f"\n\ndef score(problem, answer):\n    return {value}\n")
    (example,) = heldout(["loud"], 1, 0)
    with pytest.raises(PluginError, match=r"score of skill 'loud' gave .* for 'x': it must lie in \[0, 1\]"):
        score(example, Message("assistant", "x"))


def test_a_file_that_is_no_skill(write):
    write("empty", '"""Nothing."""\n')
    write("mute", DOUBLE.partition("\n")[2])
    with pytest.raises(PluginError, match=r"must define problem to be a plugin of 'evals.tasks'"):
        skill.skill("empty")
    with pytest.raises(PluginError, match=r"mute.py has no docstring: describe the skill 'mute' in its first line"):
        skill.skill("mute")


def test_every_skill_says_what_it_is():
    for name in skill.names():
        assert skill.skill(name).description.endswith(".")


def test_problems_come_from_the_generator_given():
    """A skill that drew from a hidden source would not be repeatable."""
    for name in skill.names():
        random.seed(1)
        before = random.getstate()
        skill.skill(name).problem(random.Random(5))
        assert random.getstate() == before
