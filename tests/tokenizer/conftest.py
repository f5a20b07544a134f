"""A small tokenizer that has seen English, Python, Chinese, emoji, and the names of the control tokens."""

from __future__ import annotations

import inspect
import json
import textwrap

import pytest

from athanor.tokenizer.bpe import Tokenizer
from athanor.tokenizer.template import CONTROL_TOKENS

CHINESE = "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。寒来暑往，秋收冬藏。你好，世界！"


def training_texts() -> list[str]:
    sources = [inspect.getsource(module) for module in (inspect, json, textwrap)]
    return [
        *sources,
        "1234567890 1234567890\n" * 50,
        CHINESE * 5,
        "🎉👩‍👩‍👧 café naïve\n" * 5,
        "".join(CONTROL_TOKENS) * 50,
        "a b\t c\n\n\n    d\r\n" * 20,
    ]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(training_texts(), 600)
