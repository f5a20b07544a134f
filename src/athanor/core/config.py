"""Frozen dataclasses <-> plain JSON values <-> files.

A field may be bool, int, float, str, Path, None, Literal, a tuple or list of these, dict[str, ...], a nested dataclass,
or a union of them. Dataclasses in a union are variants: the first that takes the table is meant, so give each a field such as
`kind: Literal["lora"] = "lora"` to tell them apart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from athanor.core.errors import ConfigError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
_MISSING = object()


def to_dict(cfg: Any) -> dict[str, Any]:
    """Plain JSON values of the dataclass `cfg`, in field order; `from_dict(type(cfg), to_dict(cfg)) == cfg`.

    Raises ConfigError for a value that JSON cannot hold (an object of another kind, inf, nan).
    """
    assert dataclasses.is_dataclass(cfg) and not isinstance(cfg, type), f"{cfg!r} is not a dataclass instance"
    return {f.name: _plain(getattr(cfg, f.name), f.name) for f in dataclasses.fields(cfg) if f.init}


def _plain(value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ConfigError(f"{where} is {value!r}, which a config file cannot hold: use numbers (finite), text, lists or dataclasses")


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """The dataclass `cls` with the fields that `data` gives; the others have their defaults.

    A nested table changes the fields it names in the default of its field: with `optim: Optim = Optim(lr=0.1)`, the table
    {"optim": {"steps": 3}} keeps lr 0.1.

    Raises ConfigError naming the field for an unknown key (with the nearest name), a wrong type or a missing field.
    """
    return typing.cast(T, _build(cls, data, ""))


def _build(cls: Any, data: Any, where: str, base: Any = None) -> Any:
    if not isinstance(data, Mapping):
        raise _wrong(data, where, "a table of fields")
    prefix = f"{where}." if where else ""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in data:
        if key not in fields:
            raise ConfigError(f"unknown field {prefix + str(key)!r}{nearest(str(key), fields)} Known: {', '.join(fields)}.")
    defaults = {name: default_of(f) if base is None else getattr(base, name) for name, f in fields.items()}
    for name, default in defaults.items():
        if name not in data and default is dataclasses.MISSING:
            raise ConfigError(f"field {prefix + name!r} is missing and has no default: give it a value")
    given = {key: _convert(value, hints[key], prefix + key, defaults[key]) for key, value in data.items()}
    return cls(**given) if base is None else dataclasses.replace(base, **given)


def default_of(f: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass field, made by its factory if need be; dataclasses.MISSING where there is none."""
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _wrong(value: Any, where: str, expected: str) -> ConfigError:
    return ConfigError(f"{where or 'the config'} is {value!r} ({type(value).__name__}) but must be {expected}: change it")


def _words(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    if is_union(hint):
        return " or ".join(_words(part) for part in typing.get_args(hint))
    if hint is type(None):
        return "null"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def is_union(hint: Any) -> bool:
    """Whether a type hint is `A | B` or Optional."""
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _convert(value: Any, hint: Any, where: str, base: Any = None) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if is_union(hint):
        return _convert_union(value, hint, where, base)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where, base if isinstance(base, typing.cast(type, hint)) else None)
    if origin is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        hint_text = nearest(value, [c for c in args if isinstance(c, str)]) if isinstance(value, str) else ""
        raise ConfigError(f"{where} is {value!r} but must be {_words(hint)}{hint_text or ': choose one of them'}")
    if origin in (tuple, list):
        return _convert_sequence(value, origin, args, where, hint)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(value, where, "a table")
        return {key: _convert(item, args[1], f"{where}.{key}") for key, item in value.items()}
    converted = _scalar(value, hint)
    if converted is _MISSING:
        raise _wrong(value, where, _words(hint))
    return converted


def _convert_union(value: Any, hint: Any, where: str, base: Any) -> Any:
    parts = typing.get_args(hint)
    # A value that already has a part's very type is not converted to another part's (1 stays int in `float | int`).
    for part in sorted(parts, key=lambda part: type(value) is not part):
        try:
            return _convert(value, part, where, base)
        except ConfigError as error:
            if isinstance(value, Mapping) and sum(map(dataclasses.is_dataclass, parts)) == 1 and dataclasses.is_dataclass(part):
                raise error
    raise _wrong(value, where, _words(hint))


def _convert_sequence(value: Any, origin: Any, args: tuple[Any, ...], where: str, hint: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise _wrong(value, where, f"a list, as {_words(hint)} says")
    if origin is list or args[-1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(args) != len(value):
        raise _wrong(value, where, f"a list of {len(args)}")
    return origin(_convert(item, arg, f"{where}[{i}]") for i, (item, arg) in enumerate(zip(value, args, strict=True)))


def _scalar(value: Any, hint: Any) -> Any:
    if hint is type(None):
        return None if value is None else _MISSING
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    return value if type(value) is hint else _MISSING


def load_table(path: str | Path) -> dict[str, Any]:
    """The table in a `.toml` or `.json` file. Raises ConfigError when it is missing, malformed or of another kind."""
    path = Path(path)
    if path.suffix not in (".toml", ".json"):
        raise ConfigError(f"config file {str(path)!r} ends with {path.suffix!r}: give a .toml or a .json file")
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read ({error.strerror}): check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {str(path)!r} is not UTF-8 ({error.reason}): save it as UTF-8") from error
    try:
        table = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config file {str(path)!r} is not {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(table, dict):
        raise ConfigError(f"config file {str(path)!r} holds a {type(table).__name__}: write a table of fields")
    return table


def load_file(cls: type[T], path: str | Path) -> T:
    """`from_dict` of a TOML or JSON file. Raises ConfigError, which names the file."""
    table = load_table(path)
    try:
        return from_dict(cls, table)
    except ConfigError as error:
        raise ConfigError(f"config file {str(path)!r}: {error}") from error


def digest(cfg: Any) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON of a dataclass or a dict."""
    plain = _plain(cfg, "config")
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:16]


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Dotted names of the values in which `a` and `b` differ, sorted."""
    return sorted(_differences(a, b, ""))


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str) -> list[str]:
    found = []
    for key in a.keys() | b.keys():
        left, right = a.get(key, _MISSING), b.get(key, _MISSING)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += _differences(left, right, f"{prefix}{key}.")
        elif left != right or type(left) is not type(right):
            found.append(f"{prefix}{key}")
    return found
