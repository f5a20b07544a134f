"""Trackers of other programs, read back with those programs; and how sinks are chosen by name."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from athanor.core import _sinks, dist
from athanor.core.errors import ConfigError, MissingExtraError
from athanor.core.track import SINKS, open_sinks

RECORDS = [
    {"step": 1, "loss": 3.5, "note": "first", "norms": {"head": 1.0, "block 0": torch.tensor(2.0)}},
    {"step": 2, "loss": np.float64(2.5), "list": [1, 2], "flag": None},
    {"step": 3, "loss": float("nan")},
]


def log(tracker, records=RECORDS):
    for record in records:
        tracker.log(record)
    tracker.close()


def test_nested_fields_become_paths():
    assert dict(_sinks.flat(RECORDS[0])) == {"step": 1, "loss": 3.5, "note": "first", "norms/head": 1.0, "norms/block 0": 2.0}
    assert dict(_sinks.flat({"a": [1, {"b": np.int64(2)}], "c": torch.tensor([1.5, 2.5])})) == {
        "a/0": 1, "a/1/b": 2, "c/0": 1.5, "c/1": 2.5,
    }  # fmt: skip


@pytest.fixture
def events():
    """`events(folder)`: what TensorBoard itself reads."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def read(folder):
        found = reader.EventAccumulator(str(folder))
        found.Reload()
        return found

    return read


def test_tensorboard_reads_what_was_logged(tmp_path, events):
    log(open_sinks(["tensorboard"], tmp_path, "sft", total=3))
    found = events(tmp_path / "logs" / "tensorboard" / "sft")
    scalars = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert np.isnan(scalars["loss"].pop()[1])
    assert scalars["loss"] == [(1, 3.5), (2, 2.5)]
    assert scalars["norms/head"] == [(1, 1.0)] and scalars["norms/block 0"] == [(1, 2.0)]
    assert scalars["list/1"] == [(2, 2.0)]
    assert found.Tensors("note/text_summary")[0].tensor_proto.string_val == [b"first"]


def test_tensorboard_hides_what_a_killed_run_logged_too_far(tmp_path, events):
    log(open_sinks(["tensorboard"], tmp_path, "sft", total=3), [{"step": s, "loss": float(s)} for s in (1, 2, 3)])
    log(open_sinks(["tensorboard"], tmp_path, "sft", total=3, start=1), [{"step": 2, "loss": 20.0}])
    found = events(tmp_path / "logs" / "tensorboard" / "sft")
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(1, 1.0), (2, 20.0)]


class Wandb:
    """Takes down what it is told."""

    Error = type("Error", (Exception,), {})

    def __init__(self, refuse=False):
        self.refuse, self.calls, self.ended = refuse, [], 0

    def init(self, **options):
        if self.refuse:
            raise self.Error("no API key")
        self.options = options
        return self

    def define_metric(self, name, **options):
        self.calls.append(("metric", name, options))

    def log(self, record, **options):
        self.calls.append((record, options))

    def finish(self):
        self.ended += 1


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_wandb_is_told_numbers_over_their_step(tmp_path, wandb):
    log(open_sinks(["wandb"], tmp_path / "first", "sft", total=3, settings={"lr": 0.1}))
    assert wandb.options["project"] == "athanor" and wandb.options["name"] == "first/sft"
    assert wandb.options["config"] == {"lr": 0.1} and wandb.options["dir"] == str(tmp_path / "first" / "logs" / "wandb")
    assert (tmp_path / "first" / "logs" / "wandb").is_dir()
    assert wandb.calls[:3] == [
        ("metric", "step", {}),
        ("metric", "*", {"step_metric": "step"}),
        ({"step": 1, "loss": 3.5, "norms/head": 1.0, "norms/block 0": 2.0}, {}),
    ]
    assert wandb.calls[3] == ({"step": 2, "loss": 2.5, "list/0": 1, "list/1": 2}, {}) and wandb.ended == 1


def test_a_stage_keeps_its_identity_at_wandb(tmp_path, wandb, monkeypatch):
    seen = []
    for run, stage in (("a", "sft"), ("a", "sft"), ("a", "grpo"), ("b", "sft")):
        open_sinks(["wandb"], tmp_path / run, stage, total=3).close()
        assert wandb.options["resume"] == "allow"
        seen.append(wandb.options["id"])
    assert seen[0] == seen[1] and len(set(seen)) == 3
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    open_sinks(["wandb"], tmp_path, "sft", total=3).close()
    assert wandb.options["project"] == "mine"


