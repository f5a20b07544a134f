import json
import os
import re
import subprocess
import sys
from textwrap import dedent

import pytest

import athanor
from athanor import cli

RECIPE = '''
"""Stir [red]things[/red] and *see*.

Not shown in the list.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from athanor.core.errors import ConfigError, DataError

POSITIONAL = ("path", "times")


@dataclass(frozen=True)
class Lora:
    kind: Literal["lora"] = "lora"
    rank: int = 8
    """Rank of the update."""


@dataclass(frozen=True)
class Freeze:
    kind: Literal["freeze"] = "freeze"
    layers: int = 1


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    """Peak learning rate,
    per step."""
    kind: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self):
        if self.lr <= 0:
            raise ConfigError(f"lr ({self.lr}) must be positive: use 1e-3")


@dataclass(frozen=True)
class Config:
    """What to stir.

    Attributes:
        steps: how often to stir
    """

    steps: int = 10
    path: Path = Path("pot")
    """Where it boils."""
    times: int = 1
    vocab_size: int | None = None
    fast: bool = False
    stages: tuple[str, ...] = ("a", "b")
    optim: Optim = Optim(lr=0.5)
    adapt: Lora | Freeze | None = None


def main(config: Config) -> int | None:
    print(config)
    if config.steps == 13:
        raise DataError("steps (13) is unlucky:\\n    use 12 [bold]or[/bold] 14")
    if config.steps == 14:
        raise KeyboardInterrupt
    if config.steps == 16:
        (config.path / "sub").mkdir(parents=True)
    if config.steps == 17:
        raise OSError(28, "No space left on device")
    return 7 if config.steps == 15 else None
'''
NEEDY = '''
"""Needs a path."""

from dataclasses import dataclass

POSITIONAL = ("path",)
COMMAND = "need"


@dataclass(frozen=True)
class Config:
    path: str
    steps: int = 1


def main(config):
    print(config.path, config.steps)
'''
NEVER = '"""Never imported."""\n\nraise RuntimeError("imported")\n'


@pytest.fixture
def kitchen(tmp_path, monkeypatch):
    """A plugin folder with three recipes, one of which must not be imported."""
    folder = tmp_path / "kitchen"
    (folder / "recipes").mkdir(parents=True)
    for name, text in {"stir_it": RECIPE, "needy": NEEDY, "never": NEVER}.items():
        (folder / "recipes" / f"{name}.py").write_text(text)
    monkeypatch.setenv("ATHANOR_PLUGINS", str(folder))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("ATHANOR_DEBUG", raising=False)
    yield folder
    for name in [n for n in sys.modules if n.startswith("athanor_plugins.")]:
        del sys.modules[name]


