import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("check_report.py")
RUNG = {
    "accuracy": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 100},
    "format_rate": 0.9,
    "stop_rate": 1.0,
    "bits_per_byte": 2.5,
    "bytes": 1000,
}
NAMES = ("base", "sft", "rl", "int8", "int4")
REPORT = {
    "stages": [{"name": "corpus", "seconds": 1.5}, {"name": "tokenizer", "seconds": 0}],
    "bits_per_byte": {"model": 2.5, "gzip": 2.8, "bz2": 2.4, "xz": 2.3},
    "ladder": {name: copy.deepcopy(RUNG) for name in NAMES},
    "lineage": {name: {"parent": None} for name in NAMES},
}


def _paths(value, path=()):
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if path[:1] != ("lineage",):
            yield (*path, key)
        if isinstance(item, (dict, list)):
            yield from _paths(item, (*path, key))


@pytest.fixture
def check(tmp_path):
    def call(report):
        path = tmp_path / "report.json"
        path.write_text(json.dumps(report))
        done = subprocess.run([sys.executable, "-S", "-E", str(SCRIPT), str(path)], capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return call


def _without(path, value=None):
    report = copy.deepcopy(REPORT)
    node = report
    for key in path[:-1]:
        node = node[key]
    if value is None:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return report


def test_a_whole_report_passes(check):
    status, output = check(REPORT)
    assert status == 0, output
    assert "whole (2 stages, 5 checkpoints)" in output


LEAVES = sorted(
    {
        path
        for path in _paths(REPORT)
        if path not in {("stages", 0), ("stages", 1)} and path[:2] not in {("ladder", n) for n in NAMES[1:]}
    }
    | {("ladder", n) for n in NAMES}
    | {("lineage",), ("lineage", "int4")},
    key=str,
)


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: ".".join(map(str, path)))
def test_whatever_is_missing_is_named(check, path):
    status, output = check(_without(path))
    assert status == 1
    assert str(path[0]) in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("ladder", "rl", "accuracy", "low"), 0.7, "ladder.rl.accuracy must have 0 <= low <= value <= high <= 1"),
        (("ladder", "rl", "accuracy", "n"), 0, "ladder.rl.accuracy.n must be the number of trials, not 0"),
        (("ladder", "int8", "format_rate"), 1.5, "ladder.int8.format_rate must be in 0..1, not 1.5"),
        (("ladder", "int8", "bytes"), "big", "ladder.int8.bytes must be the size of the weights, not 'big'"),
        (("ladder", "base", "bits_per_byte"), 0, "ladder.base.bits_per_byte must be above 0, not 0"),
        (("bits_per_byte", "model"), True, "bits_per_byte.model must be above 0, not True"),
        (("stages", 0, "seconds"), -1, "stages[0].seconds must be a number, not -1"),
        (("stages",), [], "stages must be a list of stages, not []"),
    ],
)
def test_whatever_is_wrong_is_named(check, path, value, message):
    status, output = check(_without(path, value))
    assert status == 1
    assert message in output
