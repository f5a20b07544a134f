"""An architecture added in one file is tested, read, written and described without another line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def added(tmp_path):
    """The environment of a process that knows the architecture of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = re.search(r"`models/granite\.py`:\n\n```python\n(.*?)^```$", text, re.M | re.S)[1]
    (tmp_path / "plugins" / "models").mkdir(parents=True)
    (tmp_path / "plugins" / "models" / "granite.py").write_text(code, encoding="utf-8")
    return os.environ | {"ATHANOR_PLUGINS": str(tmp_path / "plugins"), "OMP_NUM_THREADS": "1"}


def run(environment, *command):
    done = subprocess.run([sys.executable, "-m", *command], env=environment, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_parity_suite_takes_it(added):
    status, out = run(added, "pytest", "-q", "-p", "no:cacheprovider", "tests/models/test_parity.py", "-k", "granite")
    assert status == 0, out
    assert int(re.search(r"(\d+) passed", out)[1]) >= 12
    assert "skipped" not in out


def test_the_suite_would_notice_a_mistake_in_it(added):
    path = Path(added["ATHANOR_PLUGINS"]) / "models" / "granite.py"
    path.write_text(path.read_text(encoding="utf-8").replace("Scoring(scale=self.attention_multiplier)", "Scoring()"))
    status, out = run(added, "pytest", "-q", "-p", "no:cacheprovider", "tests/models/test_parity.py", "-k", "granite and logits")
    assert status == 1 and "2 failed" in out


def test_the_commands_know_it(added, tmp_path):
    status, out = run(added, "athanor", "inspect", "granite:tiny", "--json")
    assert status == 0, out
    assert json.loads(out)["parameters"] > 20_000
    make = (
        "import sys, torch; from pathlib import Path; from athanor.core import plugins; from athanor.models import io;"
        "granite = plugins.load('models', 'granite'); folder = Path(sys.argv[1]); folder.mkdir();"
        "io.save(io.build('granite', granite.PRESETS['tiny'], seed=0), folder)"
    )
    done = subprocess.run([sys.executable, "-c", make, tmp_path / "made"], env=added, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    status, out = run(added, "athanor", "import", str(tmp_path / "made"), "--out", str(tmp_path / "own"))
    assert status == 0, out
    assert (tmp_path / "own" / "athanor.json").is_file()