@pytest.fixture
def run(kitchen, capsys):
    """Run a command line; gives (status, standard output, standard error)."""

    def call(*argv):
        status = cli.main([str(a) for a in argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def _resolved(run, *argv):
    status, out, err = run("stir-it", *argv, "--print-config")
    assert (status, err) == (0, "")
    return json.loads(out)


def test_help_lists_recipes_by_their_docstrings_without_importing_them(run):
    before = set(sys.modules)  # another test may have left a plugin of its own
    for argv in (["--help"], []):
        status, out, err = run(*argv)
        assert (status, err) == (0, "")
        lines = [" ".join(line.strip("│ ").split()) for line in out.splitlines()]
        assert "stir-it Stir [red]things[/red] and *see*." in lines
        assert "need Needs a path." in lines
        assert "never Never imported." in lines
        assert "Not shown" not in out
    assert not [name for name in set(sys.modules) - before if name.startswith("athanor_plugins.")]


def test_version(run):
    assert run("--version") == (0, f"{athanor.__version__}\n", "")


def test_help_of_a_recipe_shows_fields_docs_and_defaults(run):
    status, out, _ = run("stir-it", "--help")
    assert status == 0
    # Without the INT and PATH that only newer versions of the library show.
    rows = [" ".join(re.sub(r"\b[A-Z]{3,}\b", "", line.strip("│ ")).split()) for line in out.splitlines()]
    for row in (
        "--path Where it boils. [default: pot]",
        "--steps how often to stir [default: 10]",
        "--fast --no-fast [default: False]",
        "--optim.lr Peak learning rate, per step. [default: 0.5]",
        "--optim.kind [choices: adamw, muon] [default: adamw]",
        "--adapt.kind [choices: lora, freeze] [default: lora]",
        "--adapt.rank Rank of the update. [default: 8]",
        "--vocab-size",
    ):
        assert row in rows, out
    assert "--config" in out
    assert "--print-config" in out


def test_defaults_and_overrides(run):
    assert _resolved(run) == {
        "steps": 10,
        "path": "pot",
        "times": 1,
        "vocab_size": None,
        "fast": False,
        "stages": ["a", "b"],
        "optim": {"lr": 0.5, "kind": "adamw", "betas": [0.9, 0.95]},
        "adapt": None,
    }
    argv = "pan 3 --steps=4 --vocab-size 512 --fast --stages x --stages y --optim.kind muon --optim.betas 0.1 0.2"
    assert _resolved(run, *argv.split()) == {
        "steps": 4,
        "path": "pan",
        "times": 3,
        "vocab_size": 512,
        "fast": True,
        "stages": ["x", "y"],
        "optim": {"lr": 0.5, "kind": "muon", "betas": [0.1, 0.2]},
        "adapt": None,
    }
    assert _resolved(run, "--path", "pan", "--no-fast", "--empty-stages")["stages"] == []


def test_the_recipe_gets_its_config_and_gives_the_status(run):
    status, out, err = run("stir-it", "pan", "--optim.lr", "1e-3")
    assert (status, err) == (0, "")
    assert out.startswith("Config(steps=10, path=PosixPath('pan'), times=1,")
    assert "lr=0.001" in out
    assert run("stir-it", "--steps", "15")[0] == 7


def test_what_the_system_refuses_is_no_traceback(run, tmp_path, monkeypatch):
    (tmp_path / "file.txt").touch()
    status, _, err = run("stir-it", tmp_path / "file.txt", "--steps", "16")
    assert status == 1
    said = f"{tmp_path / 'file.txt' / 'sub'}: Not a directory: check the path, or choose another place"
    assert "".join(err.split()) == "".join(said.split())
    assert run("stir-it", "--steps", "17")[2] == "No space left on device: free some room, or choose another place\n"
    monkeypatch.setenv("ATHANOR_DEBUG", "1")
    assert "Traceback" in run("stir-it", "--steps", "17")[2]


@pytest.mark.parametrize("command", ["--help", "stir-it"])
def test_a_reader_that_goes_away_is_no_fault(kitchen, command):
    """`athanor ... | head`: rich prints the help, Python the rest."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "athanor", command], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_variants_are_told_apart_by_their_kind(run):
    assert _resolved(run, "--adapt.rank", "2")["adapt"] == {"kind": "lora", "rank": 2}
    assert _resolved(run, "--adapt.kind", "freeze", "--adapt.layers", "2")["adapt"] == {"kind": "freeze", "layers": 2}
    status, _, err = run("stir-it", "--adapt.kind", "freeze", "--adapt.rank", "2")
    assert status == 2
    assert "adapt is {'kind': 'freeze', 'rank': 2} (dict) but must be Lora or Freeze or null" in err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.toml", 'steps = 77\nadapt = {kind = "freeze"}\n[optim]\nbetas = [0.5, 0.6]\n'),
        ("c.json", '{"steps": 77, "adapt": {"kind": "freeze"}, "optim": {"betas": [0.5, 0.6]}, "vocab_size": null}'),
    ],
)
def test_a_file_and_overrides_on_top(run, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    resolved = _resolved(run, "--config", tmp_path / name, "--optim.lr", "3", "--adapt.layers", "4")
    assert resolved["steps"] == 77
    assert resolved["optim"] == {"lr": 3.0, "kind": "adamw", "betas": [0.5, 0.6]}
    assert resolved["adapt"] == {"kind": "freeze", "layers": 4}
    assert _resolved(run, "--config", tmp_path / name, "--steps", "5")["steps"] == 5


def test_a_field_on_the_command_line_leaves_the_other_fields_of_the_file(run, tmp_path):
    (tmp_path / "c.toml").write_text("[shape]\nd_model = 32\nn_layers = 1\n")
    status, out, err = run(
        "pretrain", "pot", "--config", tmp_path / "c.toml", "--shape.n-layers", 2, "--shape.tied", "false", "--print-config"
    )
    assert (status, err) == (0, "")
    assert json.loads(out)["shape"] == {"d_model": 32, "n_layers": 2, "tied": False}


def test_what_print_config_prints_is_a_config_file(run, tmp_path):
    first = _resolved(run, "pan", "--adapt.rank", "2", "--optim.lr", "0.25")
    (tmp_path / "c.json").write_text(json.dumps(first))
    assert _resolved(run, f"--config={tmp_path / 'c.json'}") == first


def test_a_required_field_comes_by_place_by_name_or_from_the_file(run, tmp_path):
    (tmp_path / "c.toml").write_text('path = "pan"')
    assert run("need", "pot")[:2] == (0, "pot 1\n")
    assert run("need", "--path", "pot", "--steps", "2")[:2] == (0, "pot 2\n")
    assert run("need", "--config", tmp_path / "c.toml") == (0, "pan 1\n", "")
    assert run("need", "pot", "--config", tmp_path / "c.toml")[:2] == (0, "pot 1\n")
    status, _, err = run("need")
    assert status == 2
    assert 'Command "need" parameter --path requires an argument' in err
    (tmp_path / "empty.toml").write_text("")
    status, _, err = run("need", "--config", tmp_path / "empty.toml")
    assert status == 2
    assert "empty.toml': field 'path' is missing and has no default: give it a value" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("stir-it --optim.lrr 1", "Unknown option: --optim.lrr. Did you mean --optim.lr?"),
        ("stir-it --stpes 1", "Unknown option: --stpes. Did you mean --steps?"),
        ("stirit", "no command 'stirit'; did you mean 'stir-it'? There are: "),
        ("xyzxyz", "no command 'xyzxyz'. There are: "),
        ("--hepl", 'Unknown command "--hepl".'),
        ("never-ever --help", "no command 'never-ever'; did you mean 'never'?"),
        ("stir-it a 1 b", "Unused Tokens: ['b']"),
        ("stir-it --steps", "parameter --steps requires an argument"),
        ("stir-it --steps many", 'Invalid value for --steps: unable to convert "many" into int'),
        ("stir-it --steps 3.7", 'Invalid value for --steps: unable to convert "3.7" into int'),
        ("stir-it pan 3.7", 'unable to convert "3.7" into int'),
        ("stir-it --vocab-size 3.0", 'Invalid value for --vocab-size: unable to convert "3.0" into int'),
        (
            "stir-it --optim.kind adam",
            'Invalid value "adam" for --optim.kind. Choose from: "adamw", "muon". Did you mean "adamw"?',
        ),
        ("stir-it --optim.lr 0", "lr (0.0) must be positive: use 1e-3"),
        ("stir-it --optim.lr inf --print-config", "optim.lr is inf, which a config file cannot hold"),
        ("stir-it --config absent.toml", "config file 'absent.toml' cannot be read"),
    ],
)
def test_what_makes_no_sense_is_named_in_one_paragraph(run, argv, message):
    status, out, err = run(*argv.split())
    assert (status, out) == (2 if "--print-config" not in argv else 1, "")
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stpes = 1", "unknown field 'stpes'; did you mean 'steps'?"),
        ("[optim]\nlrr = 1", "unknown field 'optim.lrr'; did you mean 'lr'?"),
        ("steps = 3.7", "steps is 3.7 (float) but must be int"),
        ("optim = 3", "optim is 3 (int) but must be a table of fields"),
    ],
)
def test_a_wrong_file_is_named_even_where_it_is_overridden(run, tmp_path, content, message):
    (tmp_path / "c.toml").write_text(content)
    status, _, err = run("stir-it", "--config", tmp_path / "c.toml", "--optim.lr", "1", "--fast")
    assert status == 2
    assert f"c.toml': {message}" in err


def test_an_error_of_a_recipe_is_a_message_and_status_1(run, monkeypatch):
    status, _, err = run("stir-it", "--steps", "13")
    assert (status, err) == (1, "steps (13) is unlucky: use 12 [bold]or[/bold] 14\n")
    monkeypatch.setenv("ATHANOR_DEBUG", "1")
    status, _, err = run("stir-it", "--steps", "13")
    assert status == 1
    assert err.startswith("Traceback")
    assert "DataError: steps (13) is unlucky" in err


def test_the_message_is_red_on_a_terminal(run, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert run("stir-it", "--steps", "13")[2].startswith("\x1b[31msteps (13)")


def test_an_interrupt_is_status_130(run):
    status, _, err = run("stir-it", "--steps", "14")
    assert (status, err) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"""Bad."""\ndef (', "bad.py is not Python (invalid syntax"),
        ('"""Bad."""\nCOMMAND = "need"\n', "recipes 'bad' and 'needy' are both the command 'need': rename one"),
    ],
)
def test_a_recipe_that_cannot_be_listed(run, kitchen, text, message):
    (kitchen / "recipes" / "bad.py").write_text(text)
    status, _, err = run("--help")
    assert status == 2
    assert message in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class Config: pass\n", "bad.py must define main to be a plugin of 'recipes'"),
        ("class Config: pass\ndef main(config): pass\n", "make it a frozen dataclass"),
        (
            """
            from dataclasses import dataclass
            POSITIONAL = ("pth",)
            @dataclass(frozen=True)
            class Config:
                path: str = ""
            def main(config): pass
            """,
            "names 'pth', no field of Config; did you mean 'path'?",
        ),
        (
            """
            from dataclasses import dataclass
            @dataclass(frozen=True)
            class Config:
                config: str = ""
            def main(config): pass
            """,
            "has a field 'config', an option of every recipe: rename it",
        ),
    ],
)
def test_a_recipe_that_cannot_be_run(run, kitchen, text, message):
    (kitchen / "recipes" / "bad.py").write_text(dedent(text))
    status, _, err = run("bad")
    assert status == 2
    assert message in err


def test_as_a_module(kitchen):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-W", "error", "-m", "athanor", "stir-it", "--steps", "15"]
    done = subprocess.run(argv, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout.startswith("Config(steps=15")
