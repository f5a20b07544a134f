"""C++ of our own: compiled once, kept, and gone without where it can't be had."""

import ctypes
import stat

import pytest
import torch

from athanor.core import native

pytestmark = pytest.mark.skipif(
    bool(native.refusal()) or not native.compiler(), reason=f"nothing is compiled here: {native.state()}"
)


@pytest.fixture(autouse=True)
def _anew(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.load.cache_clear()
    yield
    native.load.cache_clear()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "twice.cpp"
    path.write_text('extern "C" int twice(int n) { return 2 * n; }')
    return path


def kept():
    return sorted(path.name for path in native.folder().iterdir())


def test_a_file_is_compiled_once_and_anew_when_it_changes(source):
    assert native.load(source).twice(21) == 42
    (first,) = kept()
    assert first.startswith("twice-") and first.endswith(".so")
    assert stat.S_IMODE(native.folder().stat().st_mode) == 0o700
    when = (native.folder() / first).stat().st_mtime_ns
    native.load.cache_clear()
    assert native.load(source).twice(4) == 8
    assert (native.folder() / first).stat().st_mtime_ns == when
    source.write_text('extern "C" int twice(int n) { return n + n + 1; }')
    native.load.cache_clear()
    assert native.load(source).twice(4) == 9
    assert len(kept()) == 2


def test_what_is_compiled_needs_no_compiler_any_more(source, monkeypatch):
    native.load(source)
    native.load.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert isinstance(native.load(source), ctypes.CDLL)


def test_without_a_compiler_there_is_nothing(source, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.load(source) is None
    assert native.state() == "PyTorch (no C++ compiler)"


def test_it_can_be_turned_off(source, monkeypatch):
    assert native.state() == "C++"
    monkeypatch.setenv("ATHANOR_NATIVE", "0")
    assert native.load(source) is None
    assert native.state() == "PyTorch (ATHANOR_NATIVE=0)"


def test_other_processors_go_without(source, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert native.load(source) is None
    assert native.state() == "PyTorch (no AVX-512)"


def test_a_compiler_that_fails_is_told_once_and_leaves_nothing(source):
    source.write_text("int twice(")
    with pytest.warns(RuntimeWarning, match=r"twice\.cpp could not be compiled by .* and kept \(.*\): PyTorch"):
        assert native.load(source) is None
    assert native.load(source) is None  # a second warning would be an error
    assert kept() == []


def test_a_folder_that_cannot_be_written_is_told(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(
        RuntimeWarning, match="mend the compiler or the folder .XDG_CACHE_HOME names another., or set ATHANOR_NATIVE=0"
    ):
        assert native.load(source) is None


def test_without_a_home_it_is_told(source, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(native.Path, "home", home)
    with pytest.warns(RuntimeWarning, match="could not be compiled .*Could not determine home directory"):
        assert native.load(source) is None


def test_a_damaged_file_is_made_anew(source, tmp_path, monkeypatch):
    native.load(source)
    native.load.cache_clear()
    (name,) = kept()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    native.folder().mkdir(parents=True)
    (native.folder() / name).write_bytes(b"no library")
    assert native.load(source).twice(21) == 42
    assert kept() == [name]
