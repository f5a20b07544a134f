"""Law L4 with SIGKILL: a run that was killed and started again ends in the same bits, without a step left out or done twice."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from athanor.core import io
from athanor.train.weights import whole_state
from tests.train import kills

KINDS = ("model.", "ema.", "optimizer.", "rng.")


def records(out, rank=0):
    return [json.loads(line) for line in (out / f"log-{rank}.jsonl").read_text().splitlines()]


def same_end(whole, killed, steps, ranks=1):
    """Weights, averages, moments, generators, counts, checkpoints and every logged number are those of the whole run."""
    for kind in KINDS:
        a, b = (whole_state(out / "state", kind) for out in (whole, killed))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), kind
    manifests = [io.read_json(out / "state" / f"step-{steps:08d}" / "manifest.json") for out in (whole, killed)]
    for manifest in manifests:
        assert [r["step"] for r in manifest["history"]] == list(range(1, steps + 1))
    assert manifests[0]["history"] == manifests[1]["history"] and manifests[0]["extra"] == manifests[1]["extra"]
    for rank in range(ranks):
        assert records(whole, rank) == records(killed, rank) == manifests[0]["history"]
    assert sorted(p.name for p in (whole / "state").iterdir()) == sorted(p.name for p in (killed / "state").iterdir())
    best = min((r["heldout"], r["step"]) for r in manifests[0]["history"] if "heldout" in r)[1]
    kept = {best, steps - 1, steps}
    assert {int(p.name.removeprefix("step-")) for p in (killed / "state").iterdir()} == kept
    return best


LIVES = """
# A whole run and one that dies at each of the points named, all forked from here.
import os, signal, sys
from pathlib import Path
import killed

def live(out, kill):
    pid = os.fork()
    if pid == 0:
        os.environ["KILL"] = kill
        killed.main(str(out), {steps})
        os._exit(0)
    return os.waitpid(pid, 0)[1]

whole, out, *points = sys.argv[1:]
assert live(whole, ":0") == 0
for point in points:
    assert live(out, point) == signal.SIGKILL, point
assert not Path(out, "done.json").exists()
assert live(out, ":0") == 0
"""


def test_killed_at_the_worst_moments(tmp_path):
    """Before a manifest is written; an old checkpoint half deleted; before a folder gets its name; within an update."""
    steps = 14  # the last evaluation is after step 12
    points = ["manifest:5", "deleting:1", "place:3", "update:2"]
    folders = [tmp_path / "whole", tmp_path / "killed"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)]), "OMP_NUM_THREADS": "1"}
    script = LIVES.format(steps=steps)
    done = subprocess.run([sys.executable, "-c", script, *folders, *points], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    best = same_end(*folders, steps)
    assert best < steps - 1  # it is kept for being the best, not for being new


@pytest.mark.slow
def test_killed_at_25_random_moments(tmp_path, record_property):
    steps, tally, chance = 152, kills.Tally(), random.Random()
    whole = tmp_path / "whole"
    kills.finish(kills.program(whole, steps), whole)
    for life in range(25):
        out = tmp_path / f"killed-{life}"
        kills.finish(kills.program(out, steps), out, tally, 25, delay=0.7, chance=chance)
        same_end(whole, out, steps)
        if tally.kills == 25:
            break
    assert tally.kills == 25
    record_property("phases", dict(tally.phases))
    print(dict(tally.phases))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["launcher", "worker"])
def test_killed_under_torchrun(tmp_path, target):
    """Two processes that share the weights (FSDP2): neither a launcher nor a worker that dies leaves one behind."""
    steps, tally, chance = 41, kills.Tally(), random.Random()
    whole, out = tmp_path / "whole", tmp_path / "killed"
    kills.finish(kills.program(whole, steps, "fsdp=2", "adamw", ranks=2), whole)
    kills.finish(kills.program(out, steps, "fsdp=2", "adamw", ranks=2), out, tally, 4, target, delay=0.7, chance=chance)
    assert tally.kills > 0
    same_end(whole, out, steps, ranks=2)
    print(target, tally)
