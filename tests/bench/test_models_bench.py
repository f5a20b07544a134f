"""The benchmark of architectures runs, and says what is wrong with a command line."""

import json

import pytest

from athanor.core.errors import ConfigError


@pytest.fixture
def bench(monkeypatch):
    """The module `bench/models.py`."""
    import importlib
    from pathlib import Path

    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    return importlib.import_module("models")


def test_a_family_beside_transformers(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "BATCHES", (1,))
    path = tmp_path / "found.json"
    assert bench.main(["--models", "llama", "--dtypes", "fp32", "--seconds", "0.01", "--json", str(path)]) == 0
    found = json.loads(path.read_text())["models"]["llama"]
    assert {(batch, which) for batch, passes in found.items() for which in passes} == {
        ("fp32 batch 1", which) for which in bench.PASSES
    }
    assert all(cell["ratio"] > 0 and cell["peer"] == "transformers" for passes in found.values() for cell in passes.values())
    out = capsys.readouterr().out
    assert "llama" in out and "tuned by us, as it comes for transformers" in out


def test_no_time_is_an_error(bench):
    with pytest.raises(ConfigError, match=r"--seconds \(0\) must be above 0: 2 is usual"):
        bench.arguments(["--seconds", "0"])
