"""Plugins by file name: the file `src/athanor/<room>/<name>.py` IS the plugin `<name>` of that room.

A room is a package path below `athanor` with dots, such as "models" or "evals.tasks". Files whose names begin
with an underscore, and those in `_FURNITURE` (shared code of a room), are not plugins. Folders named in the environment variable
`ATHANOR_PLUGINS` (separated like PATH) and those given to `add_folder` are searched too: `<folder>/evals/tasks/mine.py`
adds the skill `mine` with nothing to register.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from athanor.core.errors import PluginError, nearest

_ROOT = Path(__file__).resolve().parent.parent
# Files that a room's plugins share, so not plugins themselves.
_FURNITURE = {"models": {"base", "decoder", "fields", "heads", "io", "keys"}}
_folders: list[Path] = []


def add_folder(folder: str | Path) -> None:
    """Search `folder` for plugins from now on, laid out as `<folder>/<room with slashes>/<name>.py`."""
    path = Path(folder).resolve()
    if not path.is_dir():
        raise PluginError(f"plugin folder {str(path)!r} is not a folder: give one laid out as FOLDER/evals/tasks/NAME.py")
    if path not in _folders:
        _folders.append(path)


def _extra_folders() -> Iterator[Path]:
    yield from _folders
    for part in os.environ.get("ATHANOR_PLUGINS", "").split(os.pathsep):
        if part:
            yield Path(part).resolve()


def _files(room: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for root in (_ROOT, *_extra_folders()):
        for path in sorted((root / room.replace(".", "/")).glob("*.py")):
            name = path.stem
            if name.startswith("_") or name in _FURNITURE.get(room, ()):
                continue
            if name in found and found[name] != path:
                raise PluginError(f"plugin {name!r} of {room!r} exists twice, as {found[name]} and {path}: rename one")
            found[name] = path
    return found


def names(room: str) -> list[str]:
    """The names of all plugins of `room`, sorted; nothing is imported."""
    return sorted(_files(room))


def find(room: str, name: str) -> Path:
    """The file of plugin `name` of `room`; nothing is imported.

    Raises PluginError when no file has that name (the nearest one is offered).
    """
    files = _files(room)
    if name not in files:
        raise PluginError(
            f"no {name!r} in {room!r}{nearest(name, files)} It has: {', '.join(sorted(files)) or 'nothing'}."
            f" To add one, write the file {room.replace('.', '/')}/{name}.py."
        )
    return files[name]


def load(room: str, name: str) -> ModuleType:
    """Import plugin `name` of `room`. Raises PluginError as `find` does."""
    path = find(room, name)
    if path.is_relative_to(_ROOT):
        return importlib.import_module(f"athanor.{room}.{name}")
    module_name = f"athanor_plugins.{room}.{name}"
    module = sys.modules.get(module_name)
    if module is not None and module.__file__ == str(path):
        return module
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module


def require(room: str, name: str, *attributes: str) -> ModuleType:
    """`load(room, name)`, and check that the file defines `attributes`.

    Raises PluginError naming the file and what it lacks.
    """
    module = load(room, name)
    missing = [a for a in attributes if not hasattr(module, a)]
    if missing:
        raise PluginError(f"{module.__file__} must define {', '.join(missing)} to be a plugin of {room!r}")
    return module
