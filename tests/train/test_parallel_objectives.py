"""Law L5 for every objective of pre-training: what it prepares is dealt out to processes, and nothing else is learnt."""

import pytest

from athanor.train import support
from tests.train import layouts
from tests.train.test_parallel import alone, compare  # noqa: F401  # a fixture

FIELDS = {"deepseek_v3": (), "transformer": ()}
OPTIONS = {"masked_lm": (("pairs", "next"),)}


@pytest.fixture(scope="module")
def crew(tmp_path_factory):
    crew = layouts.Crew(tmp_path_factory.mktemp("crew"), size=2)
    yield crew
    crew.close()


def same(crew, alone, case, **more):
    options = {"arch": case.architecture, "objective": case.objective, "steps": 6, "clip": 0.3} | more
    compare(crew.run(case.parallel, **options), alone(**options), clip=0.3)


@pytest.mark.parametrize("case", support.OBJECTIVE_CASES, ids=str)
def test_every_objective_is_one_process(crew, alone, case):  # noqa: F811
    same(crew, alone, case)
