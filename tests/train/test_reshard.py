"""A checkpoint that any layout wrote is read under any other, on one process, and as a folder that transformers reads."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from athanor.models import io as models
from athanor.train.parallel.base import ALONE
from athanor.train.weights import whole_state
from tests.train import layouts

STEPS = 3
LAYOUTS = ("fsdp=4", "tp=2", "pp=2", "fsdp=2,tp=2", "tp=2,pp=2", "hsdp=2x2", "ddp=2", "pp=2,schedule=interleaved")


@pytest.fixture(scope="module")
def saved(crew, tmp_path_factory):
    """A folder that each layout has saved a run of three steps to, and the weights that it had."""
    known = {}

    def run(layout):
        if layout not in known:
            folder = tmp_path_factory.mktemp("saved")
            results = crew.run(layout, steps=STEPS, save=folder)
            known[layout] = folder, layouts.whole([parts for *_, parts in results])
        return known[layout]

    return run


def logits_of(results):
    return {first: logits for _, found, _ in results for first, logits in found.items()}


@pytest.mark.parametrize("writer", ["fsdp=4", "fsdp=2,tp=2", "tp=2,pp=2"])
@pytest.mark.parametrize("reader", LAYOUTS)
def test_saved_under_one_layout_and_read_under_another(crew, saved, writer, reader):
    folder, weights = saved(writer)
    step, expected, moments = layouts.reload(ALONE, folder)
    assert step == STEPS
    results = crew.run(reader, work="reload", folder=folder)
    assert all(step == STEPS for step, *_ in results)
    found = logits_of(results)
    assert found.keys() == expected.keys() == set(range(5, 13))
    for first, logits in expected.items():
        assert float((found[first] - logits).abs().max()) <= 1e-5
    mine, theirs = layouts.whole([moments]), layouts.whole([parts for *_, parts in results])
    assert mine.keys() == theirs.keys() == weights.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert any(m.abs().max() > 0 for m in mine.values())


@pytest.mark.parametrize("writer", LAYOUTS)
def test_the_whole_weights_come_out_of_any_checkpoint_and_transformers_reads_them(saved, writer, tmp_path):
    folder, weights = saved(writer)
    state = whole_state(folder)
    assert state.keys() >= weights.keys()
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())
    model = models.build("llama", layouts.config(), seed=5)
    model.load_state_dict(state)
    models.save(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    _, expected, _ = layouts.reload(ALONE, folder)
    with torch.no_grad():
        for first, logits in expected.items():
            ids = torch.arange(first, first + len(logits)).unsqueeze(0)
            assert float((theirs(ids).logits[0] - logits).abs().max()) <= 1e-5
