"""Tests that need what this machine lacks are skipped, saying so; a small tokenizer and a tiny model for all rooms."""

from pathlib import Path

import pytest
from hypothesis import settings

SHARED = Path(__file__).resolve().parents[2] / "shared"
TEXT = """The athanor keeps one steady heat through every stage of the work. 12 + 30 = 42, and 7 < 9.
def heat(stage: int) -> float:\n    return stage * 1.5  # degrees\n你好，世界。 naïve café 🔥\n"""

VOCAB_SIZE = 320

settings.register_profile("athanor", deadline=None)  # a slow machine is not a failure
settings.register_profile("deep", deadline=None, max_examples=2000)  # pytest --hypothesis-profile deep
settings.load_profile("athanor")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu"):
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"no folder {SHARED}"))


@pytest.fixture
def shared():
    """The folder with real data beside the checkout."""
    return SHARED


@pytest.fixture(scope="session")
def tokenizer():
    from athanor.tokenizer.bpe import Tokenizer

    return Tokenizer.train([TEXT * 2], VOCAB_SIZE)


@pytest.fixture(scope="session")
def tiny():
    """`tiny(seed=0, **fields of llama.Config)`: a new model with two layers, every weight random, with clear preferences."""
    return tiny_of(VOCAB_SIZE)  # not what `tokenizer` says, which rooms have of their own: one fixture serves them all


def tiny_of(vocab_size):
    """What the fixture gives, for another vocabulary."""
    import torch

    from athanor.models import llama

    def build(seed=0, **fields):
        shape = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64, "max_positions": 128, "tied": False}
        model = llama.Model(llama.Config(**({"vocab_size": vocab_size} | shape | fields)))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2, generator=generator)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def lm(tokenizer, tiny):
    """The tiny model with its tokenizer, for reading only."""
    from athanor.lm import LM

    return LM(tiny(), tokenizer)
