"""Law L5 for every objective of pre-training: what it prepares is dealt out to processes, and nothing else is learnt."""

import pytest

from athanor.train import support
from tests.train import layouts

STEPS, CLIP = 6, 0.3


@pytest.fixture
def same(crew, alone):
    """Assert that a case is one process."""

    def check(case, **more):
        options = {"arch": case.architecture, "objective": case.objective, "steps": STEPS, "clip": CLIP} | more
        layouts.compare(crew.run(case.parallel, **options), alone(**options), clip=CLIP)

    return check


@pytest.mark.parametrize("case", support.OBJECTIVE_CASES, ids=str)
def test_every_objective_is_one_process(same, case):
    same(case)


@pytest.mark.parametrize("layout", ["ddp=2", "fsdp=2"])
@pytest.mark.parametrize("pairs", ["next", "order"])
def test_figures_of_sequences_and_of_tokens_are_dealt_out_too(same, layout, pairs):
    """Segments are of tokens, whether they follow each other is of sequences."""
    same(support.Case("masked_lm", "bert", parallel=layout), options=(("pairs", pairs),))


@pytest.mark.parametrize("layout", ["ddp=2", "fsdp=2", "tp=2", "pp=2"])
def test_smoothed_targets(same, alone, layout):
    options = (("smoothing", 0.1),)
    same(support.Case(parallel=layout), options=options)
    plain = {"arch": "llama", "objective": "next_token", "steps": STEPS, "clip": CLIP}
    assert abs(alone(**plain)[0][0] - alone(**plain, options=options)[0][0]) > 1e-3


@pytest.mark.parametrize("layout", ["ddp=2", "fsdp=2"])
def test_a_process_with_nothing_to_learn_for_some_heads_takes_part(same, layout):
    same(support.Case("multi_token", "deepseek_v3", parallel=layout), batches=layouts.uneven)


def test_every_objective_that_fits_something_is_there():
    assert {case.objective for case in support.OBJECTIVE_CASES} == {
        o for a in support.values("architecture") for o in support.objectives_of(a)
    }
