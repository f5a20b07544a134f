"""A skill is one file that gives problems, their worked answers and a metric: examples, evaluation and reward in one.

`evals/tasks/<name>.py` defines

    def problem(rng: random.Random) -> Problem             draws one problem
    def score(problem: Problem, answer: str) -> float      optional, in [0, 1]; without it: exact match after strip

and says in the first line of its docstring what the skill is. Names of the form `reasoning_gym:<task>` reach the tasks
of the package reasoning-gym.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, Literal

from athanor.core import plugins
from athanor.core.errors import ConfigError, PluginError
from athanor.types import Message

ROOM = "evals.tasks"
GYM = "reasoning_gym:"
HELDOUT_ONE_IN = 10
# A skill that gives this many problems in a row without one that is asked for is taken to have no more of them.
PATIENCE = 20_000

Split = Literal["train", "heldout"]
Text = str | Mapping[str, str]  # the same in all languages, or language -> text


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem with a checkable answer.

    key        canonical identity: the same for every language, phrasing and rearrangement that does not change the task
    question   language -> phrasings ("en" and "zh" in the skills of the house)
    reasoning  what the assistant writes between <think> and </think>; "" for nothing
    answer     what it writes after that
    data       whatever `score` needs besides the answer
    """

    key: str
    question: Mapping[str, tuple[str, ...]]
    reasoning: Text
    answer: Text
    data: Any = None


@dataclass(frozen=True, slots=True)
class Example:
    """A problem put into one language and phrasing: the user's question and the reference answer of the assistant."""

    skill: str
    problem: Problem
    language: str
    conversation: tuple[Message, Message]


@dataclass(frozen=True, slots=True)
class Skill:
    """A skill as its file defines it; `metric` is None where exact match is meant."""

    name: str
    description: str
    problem: Callable[[random.Random], Problem]
    metric: Callable[[Problem, str], float] | None = None


def names() -> list[str]:
    """The skills that have a file, sorted."""
    return plugins.names(ROOM)


@cache
def skill(name: str) -> Skill:
    """The skill `name`.

    Raises PluginError when no file has that name or it lacks `problem` or a docstring; MissingExtraError when
    `reasoning_gym:<task>` is asked for and the package is not installed.
    """
    if name.startswith(GYM):
        from athanor.evals import reasoning_gym

        return reasoning_gym.skill(name.removeprefix(GYM))
    module = plugins.require(ROOM, name, "problem")
    if not (module.__doc__ or "").strip():
        raise PluginError(f"{module.__file__} has no docstring: describe the skill {name!r} in its first line")
    return Skill(name, str(module.__doc__).strip().splitlines()[0], module.problem, getattr(module, "score", None))


def split_of(skill: str, key: str) -> Split:
    """The side on which a problem lies for ever: one key in ten is held out, by sha256, so the sides cannot overlap."""
    digest = hashlib.sha256(f"{skill}\n{key}".encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0 else "train"


def examples(names: Sequence[str], split: Split, seed: int) -> Iterator[Example]:
    """Examples of the named skills in turn, without end; the same names, split and seed give the same ones.

    Every skill has a random stream of its own, so naming another skill does not change its examples.
    Raises ConfigError when no skill or one skill twice is named, PluginError when a skill has no problem in `split`.
    """
    streams = [_stream(skill(name), split, seed) for name in _checked(names)]
    while True:
        for stream in streams:
            yield next(stream)


def heldout(names: Sequence[str], n: int, seed: int) -> list[Example]:
    """`n` held-out examples of the named skills in turn, no problem twice; shares of the skills differ by one at most.

    A larger `n` with the same seed continues the same list. Raises ConfigError as `examples` does, and when n is less
    than the number of skills; PluginError when a skill has fewer held-out problems than its share.
    """
    skills = [skill(name) for name in _checked(names)]
    if n < len(skills):
        raise ConfigError(
            f"n ({n}) held-out problems for {len(skills)} skills leave some without any: ask for {len(skills)} or more"
        )
    share, more = divmod(n, len(skills))
    columns = [_distinct(s, share + (i < more), seed) for i, s in enumerate(skills)]
    return [column[row] for row in range(share + 1) for column in columns if row < len(column)]


def score(example: Example, message: Message) -> float:
    """How right the content of `message` is, in [0, 1]: the skill's own `score`, or exact match after strip.

    Raises PluginError when the skill's `score` leaves [0, 1].
    """
    metric = skill(example.skill).metric
    if metric is None:
        return float(message.content.strip() == example.conversation[1].content.strip())
    value = float(metric(example.problem, message.content))
    if not 0.0 <= value <= 1.0:
        raise PluginError(f"score of skill {example.skill!r} gave {value} for {message.content!r}: it must lie in [0, 1]")
    return value


def _checked(names: Sequence[str]) -> Sequence[str]:
    if not names:
        raise ConfigError("skills is empty: name at least one (athanor.evals.skill.names() lists them)")
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(f"skills names {name!r} twice: name each skill once")
    return names


def _stream(skill: Skill, split: Split, seed: int) -> Iterator[Example]:
    rng = random.Random(f"{seed}/{split}/{skill.name}")
    misses = 0
    while True:
        problem = skill.problem(rng)
        if split_of(skill.name, problem.key) != split:
            misses += 1
            if misses == PATIENCE:
                raise PluginError(
                    f"skill {skill.name!r} gave no {split} problem in {PATIENCE} draws: let its problem() draw from more keys"
                )
            continue
        misses = 0
        language = rng.choice(tuple(problem.question))
        question = Message("user", rng.choice(problem.question[language]))
        reference = Message("assistant", _in(language, problem.answer), _in(language, problem.reasoning) or None)
        yield Example(skill.name, problem, language, (question, reference))


def _distinct(skill: Skill, n: int, seed: int) -> list[Example]:
    found: dict[str, Example] = {}
    stream = _stream(skill, "heldout", seed)
    while len(found) < n:
        before = len(found)
        for example in islice(stream, PATIENCE // HELDOUT_ONE_IN):
            found.setdefault(example.problem.key, example)
            if len(found) == n:
                break
        if len(found) == before:
            raise PluginError(
                f"skill {skill.name!r} has {before} held-out problems and {n} are asked for:"
                f" ask for at most {before} per skill, or let its problem() draw from more keys"
            )
    return list(found.values())


def _in(language: str, text: Text) -> str:
    return text if isinstance(text, str) else text[language]
