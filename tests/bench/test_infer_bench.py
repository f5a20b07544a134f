"""The benchmark of generation runs, and says what is wrong with a command line; how fast anything is, is not asked here."""

import json

import pytest

from athanor.core.errors import ConfigError


@pytest.fixture
def bench(monkeypatch):
    """The module `bench/infer.py`."""
    import importlib
    from pathlib import Path

    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    return importlib.import_module("infer")


def test_every_part_beside_transformers(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("ATHANOR_LLAMACPP", raising=False)
    path = tmp_path / "found.json"
    small = ["--shape", "tiny", "--rounds", "1", "--requests", "4", "--range", "4", "12", "--batches", "2", "--json", str(path)]
    assert bench.main(small) == 0
    found, shown = json.loads(path.read_text()), capsys.readouterr().out
    assert found["single"]["ratio"].keys() == {"athanor bf16", "athanor int8", "athanor int4", "transformers bf16"}
    assert found["mixed"]["best"].startswith("transformers") and 0 < found["mixed"]["waste"] < 1
    assert len(found["mixed"]["ratio"]) == 3 and found["prefix"]["ratio"] > 0
    assert all(name in shown for name in (*found["single"]["ratio"], *found["mixed"]["ratio"]))


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--requests", "0"], ["--range", "9", "3"], ["--batches", "0"]])
def test_numbers_out_of_range_are_refused(bench, wrong):
    with pytest.raises(ConfigError, match="--rounds, --requests and --batches must be at least 1, and --range two numbers"):
        bench.arguments(wrong)
