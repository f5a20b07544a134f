"""`athanor bench serve`: figures, files and errors of the command."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from athanor import cli
from tests.serve.talker import Talker


@pytest.fixture
def go(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def run(*arguments):
        status = cli.main(["bench", "serve", *map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out, " ".join(err.split())

    return run


SMALL = ("--load.rate", "none", "--load.requests", 8, "--load.clients", 4, "--mix.prompt", 30, 60, "--mix.output", 5, 20)


def test_figures_and_files(go, running, tmp_path):
    talker = Talker()
    with running(talker.app) as served:
        status, out, err = go(served.url, *SMALL, "--out", "load.json", "--plot", "load.svg")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"first/rl at {served.url}/v1: 8 complete in ")
    assert lines[1] == "at most 4 in flight; answers ended by length 8"
    rows = [line.split() for line in lines]
    assert ["milliseconds", "median", "95", "%", "99", "%", "max", "mean"] in rows
    assert [row[:-5] for row in rows[5:9]] == [["to", "first", "token"], ["per", "token"], ["to", "answer"], ["late"]]
    assert out.endswith("written: load.json\nwritten: load.svg\n")
    assert "requests 8/8 answered" in err and "/s" in err
    found = json.loads((tmp_path / "load.json").read_text())
    assert found["load"] == {"rate": None, "requests": 8, "clients": 4, "seconds": None, "timeout": 600.0, "seed": 0}
    assert found["mix"]["prompt"] == [30, 60]
    assert len(found["each"]) == 8
    assert sum(o["tokens"] for o in found["each"]) == found["tokens"]["output"]
    assert max(found["in_flight"][1]) == found["most_in_flight"] == 4
    assert ET.parse(tmp_path / "load.svg").getroot().get("role") == "img"


def test_json(go, running):
    with running(Talker().app) as served:
        status, out, _ = go(served.url, *SMALL, "--json", "--model", "first/sft")
    found = json.loads(out)
    assert (status, found["model"], found["requests"]["complete"]) == (0, "first/sft", 8)
    assert "each" not in found


def test_errors_are_shown_by_kind_and_all_failing_fails(go, running):
    talker = Talker()
    talker.turns = ["refuse", "fail", "refuse"]
    with running(talker.app) as served:
        status, out, _ = go(served.url, *SMALL)
        assert status == 0
        assert out.endswith("\n2 x HTTP 400: this is refused\n\n1 x error event internal_error: it went wrong\n")
        assert "5 complete, 3 failed in" in out
        talker.turns = ["refuse"] * 8
        status, out, _ = go(served.url, *SMALL)
    assert status == 1
    assert "0 complete, 8 failed" in out and "–" in out


def test_the_key_comes_from_the_environment(go, running, monkeypatch):
    with running(Talker(key="open sesame").app) as served:
        status, _, err = go(served.url, *SMALL)
        assert status == 1 and "the key is taken from OPENAI_API_KEY" in err
        monkeypatch.setenv("OPENAI_API_KEY", "open sesame")
        assert go(served.url, *SMALL)[0] == 0


def test_refused_before_any_work(go):
    status, _, err = go("http://localhost:1", "--plot", "load.gif")
    assert (status, err) == (1, "plot ('load.gif') must end in .svg or .png: rename it")
    status, _, err = go("http://localhost:1", "--load.rate", "fast")
    assert (status, err) == (2, 'Invalid value for --load.rate: unable to convert "fast" into float.')
    assert go("localhost:1")[0] == 1
    assert cli.main(["bench", "swerve", "http://localhost:1"]) == 2