def test_a_wandb_that_does_not_begin_says_what_to_do(tmp_path, wandb):
    wandb.refuse = True
    with pytest.raises(ConfigError, match=r"sink 'wandb' did not begin \(no API key\): run `wandb login`, or set WANDB_MODE=off"):
        open_sinks(["jsonl", "wandb"], tmp_path, "sft", total=3)


def alone(script, folder, **variables):
    """What a process of its own prints: these libraries settle things at import, and write until their process ends."""
    env = os.environ | {"WANDB_PROJECT": "athanor", "TRACKIO_PROJECT": "athanor"} | variables
    command = [sys.executable, "-c", f"from pathlib import Path; from athanor.core.track import open_sinks\n{script}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOGGING = """
t = open_sinks([{0!r}], Path('first'), 'sft', total=2, settings={{'lr': 0.125}})
[t.log({{'step': s, 'loss': 3.0 - s, 'norms': {{'head': 1.0}}}}) for s in (1, 2)]; t.close()
"""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_itself_takes_it_offline(tmp_path):
    silent = {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_CACHE_DIR": str(tmp_path),
        "WANDB_CONFIG_DIR": str(tmp_path),
    }
    alone(LOGGING.format("wandb") + "import wandb; wandb.teardown()", tmp_path, **silent)
    (data,) = (tmp_path / "first" / "logs" / "wandb").rglob("*.wandb")
    assert b"norms/head" in data.read_bytes() and b"0.125" in data.read_bytes()


def test_trackio_is_told_numbers_at_their_step(tmp_path, monkeypatch):
    calls = []
    fake = SimpleNamespace(
        init=lambda **options: calls.append(options),
        log=lambda record, step: calls.append((step, record)),
        finish=lambda: calls.append("end"),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    log(open_sinks(["trackio"], tmp_path / "first", "sft", total=3, settings={"lr": 0.1}))
    assert calls[0]["project"] == "athanor" and calls[0]["name"] == "first-sft" and calls[0]["config"] == {"lr": 0.1}
    assert calls[1] == (1, {"loss": 3.5, "norms/head": 1.0, "norms/block 0": 2.0})
    assert calls[2][0] == 2 and calls[-1] == "end"
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    open_sinks(["trackio"], tmp_path, "sft", total=3)
    assert calls[-1]["project"] == "mine"


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_itself_stores_it(tmp_path):
    script = LOGGING.format("trackio") + (
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "import json; print(json.dumps(SQLiteStorage.get_logs('athanor', 'first-sft')))"
    )
    rows = json.loads(alone(script, tmp_path, TRACKIO_DIR=str(tmp_path / "db")).splitlines()[-1])
    assert [(r["step"], r["loss"], r["norms/head"]) for r in rows] == [(1, 2.0, 1.0), (2, 1.0, 1.0)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_library_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"sink '{name}' needs a library .*: pip install 'athanor-lm\[{name}\]'"):
        open_sinks(["jsonl", name], tmp_path, "sft", total=3)


def test_an_unknown_sink_is_refused_before_anything_is_opened(tmp_path):
    with pytest.raises(ConfigError, match=r"no sink .tensorbord.; did you mean .tensorboard.\? There are: console, jsonl, tens"):
        open_sinks(["jsonl", "tensorbord"], tmp_path, "sft", total=3)
    assert not list(tmp_path.iterdir())


def test_sinks_are_those_that_are_named_each_once(tmp_path, capsys):
    log(open_sinks(["jsonl", "jsonl"], tmp_path, "sft", total=3))
    assert capsys.readouterr().out == ""
    assert len((tmp_path / "logs" / "sft.jsonl").read_text().splitlines()) == 3
    log(open_sinks(["console"], tmp_path / "b", "sft", total=3))
    assert capsys.readouterr().out.startswith("sft 1/3 step") and not (tmp_path / "b").exists()
    log(open_sinks([], tmp_path / "c", "sft", total=3))
    assert not (tmp_path / "c").exists()
    log(open_sinks(["jsonl"], tmp_path, "sft", total=3, start=1), RECORDS[2:])
    assert [json.loads(line)["step"] for line in (tmp_path / "logs" / "sft.jsonl").read_text().splitlines()] == [1, 3]


def test_only_the_main_process_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dist, "rank", lambda: 1)
    log(open_sinks(SINKS, tmp_path / "run", "sft", total=3))
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""
