"""The examples are understood: every file by its command, every command on both pages; and models of these shapes fit."""

import random
import re
import shlex
from pathlib import Path

import pytest

from athanor import cli
from athanor.core.config import load_table
from athanor.core.plugins import load
from athanor.models import io as models

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FILES = sorted(EXAMPLES.glob("*.toml"))
PAGES = [EXAMPLES / "README.md", EXAMPLES / "README.zh-CN.md"]


def commands(page):
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [line for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines() if line.startswith("athanor")]


def test_both_pages_show_the_same_commands_and_files():
    assert commands(PAGES[0]) == commands(PAGES[1])
    assert len(commands(PAGES[0])) > 10
    for page in PAGES:
        assert {name for name in re.findall(r"examples/([\w-]+\.toml)", page.read_text("utf-8"))} == {f.name for f in FILES}


@pytest.mark.parametrize("line", sorted(set(commands(PAGES[0]))), ids=lambda line: line.replace("/", "|"))
def test_commands_are_understood(line, capsys, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    assert cli.main([*shlex.split(line)[1:], "--print-config"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("file", [f for f in FILES if "source" not in load_table(f)], ids=lambda file: file.stem)
def test_recipes_of_text_take_a_step(file, tmp_path, capsys):
    run, words = str(tmp_path / "run"), re.findall(r"\w+", PAGES[0].read_text("utf-8"))
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for seed, text in enumerate(texts):
        draw = random.Random(seed)
        text.write_text("".join(" ".join(draw.choices(words, k=20)) + "\n" for _ in range(1500)), "utf-8")
    noise = {"bert": "1", "t5": "100"}.get(file.stem, "0")
    for command in (
        ("corpus", run, "--text", str(texts[0]), "--heldout", str(texts[1])),
        ("tokenizer", run, "--vocab-size", "700", "--skills", "0", "--noise", noise),
        ("pretrain", run, "--config", str(file), "--steps", "1", "--batch-tokens", "1024", "--sinks", "jsonl"),
    ):
        assert cli.main(list(command)) == 0, capsys.readouterr().err


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_models_of_these_shapes_can_be_built(file):
    table = load_table(file)
    if "source" in table:
        shape = load("models", table["arch"]).Config(table["vocab_size"], **table["shape"])
    else:
        shape = models.shape(table["arch"], table["shape"] | {"vocab_size": 8000})
        assert getattr(shape, "max_positions", 10**9) >= table["context"]
    assert 3e6 < models.build(table["arch"], shape).n_parameters() < 12e6
