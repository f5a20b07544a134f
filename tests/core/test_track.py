import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from athanor.core.errors import CheckpointError
from athanor.core.track import ConsoleTracker, JsonlTracker, Trackers


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_are_lines_on_disk_as_soon_as_they_are_logged(tmp_path):
    path = tmp_path / "logs" / "sft.jsonl"
    tracker = JsonlTracker(path)
    tracker.log({"step": 1, "loss": 3.25, "text": "é\n"})
    assert _lines(path) == [{"step": 1, "loss": 3.25, "text": "é\n"}]
    tracker.log({"step": 2, "loss": torch.tensor(1.5), "rate": np.float64(0.5), "parts": (1, {"x": torch.tensor(3)})})
    tracker.close()
    assert _lines(path)[1] == {"step": 2, "loss": 1.5, "rate": 0.5, "parts": [1, {"x": 3}]}
    assert path.read_text().count("\n") == 2


def test_an_existing_file_is_continued(tmp_path):
    for step in (1, 2):
        tracker = JsonlTracker(tmp_path / "x")
        tracker.log({"step": step})
        tracker.close()
    assert _lines(tmp_path / "x") == [{"step": 1}, {"step": 2}]


def test_what_is_not_finite_is_kept_as_text(tmp_path):
    tracker = JsonlTracker(tmp_path / "x")
    tracker.log({"a": float("nan"), "b": float("-inf"), "c": [torch.tensor(float("inf"))]})
    tracker.close()
    assert _lines(tmp_path / "x") == [{"a": "nan", "b": "-inf", "c": ["inf"]}]


def test_a_line_cut_short_by_a_kill_goes(tmp_path):
    path = tmp_path / "x"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    tracker = JsonlTracker(path)
    tracker.log({"step": 2})
    tracker.close()
    assert _lines(path) == [{"step": 1}, {"step": 2}]


def test_resuming_drops_the_records_of_later_steps(tmp_path):
    path = tmp_path / "x"
    path.write_text('{"event": "start"}\n{"step": 1}\n{"step": 2, "loss": 1.0}\n{"step": 3}\n{"st')
    JsonlTracker(path, last_step=2).close()
    assert path.read_text() == '{"event": "start"}\n{"step": 1}\n{"step": 2, "loss": 1.0}\n'
    JsonlTracker(tmp_path / "absent", last_step=2).close()


@pytest.mark.parametrize("line", ["no json", "[1]", '{"step": "x"}'])
def test_resuming_over_a_foreign_file_is_refused(tmp_path, line):
    path = tmp_path / "x"
    path.write_text(line + "\n")
    with pytest.raises(CheckpointError, match=r"x has a line that is no record \(.*\): move the file away"):
        JsonlTracker(path, last_step=2)
    assert path.read_text() == line + "\n"


def _plain(total=100, **kwargs):
    out, clock = io.StringIO(), Clock()
    return ConsoleTracker("pretrain", total, "steps", console=Console(file=out, width=80), clock=clock, **kwargs), out, clock


def test_without_a_terminal_a_line_every_five_seconds_and_the_last():
    tracker, out, clock = _plain()
    for step in range(1, 26):
        clock.now += 0.5
        tracker.log({"step": step, "loss": 3.14159265, "lr": 1e-3, "[bold]": 2})
    tracker.close()
    tracker.close()
    assert out.getvalue().splitlines() == [
        "pretrain 1/100 steps  2/s  0:50 left  loss 3.142  lr 0.001  [bold] 2",
        "pretrain 11/100 steps  2/s  0:44 left  loss 3.142  lr 0.001  [bold] 2",
        "pretrain 21/100 steps  2/s  0:40 left  loss 3.142  lr 0.001  [bold] 2",
        "pretrain 25/100 steps  2/s  0:38 left  loss 3.142  lr 0.001  [bold] 2",
    ]


def test_a_resumed_run_counts_its_rate_from_where_it_began():
    tracker, out, clock = _plain(total=7300, start=50)
    tracker.log({"step": 50})
    clock.now += 10
    tracker.log({"step": 60, "a": 1, "b": "x", "c": [1], "d": True, "e": 2, "f": 3})
    assert out.getvalue().splitlines() == [
        "pretrain 50/7300 steps  ",
        "pretrain 60/7300 steps  1/s  2:00:40 left  a 1  b x  d True  e 2",
    ]


def test_without_a_total_there_is_no_time_left():
    tracker, out, clock = _plain(total=None)
    clock.now += 1
    tracker.log({"step": 4, "loss": float("nan")})
    assert out.getvalue() == "pretrain 4 steps  4/s  loss nan\n"


def test_what_ends_after_a_time_has_no_more_than_that_left():
    tracker, out, clock = _plain(seconds=30)
    for step in (5, 96):
        clock.now += 10
        tracker.log({"step": step})
    assert out.getvalue().splitlines() == [
        "pretrain 5/100 steps  0.5/s  0:20 left  ",
        "pretrain 96/100 steps  4.8/s  0:01 left  ",
    ]


def test_nothing_logged_nothing_shown():
    tracker, out, _ = _plain()
    tracker.close()
    assert out.getvalue() == ""


def test_on_a_terminal_a_bar_moves():
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=120, force_terminal=True, force_interactive=True, color_system=None)
    tracker = ConsoleTracker("pretrain", 10, "steps", console=console, clock=clock)
    clock.now += 2
    tracker.log({"step": 4, "loss": 2.5})
    tracker.close()
    shown = out.getvalue()
    assert "pretrain" in shown
    assert "4/10" in shown
    assert "steps  2/s  0:03 left  loss 2.5" in shown


def test_standard_output_is_the_default(capsys):
    tracker = ConsoleTracker("sft", 2)
    tracker.log({"step": 2, "loss": 1.0})
    tracker.close()
    assert capsys.readouterr().out.startswith("sft 2/2 steps")


def test_several_trackers_get_every_record():
    class Memory:
        def __init__(self):
            self.records, self.closed = [], False

        def log(self, record):
            self.records.append(record)

        def close(self):
            self.closed = True

    one, two = Memory(), Memory()
    both = Trackers([one, two])
    both.log({"step": 1})
    both.close()
    assert one.records == two.records == [{"step": 1}]
    assert one.closed
    assert two.closed
