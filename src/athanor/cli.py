"""The command line: `athanor <recipe> [options]`. The file `recipes/<name>.py` IS the subcommand `<name>`.

A recipe defines a frozen dataclass `Config`, whose fields (and those of the dataclasses it nests) are the options, and
`main(config: Config) -> int | None`. It may define `POSITIONAL = ("path",)`, fields that are given by place, and
`COMMAND = "eval"`, a name other than its file's. A field's help is the docstring after it, or what the class docstring
says of it. `athanor --help` reads recipes without importing them.

Exit status: 0 done, 1 an AthanorError or one of the system (a full disk), 2 a command line or config that makes no sense,
130 interrupted, 141 when nobody reads on what is printed. `ATHANOR_DEBUG=1` shows the traceback of an error;
`ATHANOR_NATIVE=0` computes without C++ of our own (core/native.py).
"""

from __future__ import annotations

import ast
import dataclasses
import errno
import inspect
import json
import os
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple

from cyclopts import App, ArgumentCollection, CoercionError, CycloptsError, Group, Parameter, Token, convert
from docstring_parser import parse_from_object
from rich.console import Console
from rich.text import Text

import athanor
from athanor.core import config as configs
from athanor.core import io, plugins
from athanor.core.errors import AthanorError, ConfigError, PluginError, nearest

ROOM = "recipes"
_OWN = ("config", "print_config")  # options of every recipe
_EMPTY = inspect.Parameter.empty


class _Option(NamedTuple):
    """A leaf of a config tree; `default` is _EMPTY where there is none."""

    path: tuple[str, ...]
    hint: Any
    default: Any
    help: str

    @property
    def key(self) -> str:
        return "__".join(self.path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (the process's own by default) and return its exit status."""
    status = 2
    try:
        start = _prepare(list(sys.argv[1:] if argv is None else argv))
        status = 1
        done = start()
        sys.stdout.flush()  # here, where what goes wrong is told
        return done
    except (BrokenPipeError, SystemExit) as error:
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):  # rich's
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return 141
    except (CycloptsError, AthanorError, OSError) as error:
        if os.environ.get("ATHANOR_DEBUG") == "1":
            traceback.print_exception(error)
        else:
            _say(_system(error) if isinstance(error, OSError) else str(error))
        return status
    except KeyboardInterrupt:
        _say("interrupted")
        return 130


def _system(error: OSError) -> str:
    """What the system refused, and the remedy."""
    what = error.strerror or str(error) or type(error).__name__
    where = f"{io.lasting_name(error.filename)}: " if error.filename is not None else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{where}{what}: {'free some room' if full else 'check the path'}, or choose another place"


def _say(message: str) -> None:
    Console(stderr=True).print(Text(" ".join(message.split()), style="red"), soft_wrap=True)


def _prepare(tokens: list[str]) -> Callable[[], int]:
    """What `tokens` ask for, ready to run: everything that can be wrong with them is found here."""
    app = App(
        name="athanor",
        help="From raw text to a served, aligned, compressed assistant.",
        help_format="plaintext",
        version=athanor.__version__,
        config=_refuse_fractions,
    )
    recipe, known = None, _commands()
    if tokens and not tokens[0].startswith("-") and tokens[0] not in known:
        raise ConfigError(f"no command {tokens[0]!r}{nearest(tokens[0], known) or '.'} There are: {', '.join(known)}.")
    for command, (name, line) in known.items():
        chosen = tokens[:1] == [command]
        if chosen:
            recipe = _load(name)
        app.command(_function(recipe, tokens) if chosen and recipe else _not_chosen, name=command, help=line)
    function, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    if recipe is None or not hasattr(function, "__signature__"):
        return lambda: function(*bound.args, **bound.kwargs) or 0  # help or version
    given = dict(bound.arguments)
    file, print_config = given.pop("config", None), given.pop("print_config", False)
    config = _resolve(recipe.Config, file, given)
    return (lambda: _print(config)) if print_config else (lambda: recipe.main(config) or 0)


def _print(config: Any) -> int:
    print(json.dumps(configs.to_dict(config), indent=1, ensure_ascii=False, allow_nan=False))
    return 0


def _not_chosen() -> None:
    """Stands for a recipe that is not imported."""


def _commands() -> dict[str, tuple[str, str]]:
    """{command: (recipe, first line of its docstring)}, from the files' syntax trees."""
    found: dict[str, tuple[str, str]] = {}
    for name in plugins.names(ROOM):
        path = plugins.find(ROOM, name)
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError) as error:
            raise PluginError(f"recipe {path} is not Python ({error}): correct it or move it away") from error
        command = name.replace("_", "-")
        for node in tree.body:
            match node:
                case ast.Assign(targets=[ast.Name(id="COMMAND")], value=ast.Constant(value=str(given))):
                    command = given
        if command in found:
            raise PluginError(f"recipes {found[command][0]!r} and {name!r} are both the command {command!r}: rename one")
        found[command] = (name, (ast.get_docstring(tree) or "").partition("\n")[0])
    return found


def _load(name: str) -> ModuleType:
    recipe = plugins.require(ROOM, name, "Config", "main")
    if not dataclasses.is_dataclass(recipe.Config):
        raise PluginError(f"Config of recipe {recipe.__file__} is {recipe.Config!r}: make it a frozen dataclass")
    fields = {f.name for f in dataclasses.fields(recipe.Config)}
    for field in getattr(recipe, "POSITIONAL", ()):
        if field not in fields:
            raise PluginError(
                f"POSITIONAL of recipe {recipe.__file__} names {field!r}, no field of Config{nearest(field, fields)}"
            )
    for field in fields & set(_OWN):
        raise PluginError(f"Config of recipe {recipe.__file__} has a field {field!r}, an option of every recipe: rename it")
    return recipe


def _options(cls: Any, path: tuple[str, ...] = (), base: Any = None) -> Iterator[_Option]:
    """The leaves of the config `cls`, with the defaults that `base` holds where it is given."""
    hints = typing.get_type_hints(cls)
    kinds = [kind for kind in reversed(cls.__mro__) if dataclasses.is_dataclass(kind)]  # fields may be inherited
    helps = {param.arg_name: param.description or "" for kind in kinds for param in parse_from_object(kind).params}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        default = configs.default_of(field) if base is None else getattr(base, field.name)
        hint, here = hints[field.name], (*path, field.name)
        variants = [h for h in (typing.get_args(hint) if configs.is_union(hint) else (hint,)) if dataclasses.is_dataclass(h)]
        merged: dict[str, _Option] = {}
        for variant in variants:
            for option in _options(variant, here, default if isinstance(default, typing.cast(type, variant)) else None):
                if option.default is _EMPTY and default is not dataclasses.MISSING:
                    option = option._replace(default=None)  # required only when its variant is chosen
                other = merged.get(option.key)
                merged[option.key] = option if other is None else other._replace(hint=_either(other.hint, option.hint))
        yield from merged.values()
        if not variants:
            yield _Option(here, hint, _EMPTY if default is dataclasses.MISSING else default, helps.get(field.name, ""))


def _either(left: Any, right: Any) -> Any:
    """The hint of a field that two variants share, such as the `kind: Literal[...]` that tells them apart."""
    if typing.get_origin(left) is typing.get_origin(right) is typing.Literal:
        return typing.Literal[typing.get_args(left) + typing.get_args(right)]
    return left | right


def _function(recipe: ModuleType, tokens: Sequence[str]) -> Callable[..., None]:
    """A function with one parameter for each option of the recipe: cyclopts parses by a function's signature."""
    positional = getattr(recipe, "POSITIONAL", ())
    # What has no default must stand on the command line, unless a file may hold it.
    in_file = any(token == "--config" or token.startswith("--config=") for token in tokens)
    options = sorted(_options(recipe.Config), key=lambda o: positional.index(o.key) if o.key in positional else len(positional))
    own = Group("Configuration", sort_key=3)
    parameters = [_parameter(option, in_file, option.key in positional) for option in options]
    file = Parameter(help="TOML or JSON file of options; those on the command line override it.", group=own)
    show = Parameter(
        help="Print the resolved config as JSON (a file for --config) and exit.", group=own, negative=(), show_default=False
    )
    by_name = inspect.Parameter.KEYWORD_ONLY
    parameters.append(inspect.Parameter("config", by_name, default=None, annotation=Annotated[Path | None, file]))
    parameters.append(inspect.Parameter("print_config", by_name, default=False, annotation=Annotated[bool, show]))

    def function() -> None:
        raise AssertionError("only its signature is used")

    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # PEP 362 lets functions have one
    return function


def _parameter(option: _Option, in_file: bool, by_place: bool) -> inspect.Parameter:
    required = option.default is _EMPTY and not in_file
    empty = option.default is _EMPTY or option.default is None
    variable = typing.get_origin(option.hint) is not tuple or typing.get_args(option.hint)[-1] is Ellipsis
    setting = Parameter(
        name="--" + ".".join(option.path).replace("_", "-"),
        help=" ".join(option.help.split()),
        group=Group(".".join(option.path[:-1]), sort_key=2) if len(option.path) > 1 else Group("Options", sort_key=1),
        show_default=not empty,
        negative_iterable=None if variable else (),
        converter=_none_or_value if not empty and type(None) in typing.get_args(option.hint) else None,
    )
    return inspect.Parameter(
        option.key,
        inspect.Parameter.POSITIONAL_OR_KEYWORD if by_place else inspect.Parameter.KEYWORD_ONLY,
        default=_EMPTY if required else None if empty else option.default,
        # None stands for a value that the config file will give, and says so: pydantic, where it is loaded, checks defaults.
        annotation=Annotated[option.hint | None if empty else option.hint, setting],
    )


def _none_or_value(hint: Any, tokens: Sequence[Token]) -> Any:
    """Of a field with a default only the word says that it is to have no value, which Cyclopts knows from 5 on."""
    values = [token.value for token in tokens]
    if values == ["none"]:
        return None
    try:
        return convert(hint, values)
    except CoercionError as error:  # of a field that it does not know
        raise CoercionError(token=tokens[0], target_type=error.target_type) from None


def _refuse_fractions(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Cyclopts rounds `--steps 3.7` to 4; here it is an error like any other wrong type."""
    for argument in arguments:
        parts = set(typing.get_args(argument.hint)) | {argument.hint}
        if int in parts and not parts & {float, str}:
            for token in argument.tokens:
                if "." in token.value:
                    raise CoercionError(argument=argument, token=token, target_type=int)


def _literal(text: Any) -> Any:
    """What stands on the command line for a field of which only its owner knows the type: JSON where it is, else text."""
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return text


def _resolve(cls: Any, file: Path | None, given: Mapping[str, Any]) -> Any:
    table = configs.load_table(file) if file is not None else {}
    free = {option.key for option in _options(cls) if option.hint == dict[str, Any]}
    for key, value in given.items():
        if key in free:
            value = {name.replace("-", "_"): _literal(item) for name, item in value.items()}
        *parents, last = key.split("__")
        node: Any = table
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):  # `from_dict` will say what is wrong with it
                break
        else:
            inside = node.get(last)
            node[last] = inside | value if key in free and isinstance(inside, dict) else value
    try:
        return configs.from_dict(cls, table)
    except ConfigError as error:
        if file is None:
            raise
        raise ConfigError(f"with config file {str(file)!r}: {error}") from error
