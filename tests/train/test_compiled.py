"""Blocks that are compiled compute what they computed, and a stack shares its graphs."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from athanor.core.errors import ConfigError, MissingExtraError
from athanor.models import llama
from athanor.nn import experts
from athanor.objectives import next_token
from athanor.train.checkpointing import checkpoint
from athanor.train.compiled import compile_blocks
from athanor.types import Batch
from tests.train.every_model import gradients, random_model

# Of torch's compiler itself: it uses what torch has deprecated, and asks every tensor for its gradient.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore:The .grad attribute")]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", [(name, "tiny") for name in ("llama", "gpt2", "bert", "mixtral", "switch")], ids="-".join)
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


def test_experts_are_left_as_they_are(monkeypatch):
    """Their rows are others in every batch: the compiler would break at each and say so at length."""
    seen, real = [], experts._places
    monkeypatch.setattr(experts, "_places", lambda *args: seen.append(torch.compiler.is_compiling()) or real(*args))
    model = random_model(("qwen3_moe", "tiny"))
    compile_blocks(model, lambda: gradients(model), backend=CompileCounter())
    assert seen and not any(seen)


def graphs(layers, lengths, how="none"):
    """How many a stack of so many blocks is compiled to, checkpointed or not, for a batch of sequences of these lengths."""
    torch._dynamo.reset()
    model, counter = llama.Model(llama.Config(320, 32, layers, 4, 2, 48)), CompileCounter()
    model.initialise(torch.Generator().manual_seed(0))
    ids = torch.arange(sum(lengths))
    batch = Batch(ids, ids, torch.tensor(lengths), origin="test")
    if how != "none":
        checkpoint(model, how)
    compile_blocks(model.train(), lambda: next_token.loss(model, batch)[0].backward(), backend=counter)
    return counter.frame_count


def test_a_stack_shares_its_graphs():
    assert graphs(2, [16, 16]) == graphs(12, [16, 16]) == 1
    assert 0 < graphs(2, [5, 9, 30]) == graphs(12, [5, 9, 30])
    assert graphs(2, [150, 150]) == 1  # attention by blocks of queries


@pytest.mark.parametrize("how", ["none", "full"])
def test_other_lengths_in_every_batch_make_no_other_graphs(how):
    """Each batch groups its sequences into other rectangles: 2 to 5 of them here."""
    lengths = [[5, 9, 30], [4, 20], [3, 7, 12, 40, 90], [6, 30, 31], [2, 50], [11, 2, 5], [1, 3, 6, 12, 24], [8, 17, 60]]
    batches = []
    for own in lengths:
        ids = torch.randint(5, 300, (sum(own),), generator=torch.Generator().manual_seed(len(batches)))
        batches.append(Batch(ids, ids.roll(-1), torch.tensor(own), origin="test"))

    def of(model, batch):
        model.zero_grad()
        total, count, _ = next_token.loss(model, batch)
        (total / count).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    model, plain, counter = random_model(("llama", "tiny")), random_model(("llama", "tiny")), CompileCounter()
    if how != "none":
        checkpoint(model, how)
    compile_blocks(model, lambda: of(model, batches[0]), backend=counter)
    of(model, batches[1])  # sizes that turn out to change are compiled as such
    frames = counter.frame_count
    assert frames > 0
    for batch in batches:
        expected = of(plain, batch)
        for name, found in of(model, batch).items():
            torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-4, msg=name)
    assert counter.frame_count == frames


def test_checkpointed_blocks_are_compiled_inside():
    model, counter = random_model(("llama", "tiny")), CompileCounter()
    checkpoint(model, "full")
    compile_blocks(model, lambda: gradients(model), backend=counter)
    assert counter.frame_count > 0
    assert graphs(2, [16, 16], "full") == 1
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
