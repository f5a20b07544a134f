"""Tasks of the package reasoning-gym (https://github.com/open-thought/reasoning-gym) as skills.

Questions are English, there is no written reasoning, and the data set's own `score_answer` is the metric.
"""

from __future__ import annotations

import importlib
import random

from athanor.core.errors import MissingExtraError, PluginError, nearest
from athanor.evals.skill import GYM, Problem, Skill


def skill(task: str) -> Skill:
    """The skill `reasoning_gym:<task>`.

    Raises MissingExtraError when the package is not installed, PluginError when it has no such task or the task cannot
    be had with its default settings; its `problem` raises PluginError when the task gives no reference answer.
    """
    name = GYM + task
    try:
        factory = importlib.import_module("reasoning_gym.factory")
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"skill {name!r} needs the package reasoning-gym, which is not installed: pip install reasoning-gym"
        ) from error
    if task not in factory.DATASETS:
        raise PluginError(f"no task {task!r} in reasoning-gym{nearest(task, factory.DATASETS)}")
    try:
        judge = factory.create_dataset(task, size=1, seed=0)
    except (AssertionError, ValueError) as error:
        raise PluginError(f"{name!r} cannot be used with its default settings ({error}): choose another task") from error

    def problem(rng: random.Random) -> Problem:
        # A data set of one problem each time: several tasks build all of their problems, or a part of each, at once.
        entry = factory.create_dataset(task, size=1, seed=rng.getrandbits(31))[0]
        if not isinstance(entry["answer"], str):
            raise PluginError(f"{name!r} gives no reference answer: choose another task")
        return Problem(entry["question"], {"en": (entry["question"],)}, "", entry["answer"], entry)

    def score(problem: Problem, answer: str) -> float:
        return float(judge.score_answer(answer, problem.data))

    return Skill(name, f"reasoning-gym: {task.replace('_', ' ')}", problem, score)
