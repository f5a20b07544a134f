"""What a stage leaves for others to see: its records and how it stands."""

import json
import os

import pytest

from athanor.core import dist
from athanor.core.errors import ConfigError
from athanor.train.state import StateStore
from athanor.train.watch import watching


def state(run):
    return json.loads((run / "logs" / "sft.state.json").read_text())


def test_a_stage_says_how_it_stands(tmp_path, capsys):
    store = StateStore(tmp_path / "state", {})
    with watching(tmp_path, "sft", 7, store) as tracker:
        assert state(tmp_path)["state"] == "running" and state(tmp_path)["process"] == os.getpid()
        tracker.log({"step": 1, "loss": 2.0})
    assert state(tmp_path)["state"] == "finished" and state(tmp_path)["steps"] == 7
    assert (tmp_path / "logs" / "sft.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'
    assert capsys.readouterr().out.startswith("sft 1/7 step")


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (ValueError("no"), "ValueError: no"),
        (SystemExit(143), "stopped by SIGTERM; its state is saved"),
        (SystemExit(2), "SystemExit: 2"),
    ],
)
def test_a_stage_that_is_cut_off_says_why(tmp_path, error, why):
    with pytest.raises(type(error)), watching(tmp_path, "sft", 7, StateStore(tmp_path / "state", {}), sinks=()):
        raise error
    assert state(tmp_path)["state"] == "stopped" and state(tmp_path)["why"] == why


def test_sinks_are_chosen_by_name(tmp_path, capsys):
    store = StateStore(tmp_path / "state", {})
    with watching(tmp_path, "sft", 7, store, sinks=("jsonl",)) as tracker:
        tracker.log({"step": 1})
    assert capsys.readouterr().out == "" and (tmp_path / "logs" / "sft.jsonl").exists()
    with (
        pytest.raises(ConfigError, match="no sink 'consol'; did you mean 'console'"),
        watching(tmp_path, "sft", 7, store, sinks=("consol",)),
    ):
        raise AssertionError("not reached")


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "rank", lambda: 1)
    with watching(tmp_path, "sft", 7, StateStore(tmp_path / "state", {})) as tracker:
        tracker.log({"step": 1})
    assert not list(tmp_path.iterdir())
