"""The compiled step: what it computes, for every family that it takes, and that it is compiled once."""

import pytest
import torch

from athanor.compress.apply import compress
from athanor.core import device
from athanor.core.errors import ConfigError, MissingExtraError
from athanor.infer.compiled import Compiled, refusal
from athanor.infer.engine import BLOCK, Engine
from athanor.nn.paged import PagedCache
from athanor.types import Request, SamplingParams
from tests.infer.test_paths import COUNT, GENERATING, Letters, plain, random_model
from tests.models.reference import config_of


def build(case):
    return random_model(case[0], config_of(case))


FAMILIES = [case for case in GENERATING if not refusal(build(case))]


def answers(engine, prompts):
    requests = [Request(str(i), p, SamplingParams(temperature=0, max_tokens=COUNT)) for i, p in enumerate(prompts)]
    return engine.generate(requests)


def prompts_of(model):
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, model.config.vocab_size, (n,), generator=draw).tolist() for n in (1, 4, BLOCK, 40, 2 * BLOCK + 1)]


def same(found, expected):
    for answer, (ids, logprobs) in zip(found, expected, strict=True):
        assert list(answer.ids) == ids
        assert list(answer.logprobs) == pytest.approx(logprobs, abs=1e-5)


@pytest.mark.parametrize("case", FAMILIES, ids="-".join)
def test_it_computes_what_whole_passes_compute(case, monkeypatch):
    """The function as it stands, which is what a compiler is given."""
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    monkeypatch.setattr("athanor.infer.compiled.require_compiler", lambda *given: None)
    model = build(case)
    prompts = prompts_of(model)
    expected = [plain(model, prompt, COUNT) for prompt in prompts]
    engine = Engine(model, Letters(model.config.vocab_size), compile=True)
    same(answers(engine, prompts), expected)
    same(answers(engine, prompts), expected)  # from what is in the cache
    # One by one, and with prompts that come token by token: what comes after most of these nobody asks.
    for options in ({"max_batch": 1}, {"max_batch": 3, "step_tokens": 3}):
        other = Engine(model, Letters(model.config.vocab_size), compile=True, **options)
        same(answers(other, prompts), expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", FAMILIES, ids="-".join)
def test_a_compiler_sees_one_function_for_one_sequence_and_one_for_many(case, monkeypatch):
    """No operation of any family ends the graph, and no number of sequences or blocks makes another one."""
    graphs, real = [], torch.compile

    def look(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, fullgraph, options: real(f, fullgraph=fullgraph, backend=look))
    model = build(case)
    prompts = prompts_of(model)
    engine = Engine(model, Letters(model.config.vocab_size), compile=True)
    made = len(graphs)
    same(answers(engine, prompts), [plain(model, prompt, COUNT) for prompt in prompts])
    same(answers(engine, prompts[:2]), [plain(model, prompt, COUNT) for prompt in prompts[:2]])
    assert made == len(graphs) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # of PyTorch's own compiler
@pytest.mark.parametrize(("precision", "bits"), [("fp32", 0), ("bf16", 0), ("bf16", 8), ("bf16", 4)])
def test_compiled_on_this_machine(model, tokenizer, prompts, precision, bits):
    model = compress(model, bits) if bits else model
    plainly, compiled = (Engine(model, tokenizer, precision=precision, compile=on) for on in (False, True))
    for some in (prompts, prompts[:1]):
        expected = answers(plainly, some)
        for found, answer in zip(answers(compiled, some), expected, strict=True):
            if precision == "fp32":
                assert found.ids == answer.ids
            assert list(found.logprobs[:1]) == pytest.approx(answer.logprobs[:1], abs=1e-5 if precision == "fp32" else 0.02)


@pytest.mark.parametrize(
    ("name", "why"), [("t5", "reads a source"), ("rnn_lm", "keeps recurrent states"), ("mixtral", "sends tokens to experts")]
)
def test_families_whose_steps_are_not_compiled(name, why):
    model = build(next(case for case in GENERATING if case[0] == name))
    with pytest.raises(ConfigError, match=f"a {name} {why}, and such steps are not compiled: leave `compile` out"):
        Compiled(model, PagedCache(model.cache_layers(), 2, BLOCK, 1, torch.float32, model.device), 32, 1)


def test_without_a_compiler(model, tokenizer, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingExtraError, match=r"needs the C\+\+ compiler 'no-such-compiler'.*or generate without compiling"):
        Engine(model, tokenizer, compile=True)
    assert device.require_compiler(torch.device("cuda"), "generate") is None
