"""Blocks that are compiled compute what they computed, and a stack shares its graphs."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from athanor.core.errors import ConfigError, MissingExtraError
from athanor.models import llama
from athanor.train.checkpointing import checkpoint
from athanor.train.compiled import compile_blocks
from tests.train.every_model import gradients, random_model

# Of torch's compiler itself: it uses what torch has deprecated, and says which caches it looks through.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", [("llama", "tiny"), ("gpt2", "tiny"), ("bert", "tiny")], ids="-".join)
def test_blocks_run_compiled_with_the_same_results(case):
    model = random_model(case)
    names = list(model.state_dict())
    counter = CompileCounter()
    ran = []
    seconds = compile_blocks(model, lambda: ran.append(gradients(model)), backend=counter)
    assert seconds > 0
    assert counter.frame_count > 0
    assert list(model.state_dict()) == names
    expected = gradients(random_model(case))
    for found in (ran[0], gradients(model)):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_a_stack_shares_one_graph():
    model = llama.Model(llama.Config(320, 32, 12, 4, 2, 48))
    model.initialise(torch.Generator().manual_seed(0))
    counter = CompileCounter()
    compile_blocks(model.train(), lambda: gradients(model), backend=counter)
    assert counter.frame_count == 1


def test_checkpointed_blocks_are_compiled_inside():
    model, counter = random_model(("llama", "tiny")), CompileCounter()
    checkpoint(model, "full")
    compile_blocks(model, lambda: gradients(model), backend=counter)
    assert counter.frame_count == 1
    found, expected = gradients(model), gradients(random_model(("llama", "tiny")))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_what_does_not_go_with_checkpointing_is_refused():
    model = random_model(("llama", "tiny"))
    checkpoint(model, "selective")
    with pytest.raises(ConfigError, match="selective checkpointing looks at the operations of a block one by one"):
        compile_blocks(model, lambda: None)
    model = random_model(("llama", "tiny"))
    compile_blocks(model, lambda: None, backend=CompileCounter())
    with pytest.raises(ConfigError, match="the blocks of this model are compiled already: checkpoint them first, then compile"):
        checkpoint(model, "full")


def test_a_missing_compiler_is_named(monkeypatch):
    model = random_model(("llama", "tiny"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingExtraError, match=r"compiling on a CPU needs the C\+\+ compiler 'no-such-compiler', which is not"):
        compile_blocks(model, lambda: None)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ConfigError, match="has no blocks"):
        compile_blocks(torch.nn.Linear(2, 2), lambda: None)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_inductor_computes_the_same():
    model = random_model(("llama", "tiny"))
    compile_blocks(model, lambda: gradients(model))
    found, expected = gradients(model), gradients(random_model(("llama", "tiny")))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)
