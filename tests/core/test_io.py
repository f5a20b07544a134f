import fcntl
import json
import os
import signal
import struct
import subprocess
import sys

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from athanor.core import io
from athanor.core.errors import CheckpointError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int64), "half": torch.ones(3).bfloat16()}


def _names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_atomic_write_replaces_text_and_bytes(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    io.atomic_write(path, "first")
    io.atomic_write(path, "zweite Größe\r\n")
    assert path.read_bytes() == "zweite Größe\r\n".encode()
    io.atomic_write(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert _names(path.parent) == ["file.txt"]


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    io.atomic_write(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(io.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        io.atomic_write(path, "new")
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["file.txt"]


def test_content_is_on_disk_before_the_name_appears(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(io, "_sync", lambda p: events.append(("sync", os.path.basename(p)[:5])))
    replace, rename = os.replace, os.rename
    monkeypatch.setattr(io.os, "replace", lambda a, b: (events.append(("name", b.name)), replace(a, b)))
    monkeypatch.setattr(io.os, "rename", lambda a, b: (events.append(("name", b.name)), rename(a, b)))
    folder = tmp_path / "place"
    folder.mkdir()
    io.atomic_write(folder / "file", "x")
    assert events == [("sync", ".tmp-"), ("name", "file"), ("sync", "place")]
    events.clear()
    with io.atomic_dir(folder / "box") as box:
        (box / "sub").mkdir()
        (box / "sub" / "inner").write_text("x")
    assert events == [("sync", "inner"), ("sync", "sub"), ("sync", ".tmp-"), ("name", "box"), ("sync", "place")]


def test_atomic_dir_makes_and_replaces(tmp_path):
    path = tmp_path / "runs" / "box"
    for value in ("one", "two"):
        with io.atomic_dir(path) as box:
            (box / value).write_text(value)
            assert not (path / value).exists()
        assert _names(path) == [value]
        assert _names(path.parent) == ["box"]


def test_a_failed_block_leaves_the_old_folder(tmp_path):
    path = tmp_path / "box"
    with io.atomic_dir(path) as box:
        (box / "one").write_text("1")
    with pytest.raises(KeyboardInterrupt), io.atomic_dir(path) as box:
        (box / "two").write_text("2")
        raise KeyboardInterrupt
    assert _names(path) == ["one"]
    assert _names(tmp_path) == ["box"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    path = tmp_path / "box"
    with io.atomic_dir(path) as box:
        (box / "one").write_text("1")
    rename = os.rename

    def fail_on_new(source, target):
        if target == path and source.name.startswith(".tmp-"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(io.os, "rename", fail_on_new)
    with pytest.raises(OSError, match="no"), io.atomic_dir(path) as box:
        (box / "two").write_text("2")
    assert _names(path) == ["one"]
    assert _names(tmp_path) == ["box"]


def test_atomic_dir_does_not_replace_a_file(tmp_path):
    path = tmp_path / "box"
    path.write_text("precious")
    with pytest.raises(CheckpointError, match="is a file where a folder is to be written: remove it"), io.atomic_dir(path):
        pass
    assert path.read_text() == "precious"


WRITER = """
import os, signal, sys
from pathlib import Path
from athanor.core import io

target, kind, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
calls = 0

def killing(function):
    def call(*args, **kwargs):
        global calls
        if armed:
            calls += 1
            if calls == count and kind == "before":
                os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if armed and calls == count and kind == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

armed = False
for name in ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir"):
    setattr(os, name, killing(getattr(os, name)))
for value in ("old", "new"):
    armed = value == "new"
    with io.atomic_dir(target) as box:
        for name in ("one", "two", "three"):
            (box / name).write_text(value)
armed = False
print(calls)
"""


def _write_and_die(target, when, count):
    argv = [sys.executable, "-c", WRITER, str(target), when, str(count)]
    return subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def test_killed_at_every_step_the_folder_is_whole_after_recovery(tmp_path):
    done = _write_and_die(tmp_path / "calm" / "box", "before", 0)
    assert done.returncode == 0, done.stderr
    steps = int(done.stdout)
    assert steps >= 10  # mkdir, three files and a folder synced, two renames, parent synced, rename, three unlinks, rmdir
    outcomes = []
    for count in range(1, steps + 1):
        folder = tmp_path / str(count)
        target = folder / "box"
        killed = _write_and_die(target, "before" if count % 2 else "after", count)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        if target.exists():  # a reader who comes before recovery
            assert _names(target) == ["one", "three", "two"]
            assert len({p.read_text() for p in target.iterdir()}) == 1
        io.recover(target)
        assert _names(folder) == ["box"]
        assert _names(target) == ["one", "three", "two"]
        (value,) = {p.read_text() for p in target.iterdir()}
        outcomes.append(value)
    assert outcomes == sorted(outcomes, reverse=True)  # old up to some step, new from there on
    assert set(outcomes) == {"old", "new"}


def _leave(folder, name, content):
    (folder / name).mkdir()
    (folder / name / content).write_text("")


def test_recover_restores_the_old_folder_only_when_the_target_is_missing(tmp_path):
    _leave(tmp_path, ".old-0123abcd-box", "old")
    _leave(tmp_path, ".tmp-0123abcd-box", "half")
    (tmp_path / ".tmp-00000000-box").write_text("half a file")
    io.recover(tmp_path / "box")
    assert _names(tmp_path) == ["box"]
    assert _names(tmp_path / "box") == ["old"]
    _leave(tmp_path, ".old-0123abcd-box", "older")
    io.recover(str(tmp_path / "box"))
    assert _names(tmp_path) == ["box"]
    assert _names(tmp_path / "box") == ["old"]


def test_recover_leaves_what_belongs_to_others(tmp_path):
    for name in (".tmp-0123abcd-box-2", ".tmp-0123-box", ".tmp-mine", "tmp-0123abcd-box", ".old-0123abcd-Xbox"):
        _leave(tmp_path, name, "x")
    before = _names(tmp_path)
    io.recover(tmp_path / "box")
    assert _names(tmp_path) == before
    io.recover(tmp_path / "absent" / "box")


def test_atomic_dir_recovers_first(tmp_path):
    _leave(tmp_path, ".old-0123abcd-box", "old")
    with pytest.raises(ValueError, match="mine"), io.atomic_dir(tmp_path / "box"):
        raise ValueError("mine")
    assert _names(tmp_path / "box") == ["old"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(obj=JSON)
def test_json_round_trip(tmp_path_factory, obj):
    path = tmp_path_factory.getbasetemp() / "round.json"
    try:
        io.write_json(path, obj)
    except UnicodeEncodeError:  # a lone surrogate is not text
        return
    assert io.read_json(path) == obj


def test_nan_is_refused_both_ways(tmp_path):
    path = tmp_path / "x.json"
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            io.write_json(path, {"loss": value})
    assert not path.exists()
    path.write_text('{"loss": NaN}')
    with pytest.raises(CheckpointError, match=r"x\.json is not JSON \(NaN is not JSON\): .*copy it again"):
        io.read_json(path)


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe{}", b"[" * 100_000])
def test_malformed_json_names_the_file(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.json is not JSON"):
        io.read_json(path)


def test_missing_json_names_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.json cannot be read \(No such file or directory\): check the path"):
        io.read_json(tmp_path / "absent.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        io.read_json(tmp_path)


def test_hashes_are_those_of_sha256sum(tmp_path):
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (tmp_path / "x").write_bytes(b"")
    assert io.sha256_text("") == io.sha256_file(tmp_path / "x") == empty
    (tmp_path / "y").write_bytes(b"abc" * 1_000_000)
    assert io.sha256_file(tmp_path / "y") == io.sha256_text("abc" * 1_000_000)
    assert io.sha256_text("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_tensors_round_trip_and_are_readable_by_the_library(tmp_path):
    path = tmp_path / "deep" / "x.safetensors"
    io.save_tensors(path, {**TENSORS, "turned": torch.arange(6.0).reshape(2, 3).T, "grown": torch.ones(2, requires_grad=True)})
    loaded = io.load_tensors(path)
    assert {k: v.dtype for k, v in loaded.items() if k in TENSORS} == {k: v.dtype for k, v in TENSORS.items()}
    assert all(torch.equal(loaded[k], v) for k, v in TENSORS.items())
    assert torch.equal(loaded["turned"], torch.arange(6.0).reshape(2, 3).T)
    assert not loaded["grown"].requires_grad
    with safetensors.safe_open(path, "np") as opened:
        assert opened.get_tensor("a").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert _names(path.parent) == ["x.safetensors"]


def test_the_header_holds_the_metadata_in_a_fixed_order(tmp_path):
    metadata = {key: f'{key} "quoted" \n\x01 é' for key in "zyxwvutsrq"}
    io.save_tensors(tmp_path / "x", TENSORS, metadata)
    header = io.read_header(tmp_path / "x")
    assert header["a"] == {"dtype": "F32", "shape": [2, 3], "data_offsets": header["a"]["data_offsets"]}
    assert header["__metadata__"] == metadata
    assert list(header["__metadata__"]) == sorted(metadata)
    with safetensors.safe_open(tmp_path / "x", "pt") as opened:
        assert opened.metadata() == metadata
    assert torch.equal(io.load_tensors(tmp_path / "x")["a"], TENSORS["a"])


def test_a_file_of_tensors_may_be_read_by_whom_other_files_may_be(tmp_path):
    (tmp_path / "plain").touch()
    io.save_tensors(tmp_path / "x", TENSORS)
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_empty_and_scalar_tensors(tmp_path):
    io.save_tensors(tmp_path / "x", {"none": torch.empty(0, 3), "one": torch.tensor(2.5)})
    loaded = io.load_tensors(tmp_path / "x")
    assert loaded["none"].shape == (0, 3)
    assert loaded["one"].item() == 2.5
    io.save_tensors(tmp_path / "y", {})
    assert io.load_tensors(tmp_path / "y") == {}


def _file(tmp_path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def _entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "what"),
    [
        (b"{not json}", b"", "its header is not JSON"),
        (b"\xff\xff", b"", "its header is not JSON"),
        (b"[" * 100_000, b"", "its header is not JSON"),
        ([1], b"", "its header is not a JSON object"),
        ({"w": 3}, b"", "'w' has an entry of unknown dtype or form: 3"),
        ({"w": {"dtype": "F32"}}, b"", "'w' has an entry of unknown dtype or form"),
        ({"w": _entry("F31")}, b"1234", "'w' has an entry of unknown dtype or form"),
        ({"w": _entry(shape=(-1,))}, b"1234", "'w' has an entry of unknown dtype or form"),
        ({"w": _entry(offsets=(0, 4, 8))}, b"1234", "'w' has an entry of unknown dtype or form"),
        ({"w": _entry(offsets=(0, 4.0))}, b"1234", "'w' has an entry of unknown dtype or form"),
        ({"w": _entry(offsets=(4, 0))}, b"1234", r"'w' of shape \[1\] and dtype F32 takes -4 bytes"),
        ({"w": _entry(shape=(2,))}, b"1234", r"'w' of shape \[2\] and dtype F32 takes 4 bytes"),
        ({"w": _entry(offsets=(4, 8))}, b"12345678", "leave a gap or overlap at byte 0"),
        ({"v": _entry(), "w": _entry()}, b"1234", "leave a gap or overlap at byte 4"),
        ({"w": _entry()}, b"123", "need 4 bytes of data and it holds 3"),
        ({"w": _entry()}, b"12345", "need 4 bytes of data and it holds 5"),
    ],
)
def test_a_damaged_file_is_refused_saying_what_is_wrong(tmp_path, header, data, what):
    path = _file(tmp_path, header, data)
    with pytest.raises(CheckpointError, match=rf"bad\.safetensors is not a whole safetensors file: .*{what}.*copy it again"):
        io.load_tensors(path)


@pytest.mark.parametrize("length", [1 << 63, 100_000_001, 1000])
def test_a_stated_header_length_beyond_the_file_is_not_believed(tmp_path, length):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(CheckpointError, match=f"ask for a header of {length} bytes and the file has 10"):
        io.read_header(path)


def test_a_missing_tensor_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent cannot be read \(No such file or directory\)"):
        io.load_tensors(tmp_path / "absent")


def test_every_truncation_and_extension_is_refused(tmp_path):
    path = tmp_path / "x"
    io.save_tensors(path, TENSORS, {"k": "v"})
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            io.load_tensors(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError):
        io.load_tensors(path)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_any_altered_byte_loads_or_is_a_checkpoint_error(tmp_path_factory, position, value):
    path = tmp_path_factory.getbasetemp() / "altered"
    io.save_tensors(path, TENSORS, {"k": "v"})
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    refusal = ""
    try:
        io.load_tensors(path)
    except CheckpointError as error:
        refusal = str(error)
    assert not refusal or "altered is not a whole safetensors file" in refusal


def test_a_folder_written_by_several_is_placed_by_one(tmp_path):
    path = tmp_path / "box"
    temporary = io.temporary_dir(path, "0123abcd")
    assert temporary.parent == tmp_path and not temporary.exists()
    for content in ("one", "two"):
        temporary.mkdir()
        (temporary / content).write_text("x")
        io.place_dir(temporary, path)
        assert _names(path) == [content] and _names(tmp_path) == ["box"]
    temporary.mkdir()  # its writers were killed
    io.recover(path)
    assert _names(tmp_path) == ["box"]


def test_a_removed_folder_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "box"
    path.mkdir()
    (path / "one").write_text("1")
    (path / "two").write_text("2")
    seen = []

    def killed(folder):
        seen.append(path.exists())
        (folder / "one").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(io.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        io.remove_dir(path)
    monkeypatch.undo()
    assert seen == [False] and len(_names(tmp_path)) == 1
    io.recover(path)
    assert _names(tmp_path) == []


def test_a_folders_name_is_gone_from_the_disk_before_its_files(tmp_path, monkeypatch):
    path = tmp_path / "place" / "box"
    path.mkdir(parents=True)
    events = []
    remove = io.shutil.rmtree
    monkeypatch.setattr(io, "_sync", lambda p: events.append(("sync", p.name)))
    monkeypatch.setattr(io.shutil, "rmtree", lambda p: (events.append(("remove", p.name[:5])), remove(p)))
    io.remove_dir(path)
    assert events == [("sync", "place"), ("remove", ".tmp-")]


def test_one_writer_at_a_time(tmp_path):
    path = tmp_path / "new" / "box"
    with io.new_place(path):
        with pytest.raises(CheckpointError, match=r"another process is writing .*box: wait until it ends"), io.new_place(path):
            raise AssertionError
        with io.new_place(tmp_path / "new" / "other"):
            pass
    assert list(path.parent.iterdir()) == []
    (path.parent / ".lock-box").touch()  # of a killed writer
    with io.new_place(path):
        pass
    assert list(path.parent.iterdir()) == []


def test_a_lock_on_a_file_that_is_gone_is_none(tmp_path, monkeypatch):
    """The last owner removes the file between our opening it and our locking it."""
    lock, true = tmp_path / ".lock-box", fcntl.flock

    def late(descriptor, how):
        monkeypatch.setattr(fcntl, "flock", true)
        lock.unlink()
        true(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with io.new_place(tmp_path / "box"):
        assert lock.exists()
        with pytest.raises(CheckpointError, match="another process is writing"), io.new_place(tmp_path / "box"):
            raise AssertionError


def test_what_safetensors_cannot_write_is_our_error(tmp_path, monkeypatch):
    import safetensors.torch

    def full(*args, **kw):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be written \(I/O error: No space .*free some room"):
        io.save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []
