"""Ragged batches of random tokens, and a fit over them that is the same every time."""

import pytest
import torch

from athanor.objectives import next_token
from athanor.optim.build import OptimConfig, build
from athanor.optim.schedules import warmup_cosine
from athanor.train.loop import fit
from athanor.types import IGNORE, Batch


def _ragged(*lengths, seed=0, vocab=320):
    """A batch of sequences of these lengths; about a third of the labels is masked."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(0, vocab, (2, sum(lengths)), generator=generator)
    labels[torch.rand(sum(lengths), generator=generator) < 0.33] = IGNORE
    labels[0] = 7  # something is supervised
    return Batch(ids, labels, torch.tensor(lengths), origin=f"ragged {seed}")


def _by_step(step):
    return [_ragged(5, 9, 3, seed=2 * step), _ragged(11, 2, seed=2 * step + 1)]


@pytest.fixture(scope="session")
def ragged():
    return _ragged


@pytest.fixture(scope="session")
def run():
    """`run(model, steps=..., optim="muon", **options of fit)`: fit with new optimisers; returns (progress, optimisers)."""

    def start(model, steps=6, optim="muon", objective=next_token.loss, batches=_by_step, **options):
        optimizers = build(model, OptimConfig(name=optim, lr=0.01))
        return fit(model, objective, batches, optimizers, warmup_cosine(10, 3, 0.1), steps=steps, **options), optimizers

    return start


@pytest.fixture(scope="session")
def crew(tmp_path_factory):
    """Four processes that run any layout, kept for all tests: starting them takes longer than a run."""
    from tests.train import layouts  # the programs that tests start import this file alone

    crew = layouts.Crew(tmp_path_factory.mktemp("crew"))
    yield crew
    crew.close()


@pytest.fixture(scope="session")
def alone():
    """What one plain process does, by its options; done once for each."""
    from tests.train import layouts

    return layouts.Alone()
