"""Runs as they lie on disk: what is found, how stages stand, what is read, and what is said of damage."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from athanor.core import io, stage
from athanor.core.errors import CheckpointError
from athanor.report import runs
from athanor.report.runs import StageLog, differences, find, read, stages

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(name, stage, records, **state)`: a run below tmp_path/runs with the log of one stage, and its state file if any."""

    def build(name: str, of: str = "sft", records: Any = ({"step": 1, "loss": 2.0},), **state: Any) -> Path:
        run = tmp_path / "runs" / name
        stage.open_run(run)
        (run / "logs").mkdir(exist_ok=True)
        (run / "logs" / f"{of}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        if state:
            io.write_json(run / "logs" / f"{of}.state.json", state)
        return run

    return build


def test_runs_are_found_at_and_below_folders(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, deep = make("first"), make("long/four")
    stage.open_run(first / "inside")  # of a run; not a run to be listed
    assert find([tmp_path / "runs"]) == {"first": first, "long/four": deep}
    assert find([first]) == {"first": first}
    monkeypatch.chdir(tmp_path)
    assert list(find([Path("first"), Path("long/four")])) == ["first", "long/four"]
    assert list(find([Path("long")])) == ["four"]
    monkeypatch.chdir(first)
    assert find([Path()]) == {"first": Path()}


def test_two_runs_of_one_name_are_both_there(make: Make, tmp_path: Path) -> None:
    one, other = make("a/x"), make("b/x")
    assert set(find([one, other]).values()) == {one, other}
    assert len(find([one, one, tmp_path / "runs" / "a"])) == 1


def test_no_run_and_unknown_runs_are_errors(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("first")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"no run 'frist'; did you mean 'first'\? Give a run folder, or a folder that holds"
    ):
        find([Path("frist")])
    with pytest.raises(CheckpointError, match=r"no run 'runs/firs'; did you mean 'first'\?"):
        find([Path("runs/firs")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        CheckpointError, match=r"no run in 'empty' \(a run is a folder with run.json\): `athanor run --out empty/first"
    ):
        find([Path("empty")])


def test_the_last_record_of_a_step_counts_and_an_unfinished_line_does_not(tmp_path: Path) -> None:
    log = tmp_path / "sft.jsonl"
    log.write_text("".join(f'{{"step": {s}, "loss": {i}}}\n' for i, s in enumerate((1, 2, 3, 4, 2, 3))) + '{"step": 4, "lo')
    assert read(log) == [{"step": 1, "loss": 0}, {"step": 2, "loss": 4}, {"step": 3, "loss": 5}]
    log.write_text("")
    assert read(log) == []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("no json", "Expecting value"),
        ("[1]", "list indices must be integers"),
        ('{"loss": 1}', "'step'"),
        ('{"step": "x"}', "its step is 'x'"),
        ("{\xe9}", "can't decode"),
        ("", "Expecting value"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    log = tmp_path / "sft.jsonl"
    log.write_bytes(b'{"step": 1}\n' + line.encode("latin-1") + b'\n{"step": 3}\n')
    with pytest.raises(CheckpointError) as caught:
        read(log)
    assert f"{log}, line 2, is no record of a step (" in str(caught.value) and why in str(caught.value)
    assert str(caught.value).endswith("): delete that line, or move the file away")


def state_of(run: Path) -> tuple[str, str]:
    (log,) = stages("x", run)
    return log.state, log.why


def gone() -> int:
    """The number of a process that is there no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_how_a_stage_stands(make: Make) -> None:
    here = {"host": platform.node(), "steps": 9}
    assert state_of(make("a", state="running", process=os.getpid(), **here)) == ("running", "")
    assert state_of(make("b", state="running", process=gone(), **here)) == ("stale", "")
    assert state_of(make("c", state="stopped", process=1, why="ValueError: no", **here)) == ("stopped", "ValueError: no")
    assert state_of(make("d", state="finished", process=gone(), **here)) == ("finished", "")
    assert state_of(make("e")) == ("stopped", "")  # an older log: nothing says that it goes on


def test_a_process_that_is_somebody_elses_is_there(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(process: int, signal: int) -> None:
        assert (process, signal) == (77, 0)
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert state_of(make("a", state="running", process=77, host=platform.node()))[0] == "running"


def test_a_process_elsewhere_is_judged_by_its_last_record(make: Make) -> None:
    run = make("a", state="running", process=gone(), host="elsewhere")
    assert state_of(run)[0] == "running"
    os.utime(run / "logs" / "sft.jsonl", (0, 0))
    assert state_of(run)[0] == "stale"


def test_a_finished_stage_says_so_whatever_its_process_left(make: Make) -> None:
    run = make("a", state="running", process=gone(), host=platform.node())
    io.write_json(run / "stages" / "sft.json", {"name": "sft", "steps": 1, "settings": {"lr": 1}, "curve": []})
    (log,) = stages("a", run)
    assert (log.state, log.wanted, log.settings) == ("finished", 1, {"lr": 1})


def test_without_a_log_the_record_of_the_stage_is_read(make: Make) -> None:
    run = make("a", "pretrain")
    curve = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]
    io.write_json(run / "stages" / "grpo.json", {"name": "grpo", "settings": {}, "curve": curve})
    io.write_json(run / "stages" / "corpus.json", {"name": "corpus", "settings": {}})  # trains nothing
    make("a", "ablation")
    make("a", "sft")
    found = stages("a", run)
    assert [log.stage for log in found] == ["pretrain", "sft", "grpo", "ablation"]
    assert found[2].records == curve


def test_a_row_sums_up() -> None:
    records = [
        {"step": 1, "loss": 3.0, "tokens": 100, "tokens_per_second": 50.0, "batch_seconds": 0.5, "heldout_loss": 2.0},
        {"step": 2, "loss": 2.5, "tokens": 100, "step_seconds": 1.5, "heldout_loss": "nan"},
        {"step": 3, "loss": "nan", "tokens": 200, "step_seconds": 4.0, "heldout_loss": 2.25},
    ]
    log = StageLog("a", "sft", records, "running", wanted=9)
    assert log.seconds() == [2.5, 4.0, 8.0] and log.tokens() == [100, 200, 400]
    assert log.row() == {
        "run": "a", "stage": "sft", "state": "running", "why": "", "steps": 3, "wanted": 9, "loss": "nan", "heldout": 2.0,
        "heldout_measure": "heldout_loss", "tokens": 400, "seconds": 8.0, "tokens_per_second": 50.0,
    }  # fmt: skip
    empty = StageLog("a", "sft", [], "running").row()
    assert [empty[k] for k in ("steps", "loss", "heldout", "tokens", "seconds", "tokens_per_second")] == [0, *[None] * 5]


def test_settings_that_differ() -> None:
    same = {"optim": {"lr": 0.1, "name": "muon"}, "run": "a", "save_seconds": 1}
    one = StageLog("a", "sft", [], "finished", settings=same | {"seed": 0, "corpus": "ab" * 32, "names": ["x"]})
    other = StageLog("b", "sft", [], "finished", settings=same | {"optim": {"lr": 0.2, "name": "muon"}, "run": "b", "seed": None})
    assert differences([one, other]) == {
        "optim.lr": ["0.1", "0.2"],
        "seed": ["0", "null"],
        "corpus": ["ab" * 8, "–"],
        "names": ['["x"]', "–"],
    }
    assert differences([one, one]) == {} == differences([one])


def test_what_a_run_of_another_machine_may_be_silent(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make("a", state="running", process=1, host="elsewhere")
    monkeypatch.setattr(runs, "QUIET", -1.0)
    assert state_of(run)[0] == "stale"
