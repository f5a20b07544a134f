import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from athanor.core import config
from athanor.core.errors import ConfigError


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    kind: Literal["adamw", "muon"] = "adamw"


@dataclass(frozen=True)
class Config:
    steps: int
    name: str = "first"
    out: Path = Path("runs/first")
    optim: Optim = field(default_factory=Optim)
    text: Path | None = None
    stages: tuple[str, ...] = ()
    sizes: list[int] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    fast: bool = False
    ratio: int | float = 1
    anything: Any = None


configs = st.builds(
    Config,
    steps=st.integers(),
    name=st.text(),
    out=st.text(alphabet="ab/", min_size=1).map(Path),
    optim=st.builds(
        Optim,
        lr=st.floats(allow_nan=False, allow_infinity=False),
        betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
        kind=st.sampled_from(["adamw", "muon"]),
    ),
    text=st.none() | st.just(Path("x.txt")),
    stages=st.lists(st.text()).map(tuple),
    sizes=st.lists(st.integers()),
    weights=st.dictionaries(st.text(), st.floats(0, 1)),
    fast=st.booleans(),
    ratio=st.integers() | st.floats(0, 1),
)


@given(configs)
def test_plain_values_read_back_as_the_same_config(cfg):
    plain = config.to_dict(cfg)
    through_json = json.loads(json.dumps(plain, allow_nan=False))
    back = config.from_dict(Config, through_json)
    assert back == cfg
    assert type(back.ratio) is type(cfg.ratio)
    assert config.digest(back) == config.digest(cfg) == config.digest(through_json)


def test_what_is_not_given_has_its_default():
    cfg = config.from_dict(Config, {"steps": 3, "optim": {"lr": 1}})
    assert cfg == Config(steps=3, optim=Optim(lr=1.0))
    assert isinstance(cfg.optim.lr, float)


def test_fields_that_are_not_given_at_construction_are_left_out():
    @dataclass(frozen=True)
    class Derived:
        a: int = 1
        twice: int = field(init=False, default=2)

    assert config.to_dict(Derived()) == {"a": 1}
    with pytest.raises(ConfigError, match="unknown field 'twice'"):
        config.from_dict(Derived, {"twice": 3})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"steps": 1, "optm": {}}, r"unknown field 'optm'; did you mean 'optim'\? Known: steps, name"),
        ({"steps": 1, "optim": {"Ir": 1}}, r"unknown field 'optim\.Ir'; did you mean 'lr'\? Known: lr, betas, kind"),
        ({"steps": 1, "optim": {"zzz": 1}}, r"unknown field 'optim\.zzz' Known: lr"),
        ({}, r"field 'steps' is missing and has no default: give it a value"),
        ({"steps": "3"}, r"steps is '3' \(str\) but must be int: change it"),
        ({"steps": 3.0}, r"steps is 3\.0 \(float\) but must be int"),
        ({"steps": True}, r"steps is True \(bool\) but must be int"),
        ({"steps": 1, "fast": 1}, r"fast is 1 \(int\) but must be bool"),
        ({"steps": 1, "name": 1}, r"name is 1 \(int\) but must be str"),
        ({"steps": 1, "out": 1}, r"out is 1 \(int\) but must be Path"),
        ({"steps": 1, "text": 1}, r"text is 1 \(int\) but must be Path or null"),
        ({"steps": 1, "optim": {"lr": True}}, r"optim\.lr is True \(bool\) but must be float"),
        ({"steps": 1, "optim": 3}, r"optim is 3 \(int\) but must be a table of fields"),
        ({"steps": 1, "optim": {"betas": [0.9]}}, r"optim\.betas is \[0\.9\] \(list\) but must be a list of 2"),
        ({"steps": 1, "optim": {"betas": [0.9, "x"]}}, r"optim\.betas\[1\] is 'x' \(str\) but must be float"),
        ({"steps": 1, "optim": {"kind": "adam"}}, r"optim\.kind is 'adam' but must be 'adamw' or 'muon'; did you mean 'adamw'\?"),
        ({"steps": 1, "optim": {"kind": 3}}, r"optim\.kind is 3 but must be 'adamw' or 'muon': choose one of them"),
        ({"steps": 1, "stages": "sft"}, r"stages is 'sft' \(str\) but must be a list, as tuple\[str, \.\.\.\] says"),
        ({"steps": 1, "sizes": [1, None]}, r"sizes\[1\] is None \(NoneType\) but must be int"),
        ({"steps": 1, "weights": {"a": "b"}}, r"weights\.a is 'b' \(str\) but must be float"),
        ({"steps": 1, "weights": []}, r"weights is \[\] \(list\) but must be a table"),
        ([], r"the config is \[\] \(list\) but must be a table of fields"),
    ],
)
def test_an_error_names_field_value_and_rule(data, message):
    with pytest.raises(ConfigError, match=message):
        config.from_dict(Config, data)


