"""`athanor runs`: what is listed, compared and refused, over runs that training itself left."""

import json

import pytest

from athanor import cli
from athanor.core import stage as stages
from athanor.train.state import StateStore
from athanor.train.watch import watching


@pytest.fixture
def go(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = cli.main(["runs", *map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out, " ".join(err.split())

    return run


@pytest.fixture
def train(tmp_path):
    """`train(name, stage, steps, level, cut, **settings)`: a stage that logs as `fit` does, cut off after `cut` steps."""

    def run(name, stage="pretrain", steps=8, level=2.0, cut=None, **settings):
        folder = tmp_path / "runs" / name
        stages.open_run(folder)
        store = StateStore(folder / "state" / stage, settings)
        try:
            with watching(folder, stage, steps, store, sinks=("jsonl",)) as tracker:
                for step in range(1, steps + 1):
                    record = {"step": step, "loss": level + 1 / step, "lr": 1e-3, "tokens": 1000, "tokens_per_second": 500.0}
                    tracker.log(record | {"heldout_loss": level + 2 / step, "batch_seconds": 0.0})
                    if step == cut:
                        raise ValueError("no more data")
        except ValueError:
            assert cut
        return folder

    return run


def test_a_list_of_runs(go, train):
    train("first")
    train("first", "sft", steps=4)
    train("deep/second", cut=2)
    stages.open_run(train("third").parent / "empty")
    status, out, err = go()
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["run", "stage", "state", "steps", "loss", "held-out", "tokens", "time", "tokens/s"]
    assert ["deep/second", "pretrain", "stopped", "2/8", "2.5", "3", "2k", "0:04", "500"] in rows
    assert ["first", "pretrain", "finished", "8", "2.125", "2.25", "8k", "0:16", "500"] in rows
    assert ["sft", "finished", "4", "2.25", "2.5", "4k", "0:08", "500"] in rows
    assert "deep/second pretrain: ValueError: no more data" in out and "without a training stage: empty" in out


def test_json(go, train):
    train("a")
    train("b", "sft", cut=3)
    status, out, _ = go("runs", "--json")
    found = json.loads(out)["runs"]
    assert status == 0 and [(r["run"], r["stage"], r["state"], r["steps"], r["wanted"]) for r in found] == [
        ("a", "pretrain", "finished", 8, 8),
        ("b", "sft", "stopped", 3, 8),
    ]
    assert found[0]["loss"] == 2.125 and found[0]["seconds"] == 16.0 and found[1]["why"] == "ValueError: no more data"
    assert "differences" not in json.loads(out)


def test_a_stage_can_be_chosen(go, train):
    train("a")
    train("a", "sft")
    rows = json.loads(go("--stage", "sft", "--json")[1])["runs"]
    assert [r["stage"] for r in rows] == ["sft"]
    status, _, err = go("--stage", "stf")
    assert status == 1 and "none of these runs has a stage 'stf'; did you mean 'sft'? They have: pretrain, sft." in err


@pytest.mark.parametrize("suffix", ["html", "svg", "png"])
def test_a_comparison(go, train, tmp_path, suffix):
    train("a", optim={"lr": 0.1}, seed=0)
    train("b", level=1.0, optim={"lr": 0.2}, seed=0)
    status, out, err = go("a", "b", "--plot", f"out.{suffix}")
    assert (status, err) == (0, "") and f"plot: out.{suffix}" in out
    assert "Settings that differ" in out and "seed" not in out
    assert ["optim.lr", "0.1", "0.2"] in [line.split() for line in out.splitlines()]
    assert (tmp_path / f"out.{suffix}").stat().st_size > 5000
    found = json.loads(go("a", "b", "--plot", f"out.{suffix}", "--json")[1])
    assert found["differences"] == {"optim.lr": ["0.1", "0.2"]} and found["plot"] == f"out.{suffix}"


def test_the_first_stage_that_all_have_is_compared(go, train, tmp_path):
    train("a")
    for name in "ab":
        train(name, "sft")
    status, out, _ = go("a", "b", "--plot", "out.svg")
    assert status == 0 and "pretrain" not in out and "The settings of these runs are the same." in out
    assert "Runs compared · sft" in (tmp_path / "out.svg").read_text(encoding="utf-8")
    status, out, _ = go("--stage", "pretrain", "--plot", "out.svg")
    assert status == 0 and "left out: b has no stage pretrain" in out


def test_chinese(go, train):
    train("a")
    status, out, _ = go("--language", "zh", "--plot", "x.html")
    assert status == 0 and "已完成" in out and "这些运行的设置相同。" in out
    assert go("--language", "fr")[0] == 2


def test_refused(go, train, tmp_path):
    train("a")
    train("b", "sft")
    for arguments, message in {
        ("aa",): "no run 'aa'; did you mean 'a'? Give a run folder, or a folder that holds some.",
        ("a", "b", "--plot", "x.svg"): "these runs have no training stage in common (a has pretrain; b has sft): name the runs",
        ("a", "--plot", "x.gif"): "plot path 'x.gif' ends in '.gif': give one that ends in .html, .svg or .png",
    }.items():
        status, _, err = go(*arguments)
        assert status == 1 and message in err
    log = tmp_path / "runs" / "a" / "logs" / "pretrain.jsonl"
    log.write_text('{"step": 1}\n{"step"\n')
    status, _, err = go()
    assert status == 1 and "runs/a/logs/pretrain.jsonl, line 2, is no record of a step" in err


def test_a_folder_without_runs(go, tmp_path):
    assert "no run 'runs' Give a run folder" in go()[2]
    (tmp_path / "runs").mkdir()
    status, _, err = go()
    assert status == 1 and "no run in 'runs' (a run is a folder with run.json): `athanor run --out runs/first`" in err
