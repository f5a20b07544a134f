"""llama.cpp as a side of the benchmark of generation (how to get it: bench/inference/llamacpp.py) says what the model says."""

import platform

import pytest
import torch

from athanor.core.errors import ConfigError, MissingExtraError, VerificationError
from athanor.models import _gguf, llama
from bench.inference import llamacpp
from bench.inference.requests import Mix
from bench.training.sides import our_model

CONFIG = llama.Config(512, 64, 2, 4, 2, 128, max_positions=256)


@pytest.fixture
def installed():
    try:
        llamacpp.library()
    except MissingExtraError as error:
        pytest.skip(str(error))  # which says what is missing and how to get it


@pytest.fixture
def ours():
    return our_model(CONFIG).eval().bfloat16()


def _shortfall(model, prompt, answer):
    """How far below the best the logits of an answer's tokens are at most, as a share of the spread of logits."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
    return float((logits.amax(1) - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]).max() / logits.std())


def test_every_kind_of_file_answers_greedily_whoever_shares_the_batch(installed, ours, tmp_path, monkeypatch):
    monkeypatch.setattr(llamacpp, "SEQUENCES", 3)  # two groups
    monkeypatch.setattr(llamacpp, "BATCH", 16)  # prompts are cut
    asks = Mix(5, 1).requests(4, 24, CONFIG.vocab_size)
    with llamacpp.sides(ours, tmp_path, threads=1) as sides:
        assert sides.keys() == llamacpp.TOLERANCES.keys()
        for kind, side in sides.items():
            model, tolerance = llamacpp.rounded(ours, kind), llamacpp.TOLERANCES[kind]
            answers, seconds = side.answers(asks)
            assert seconds > 0 and [len(answer) for answer in answers] == [ask.new for ask in asks]
            for i, ask in enumerate(asks):
                assert _shortfall(model, ask.prompt, answers[i]) <= tolerance
                assert _shortfall(model, ask.prompt, answers[i - 1]) > 1  # which another prompt's answer does not pass
            assert side.single(asks[0].prompt, 8) > 0 and side.mixed(asks) > 0


@pytest.mark.parametrize("kind", llamacpp.TOLERANCES)
def test_a_file_that_computes_something_else_is_refused(installed, ours, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(_gguf, "to_neighbours", lambda name, weight, n_heads: weight)  # positions turn other pairs
    with (
        pytest.raises(VerificationError, match=r"logits of llama.cpp from a .* file differ by .* within .* for speeds to be"),
        llamacpp.sides(ours, tmp_path, threads=1),
    ):
        pass


def test_without_the_library(monkeypatch):
    monkeypatch.delenv(llamacpp.VARIABLE, raising=False)
    with pytest.raises(MissingExtraError, match=r"ATHANOR_LLAMACPP is not set, so there is no llama\.cpp: npm install"):
        llamacpp.library.__wrapped__()


def test_on_another_machine(monkeypatch, tmp_path):
    monkeypatch.setenv(llamacpp.VARIABLE, str(tmp_path))
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(MissingExtraError, match=r"on Linux on x86_64 only, and this is \w+ on riscv64: unset ATHANOR_LLAMACPP"):
        llamacpp.library.__wrapped__()


def test_a_variable_that_points_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv(llamacpp.VARIABLE, str(tmp_path))
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with pytest.raises(ConfigError, match=r"ATHANOR_LLAMACPP \('.*'\) must be a folder with @node-llama-cpp/.*: npm install"):
        llamacpp.library.__wrapped__()


def test_another_version(installed, monkeypatch):
    monkeypatch.setitem(llamacpp.DEFAULTS, llamacpp.N_CTX, 4096)
    with pytest.raises(ConfigError, match=r"ATHANOR_LLAMACPP \('.*'\) has a version of llama.cpp with other parameters: npm"):
        llamacpp.library.__wrapped__()