@dataclass(frozen=True)
class Lora:
    kind: Literal["lora"] = "lora"
    rank: int = 8


@dataclass(frozen=True)
class Freeze:
    kind: Literal["freeze"] = "freeze"
    layers: int = 1


@dataclass(frozen=True)
class Tuned:
    adapt: Lora | Freeze = Lora()
    optim: Optim | None = None


def test_variants_read_back():
    for cfg in (Tuned(Lora(rank=2)), Tuned(Freeze(layers=3), Optim(lr=2.0))):
        assert config.from_dict(Tuned, config.to_dict(cfg)) == cfg
    with pytest.raises(ConfigError, match=r"adapt is \{'kind': 'lora', 'layers': 1\} \(dict\) but must be Lora or Freeze"):
        config.from_dict(Tuned, {"adapt": {"kind": "lora", "layers": 1}})


def test_a_nested_table_changes_only_what_it_names_in_its_fields_default():
    @dataclass(frozen=True)
    class Slow:
        optim: Optim = Optim(lr=1e-5, kind="muon")
        adapt: Lora | Freeze = Lora(rank=2)

    assert config.from_dict(Slow, {"optim": {"betas": [0.1, 0.2]}}).optim == Optim(1e-5, (0.1, 0.2), "muon")
    assert config.from_dict(Slow, {"adapt": {"kind": "lora"}}).adapt == Lora(rank=2)
    assert config.from_dict(Slow, {"adapt": {"kind": "freeze"}}).adapt == Freeze()


def test_an_optional_part_names_its_own_wrong_field():
    with pytest.raises(ConfigError, match=r"unknown field 'optim\.l'; did you mean 'lr'\?"):
        config.from_dict(Tuned, {"optim": {"l": 1}})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1: 2}, {"deep": [complex(1)]}])
def test_what_json_cannot_hold_is_refused(value):
    with pytest.raises(ConfigError, match=r"^anything.* is .*, which a config file cannot hold: use numbers"):
        config.to_dict(Config(steps=1, anything=value))


def test_files(tmp_path):
    toml, as_json = tmp_path / "c.toml", tmp_path / "c.json"
    toml.write_text('steps = 5\nstages = ["a"]\n[optim]\nlr = 3e-4\n')
    as_json.write_text('{"steps": 5, "stages": ["a"], "optim": {"lr": 3e-4}}')
    expected = Config(steps=5, stages=("a",), optim=Optim(lr=3e-4))
    assert config.load_file(Config, toml) == config.load_file(Config, str(as_json)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.yaml", b"steps: 1", r"c\.yaml' ends with '\.yaml': give a \.toml or a \.json file"),
        ("c.toml", b"steps = ", r"c\.toml' is not TOML: "),
        ("c.json", b"{", r"c\.json' is not JSON: "),
        ("c.json", b"[" * 100_000, r"c\.json' is not JSON: "),
        ("c.json", b"[1]", r"c\.json' holds a list: write a table of fields"),
        ("c.toml", b"\xff", r"c\.toml' is not UTF-8 .*: save it as UTF-8"),
        ("c.toml", b"steps = 1\nnam = 'x'", r"c\.toml': unknown field 'nam'; did you mean 'name'\?"),
        ("absent.toml", None, r"absent\.toml' cannot be read \(No such file or directory\): check the path"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        config.load_file(Config, tmp_path / name)


def test_the_digest_is_stable_and_blind_to_order():
    # The value itself is part of the format: checkpoints store it.
    assert config.digest({"b": [1, 2.5], "a": None}) == config.digest({"a": None, "b": [1, 2.5]}) == "e57f5d37865437a8"
    cfg = Config(steps=1)
    assert config.digest(cfg) != config.digest(dataclasses.replace(cfg, steps=2))


def test_differences_are_dotted_names():
    a = {"same": 1, "x": {"y": 1, "z": {"deep": [1, 2]}}, "gone": None, "kind": 1}
    b = {"same": 1, "x": {"y": 2, "z": {"deep": [1, 3]}}, "new": 0, "kind": 1.0}
    assert config.differences(a, b) == ["gone", "kind", "new", "x.y", "x.z.deep"]
    assert config.differences(a, a) == []
    assert config.differences({"x": {"y": 1}}, {"x": 1}) == ["x"]
