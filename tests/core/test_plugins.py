import os
import sys

import pytest

from athanor.core import plugins
from athanor.core.errors import PluginError


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch):
    monkeypatch.setattr(plugins, "_folders", [])
    monkeypatch.delenv("ATHANOR_PLUGINS", raising=False)
    yield
    for name in [n for n in sys.modules if n.startswith("athanor_plugins.")]:
        del sys.modules[name]


def _write(folder, room, name, text="VALUE = 1\n"):
    path = folder / room.replace(".", "/") / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_files_of_a_room_are_its_plugins():
    names = "config device dist errors hub io native plugins runs stage track weights"
    assert plugins.names("core") == names.split()
    assert plugins.load("core", "errors") is sys.modules["athanor.core.errors"]


def test_names_are_sorted_and_import_nothing(tmp_path):
    _write(tmp_path, "some.room", "zeta", "raise RuntimeError('imported')")
    _write(tmp_path, "some.room", "alpha")
    _write(tmp_path, "some.room", "_shared")
    plugins.add_folder(tmp_path)
    assert plugins.names("some.room") == ["alpha", "zeta"]
    assert plugins.names("no.such.room") == []


def test_shared_files_of_the_models_room_are_no_plugins(tmp_path):
    for name in ("base", "io", "heads", "tiny"):
        _write(tmp_path, "models", name)
    plugins.add_folder(tmp_path)
    found = plugins.names("models")
    assert "tiny" in found
    assert not {"base", "io", "heads"} & set(found)


def test_folders_of_the_environment_variable(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    _write(first, "some.room", "one", "VALUE = 'one'\n")
    _write(second, "some.room", "two")
    monkeypatch.setenv("ATHANOR_PLUGINS", f"{first}{os.pathsep}{os.pathsep}{second}")
    assert plugins.names("some.room") == ["one", "two"]
    assert plugins.load("some.room", "one").VALUE == "one"


def test_find_gives_the_file_and_imports_nothing(tmp_path):
    path = _write(tmp_path, "some.room", "one", "raise RuntimeError('imported')")
    plugins.add_folder(tmp_path)
    assert plugins.find("some.room", "one") == path
    with pytest.raises(PluginError, match=r"no 'on' in 'some\.room'; did you mean 'one'"):
        plugins.find("some.room", "on")


def test_a_plugin_is_imported_once(tmp_path):
    _write(tmp_path, "some.room", "one", "VALUES = []\n")
    plugins.add_folder(tmp_path)
    plugins.load("some.room", "one").VALUES.append(1)
    assert plugins.load("some.room", "one").VALUES == [1]


def test_a_folder_added_twice_is_searched_once(tmp_path):
    _write(tmp_path, "some.room", "one")
    plugins.add_folder(tmp_path)
    plugins.add_folder(str(tmp_path))
    assert plugins.names("some.room") == ["one"]


def test_the_same_folder_added_and_in_the_environment_is_no_conflict(tmp_path, monkeypatch):
    _write(tmp_path, "some.room", "one")
    plugins.add_folder(tmp_path)
    monkeypatch.setenv("ATHANOR_PLUGINS", str(tmp_path))
    assert plugins.names("some.room") == ["one"]


def test_two_files_of_one_name_are_an_error(tmp_path):
    first = _write(tmp_path / "first", "some.room", "one")
    second = _write(tmp_path / "second", "some.room", "one")
    plugins.add_folder(tmp_path / "first")
    plugins.add_folder(tmp_path / "second")
    with pytest.raises(PluginError, match=r"'one' of 'some\.room' exists twice.*rename one") as caught:
        plugins.names("some.room")
    assert str(first) in str(caught.value)
    assert str(second) in str(caught.value)


def test_an_unknown_name_offers_the_nearest_and_the_file_to_write(tmp_path):
    _write(tmp_path, "some.room", "arithmetic")
    plugins.add_folder(tmp_path)
    with pytest.raises(
        PluginError, match=r"no 'arithmetik' in 'some\.room'; did you mean 'arithmetic'\? .*some/room/arithmetik\.py"
    ):
        plugins.load("some.room", "arithmetik")
    with pytest.raises(PluginError, match="It has: nothing"):
        plugins.load("an.empty.room", "x")


def test_a_folder_that_is_none_is_an_error(tmp_path):
    with pytest.raises(PluginError, match="is not a folder: give one laid out as"):
        plugins.add_folder(tmp_path / "absent")


def test_require_names_what_a_file_lacks(tmp_path):
    path = _write(tmp_path, "some.room", "one")
    plugins.add_folder(tmp_path)
    assert plugins.require("some.room", "one", "VALUE").VALUE == 1
    with pytest.raises(PluginError, match=r"must define build, score to be a plugin of 'some\.room'") as caught:
        plugins.require("some.room", "one", "build", "VALUE", "score")
    assert str(path) in str(caught.value)
