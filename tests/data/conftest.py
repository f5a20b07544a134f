"""Text to build corpora from, and a small tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from athanor.tokenizer.bpe import Tokenizer


def _prose(size: int, seed: int = 0) -> str:
    """`size` characters of paragraphs, no two alike."""
    chance = random.Random(seed)
    words = ["athanor", "keeps", "one", "steady", "heat", "through", "every", "stage", "of", "the", "work", "你好", "世界"]
    text = ""
    while len(text) < size:
        lines = (" ".join(chance.choices(words, k=9)) for _ in range(4))
        text += "\n".join(lines) + f"\n{chance.random()}\n\n"
    return text[: size - 1] + "."


@pytest.fixture(scope="session")
def prose() -> Callable[..., str]:
    """`prose(size, seed=0)`, see `_prose`."""
    return _prose


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of 40 files of 8 KiB and one in a folder below."""
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(_prose(8192, seed=i), encoding="utf-8")
    (folder / "below" / "code.py").write_text("# -*- coding: latin-1 -*-\nname = 'café'\n", encoding="latin-1")
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([_prose(20_000)], 400)
