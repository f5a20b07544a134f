"""A vocabulary with a mask and sentinels, rows of a shard as pre-training gets them, and a tiny model of any architecture."""

import json
from dataclasses import replace

import pytest
import torch

from athanor.core import plugins
from athanor.data import shards
from athanor.data.pack import Rows
from athanor.objectives._pretraining import choose
from athanor.tokenizer.bpe import Tokenizer
from athanor.types import Document

DOCUMENTS = (
    "The athanor keeps one steady heat. It burns for days, through every stage of the work.\n",
    "def heat(stage: int) -> float:\n    return stage * 1.5  # degrees\n",
    "你好，世界。天地玄黄，宇宙洪荒。",
    "Heat.",
    "12 + 30 = 42, and 7 < 9. Is it so? It is! The furnace stands, the vessel too; nothing is lost in it.\n",
    json.dumps({"work": [1, 2, 3], "heat": "steady"}),
) * 3


@pytest.fixture(scope="session")
def noisy():
    """A tokenizer with 24 sentinels; no more ids than tiny presets have."""
    return Tokenizer.train(DOCUMENTS * 2, 320, noise=24)


@pytest.fixture(scope="session")
def rows(noisy, tmp_path_factory):
    """`rows(count=8, length=48, first=0)`: a batch as pre-training gets it."""
    path = tmp_path_factory.mktemp("shard") / "train.bin"
    shards.write_tokens(noisy, [Document(text, "test") for text in DOCUMENTS], path)
    shard = shards.TokenShard(path, noisy)
    return lambda count=8, length=48, first=0: Rows(shard, length, 0).batch(first, count)


@pytest.fixture(scope="session")
def model_of():
    """`model_of(architecture, preset="tiny", seed=0, **fields)`: every weight random, in no mode of training."""

    def build(architecture, preset="tiny", seed=0, **fields):
        module = plugins.load("models", architecture)
        model = module.Model(replace(module.PRESETS[preset], **fields))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.15, generator=generator)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def chosen(noisy, model_of):
    """`chosen(objective, model, context=48, **options)`: the objective for it and our vocabulary."""
    return lambda objective, model, context=48, **options: choose(objective, model, options, noisy, context)
