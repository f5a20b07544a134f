"""Rules of the house that no linter knows."""

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import athanor

SOURCE = Path(athanor.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(SOURCE)], "athanor."))
LONGEST_FILE, LONGEST_RECIPE = 400, 150  # lines
# What answers within half a second must not import these.
HEAVY = ("torch", "transformers", "matplotlib", "fastapi", "numpy", "tokenizers")


def _heavy_after(code):
    """Which of HEAVY a fresh interpreter has imported after `code`."""
    script = f"{code}\nimport sys\nprint('heavy:', *[m for m in {HEAVY!r} if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "ATHANOR_PLUGINS": ""}
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


def test_importing_athanor_imports_nothing_heavy():
    assert _heavy_after("import athanor; assert athanor.__version__; assert 'load' in dir(athanor)") == []


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--version", 0), ("no-such-recipe", 2)])
def test_the_command_line_itself_imports_nothing_heavy(argument, status):
    assert _heavy_after(f"from athanor.cli import main\nassert main([{argument!r}]) == {status}") == []


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports_and_says_what_it_is(name):
    module = importlib.import_module(name)
    empty = not Path(module.__file__).read_text(encoding="utf-8").strip()
    assert empty or module.__doc__, f"{name} needs a docstring"


def test_the_public_face_is_all():
    assert athanor.__all__ == sorted(athanor.__all__)
    for name in athanor.__all__:
        assert getattr(athanor, name) is not None
    public = {name for name in dir(athanor) if not name.startswith("_") or name == "__version__"}
    assert public == set(athanor.__all__)
    with pytest.raises(AttributeError, match="module 'athanor' has no attribute 'lode'"):
        athanor.lode  # noqa: B018  # the access itself is tested


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_are_small(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    longest = LONGEST_RECIPE if path.parent.name == "recipes" else LONGEST_FILE
    assert lines <= longest, f"{path} has {lines} lines: is it one room?"
