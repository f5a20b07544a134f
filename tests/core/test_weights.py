import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from athanor.core import io, weights
from athanor.core.errors import CheckpointError
from athanor.core.weights import open_weights, save_sharded

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([1, -2], dtype=torch.int64),
    "half": torch.linspace(-3, 3, 5).bfloat16(),
    "scalar": torch.tensor(7.5),
    "none": torch.zeros(3, 0),
    "yes": torch.tensor([True, False]),
}


def same(a, b):
    """Equal in dtype, shape and every bit."""
    bits = [x.contiguous().view(-1).view(torch.uint8) if x.numel() else x.view(-1) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def plain(path, header, data=b""):
    """A safetensors file with the given header (an object or raw bytes)."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def entry(shape=(1,), begin=0, end=4, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def shards(folder, **named):
    """Two shards, s1 with tensor `a` and s2 with `b` and `c`, and an index; `named` changes its weight_map (None removes)."""
    folder.mkdir(exist_ok=True)
    io.save_tensors(folder / "s1.safetensors", {"a": torch.ones(2)})
    io.save_tensors(folder / "s2.safetensors", {"b": torch.ones(3), "c": torch.zeros(1)})
    placed = {"a": "s1.safetensors", "b": "s2.safetensors", "c": "s2.safetensors"} | named
    io.write_json(folder / INDEX, {"weight_map": {name: file for name, file in placed.items() if file is not None}})
    return folder


# --- reading -------------------------------------------------------------------------------------------------------------


def test_one_file(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / SINGLE, metadata={"format": "pt"})
    found = open_weights(tmp_path)
    assert sorted(found) == sorted(TENSORS) and len(found) == len(TENSORS)
    assert found.nbytes == sum(t.nbytes for t in TENSORS.values())
    assert "a" in found and "z" not in found
    for name, tensor in TENSORS.items():
        assert (found[name].shape, found[name].dtype, found[name].nbytes) == (tuple(tensor.shape), tensor.dtype, tensor.nbytes)
        assert same(found.read(name), tensor)
    one = found["b"]
    raw = one.file.read_bytes()
    assert raw[one.offset : one.offset + one.nbytes] == TENSORS["b"].numpy().tobytes()


def test_every_dtype_of_the_format_is_known():
    assert weights._DTYPES.keys() == io._DTYPE_BITS.keys()
    for name, dtype in weights._DTYPES.items():
        assert dtype.itemsize * 8 == io._DTYPE_BITS[name]


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64),
    torch.complex64,
]


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = draw(st.binary(min_size=count, max_size=count))
    if dtype == torch.bool:
        raw = bytes(b & 1 for b in raw)
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype).reshape(shape)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])).filter(lambda s: s != "__metadata__"), tensors(), max_size=4
    )
)
def test_what_safetensors_writes_reads_back_bit_by_bit(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("any")
    safetensors.torch.save_file(content, folder / SINGLE)
    found = open_weights(folder)
    assert set(found) == set(content)
    for name, tensor in content.items():
        assert same(found.read(name), tensor)
        out = torch.empty_like(tensor)
        assert found.read(name, out) is out and same(out, tensor)


def test_reading_into_rows_of_a_larger_tensor(tmp_path):
    io.save_tensors(tmp_path / SINGLE, TENSORS)
    found = open_weights(tmp_path)
    large = torch.full((5, 3), -1.0)
    rows = large[1:3]
    assert found.read("a", rows) is rows
    assert torch.equal(large[1:3], TENSORS["a"])
    assert (large[[0, 3, 4]] == -1).all()
    columns = torch.full((3, 5), -1.0)
    found.read("a", columns.T[2:4])  # not contiguous
    assert torch.equal(columns.T[2:4], TENSORS["a"]) and (columns[:, [0, 1, 4]] == -1).all()


def test_reading_into_another_floating_dtype_converts(tmp_path):
    io.save_tensors(tmp_path / SINGLE, TENSORS)
    found = open_weights(tmp_path)
    assert torch.equal(found.read("half", torch.empty(5)), TENSORS["half"].float())
    assert torch.equal(found.read("a", torch.empty(2, 3, dtype=torch.float16)), TENSORS["a"].half())


def test_reading_into_a_parameter(tmp_path):
    io.save_tensors(tmp_path / SINGLE, TENSORS)
    parameter = torch.nn.Parameter(torch.empty(2, 3))
    assert open_weights(tmp_path).read("a", parameter) is parameter
    assert torch.equal(parameter, TENSORS["a"]) and parameter.requires_grad and parameter.grad_fn is None


def test_new_memory_is_on_the_cpu_whatever_the_default_device_is(tmp_path):
    io.save_tensors(tmp_path / SINGLE, TENSORS)
    with torch.device("meta"):
        tensor = open_weights(tmp_path).read("a")
    assert torch.equal(tensor, TENSORS["a"])


@pytest.mark.parametrize(
    ("name", "out", "message"),
    [
        ("hulf", None, "holds no tensor 'hulf'; did you mean 'half'?"),
        ("a", torch.empty(3, 2), "tensor 'a' of .* has shape (2, 3) and is to be read into (3, 2): use the config"),
        ("a", torch.empty(2, 3, dtype=torch.int32), "tensor 'a' of .* is torch.float32 and is to be read as torch.int32: only"),
        ("b", torch.empty(2), "tensor 'b' of .* is torch.int64 and is to be read as torch.float32: only floating dtypes"),
        ("b", torch.empty(2, dtype=torch.int32), "tensor 'b' of .* is torch.int64 and is to be read as torch.int32"),
    ],
)
def test_what_does_not_fit_is_not_read(tmp_path, name, out, message):
    io.save_tensors(tmp_path / SINGLE, TENSORS)
    with pytest.raises(CheckpointError, match=re.escape(message).replace(r"\.\*", ".*")):
        open_weights(tmp_path).read(name, out)


def test_a_file_that_changes_after_it_was_opened(tmp_path):
    io.save_tensors(tmp_path / SINGLE, TENSORS)
    found = open_weights(tmp_path)
    path = tmp_path / SINGLE
    path.write_bytes(path.read_bytes()[: found["a"].offset + 5])
    with pytest.raises(CheckpointError, match=r"safetensors ends within tensor 'a': it changed while it was read; copy or"):
        found.read("a")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"safetensors cannot be read \(No such file or directory\): copy or"):
        found.read("a")


def test_a_bool_of_another_value(tmp_path):
    plain(tmp_path / SINGLE, {"w": entry((4,), dtype="BOOL")}, b"\0\1\2\0")
    with pytest.raises(CheckpointError, match=r"tensor 'w' of .* holds a bool that is neither 0 nor 1"):
        open_weights(tmp_path).read("w")


MEASURE = """
import sys
from pathlib import Path
import torch
from athanor.core.weights import open_weights

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

torch.ones(8).bfloat16().float()
before = memory("VmRSS")
found = open_weights(Path(sys.argv[1]))
dtype = {"same": None, "float32": torch.float32}[sys.argv[2]]
held = []
for name in found:
    out = None if dtype is None else torch.empty(found[name].shape, dtype=dtype)
    held.append(found.read(name, out))
print(sum(t.nbytes for t in held), memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
@pytest.mark.parametrize(("dtype", "temporary"), [("same", 0), ("float32", 1 / 16)])
def test_loading_takes_the_memory_of_the_weights(tmp_path, dtype, temporary):
    # Two shards: neither may be read as a whole, nor may its pages be counted; converting costs one tensor of the file more.
    size = 100_000_000 if dtype == "float32" else 200_000_000
    save_sharded(tmp_path, {f"w{i}": torch.ones(size // 16, dtype=torch.bfloat16) for i in range(8)}, max_bytes=size // 2)
    argv = [sys.executable, "-c", MEASURE, str(tmp_path), dtype]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr
    held, peak = map(int, done.stdout.split())
    assert held == 200_000_000
    assert held <= peak <= (1.15 + temporary) * held


# --- hostile files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"w": entry(dtype="F31")}, b"1234", "unknown dtype or form"),
        ({"w": entry(dtype="f32")}, b"1234", "unknown dtype or form"),
        ({"w": entry(dtype="__class__")}, b"1234", "unknown dtype or form"),
        ({"w": entry(dtype=[])}, b"1234", "unknown dtype or form"),
        ({"w": entry((-1, -1))}, b"1234", "unknown dtype or form"),
        ({"w": entry((True,))}, b"1234", "unknown dtype or form"),
        ({"w": entry((1.0,))}, b"1234", "unknown dtype or form"),
        ({"w": entry((2**63, 0), 0, 0)}, b"", "unknown dtype or form"),
        ({"w": entry([1] * 65)}, b"1234", "unknown dtype or form"),
        ({"w": entry([9] * 1_000_000)}, b"1234", "unknown dtype or form"),
        ({"w": entry() | {"shape": {}}}, b"1234", "unknown dtype or form"),
        ({"w": entry() | {"shape": ""}}, b"1234", "unknown dtype or form"),
        ({"w": entry(begin=False)}, b"1234", "unknown dtype or form"),
        ({"w": entry((2**62,))}, b"1234", "takes 4 bytes"),
        ({"w": entry((2**32, 2**32))}, b"1234", "takes 4 bytes"),
        ({"w": entry((2**62,), 0, 2**64)}, b"1234", "unknown dtype or form"),
        ({"w": entry((2**60,), 0, 2**62)}, b"1234", f"tensors need {2**62} bytes of data and it holds 4"),
        ({"w": entry(begin=4, end=0)}, b"1234", "takes -4 bytes"),
        ({"w": entry((0, 2**62, 2**62), 0, 0)}, b"", "'w' has the shape .* which no tensor can have"),
        ({"w": entry((2**40, 0, 2**40), 0, 0)}, b"", "'w' has the shape .* which no tensor can have"),
        (b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "shape": [1]}}', b"1234", "the key 'shape' twice"),
        (
            b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
            b'"w": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}',
            b"1234",
            "the key 'w' twice",
        ),
        (b'{"w": ' + b"[" * 100_000, b"", "not JSON"),
        (b'{"w": ' + b"9" * 10_000 + b"}", b"", "not JSON"),
        ([], b"", "not a JSON object"),
    ],
)
def test_hostile_headers_are_refused_before_memory_is_taken(tmp_path, header, data, message):
    plain(tmp_path / SINGLE, header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_weights(tmp_path)
    assert len(str(caught.value)) < 1000


def test_truncated_files(tmp_path):
    io.save_tensors(tmp_path / "whole", {"a": torch.ones(2)})
    whole = (tmp_path / "whole").read_bytes()
    for length in range(len(whole)):
        (tmp_path / SINGLE).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
            open_weights(tmp_path)


def test_a_header_longer_than_the_file(tmp_path):
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(CheckpointError, match=f"ask for a header of {2**63} bytes and the file has 10"):
        open_weights(tmp_path)


@given(st.randoms(use_true_random=False))
def test_damage_raises_nothing_but_checkpoint_errors(tmp_path_factory, rng: random.Random):
    folder = tmp_path_factory.mktemp("damaged")
    safetensors.torch.save_file(TENSORS, folder / SINGLE, metadata={"format": "pt"})
    raw = bytearray((folder / SINGLE).read_bytes())
    for _ in range(rng.randint(1, 3)):
        raw[rng.randrange(len(raw))] = rng.choice([0, 0x30, 0x39, 0x5B, 0xFF, rng.randrange(256)])
    if rng.random() < 0.3:
        del raw[rng.randrange(len(raw)) :]
    (folder / SINGLE).write_bytes(raw)
    try:
        found = open_weights(folder)
        for name in found:
            found.read(name)
    except CheckpointError:
        pass


# --- shards --------------------------------------------------------------------------------------------------------------


def test_shards(tmp_path):
    found = open_weights(shards(tmp_path))
    assert list(found) == ["a", "b", "c"]
    assert found["c"].file == tmp_path / "s2.safetensors"
    assert torch.equal(found.read("b"), torch.ones(3))


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"a": "s2.safetensors"}, "s2.safetensors lacks 'a'. The remedy"),
        ({"d": "s2.safetensors"}, "s2.safetensors lacks 'd'"),
        ({"c": None}, "s2.safetensors holds 'c', which the index does not name"),
        ({"c": "s1.safetensors"}, "s1.safetensors lacks 'c'; s2.safetensors holds 'c', which the index places in s1.safetensors"),
        ({"d": "s3.safetensors"}, "'s3.safetensors' is missing, or not a regular file"),
        ({f"x{i}": "s1.safetensors" for i in range(9)}, "lacks 'x5' and 3 more. The remedy: copy or download the folder again."),
    ],
)
def test_an_index_that_does_not_fit_its_shards(tmp_path, named, message):
    with pytest.raises(CheckpointError, match=r"index.json cannot be used: .*" + re.escape(message)):
        open_weights(shards(tmp_path, **named))


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "x\0.safetensors", ""),
        *("..", ".", "config.json", "s1.safetensors\n", "C:\\x.safetensors"),
    ],
)
def test_names_of_shards_that_are_not_plain(tmp_path, name):
    folder = shards(tmp_path / "model", d=name)
    for other in (tmp_path, folder / "sub"):  # even when the file is there
        other.mkdir(exist_ok=True)
        io.save_tensors(other / "x.safetensors", {"d": torch.ones(1)})
    with pytest.raises(CheckpointError, match=re.escape(f"{name!r} is not the plain name of a .safetensors file")):
        open_weights(folder)


@pytest.mark.parametrize("name", ["x" * 5000 + ".safetensors", "\ud800.safetensors"])
def test_names_of_shards_that_no_file_can_have(tmp_path, name):
    folder = shards(tmp_path)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"is missing, or not a regular file|cannot be opened"):
        open_weights(folder)


def test_a_shard_that_is_no_regular_file(tmp_path):
    folder = shards(tmp_path, d="s3.safetensors", e="s4.safetensors")
    os.mkfifo(folder / "s3.safetensors")  # opening it would wait for ever
    (folder / "s4.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"'s3.safetensors' is missing, or not a reg.*'s4.safetensors' is missing, or not"):
        open_weights(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must be an object with a 'weight_map'"),
        ("3", "must be an object with a 'weight_map'"),
        ("{}", "must be an object with a 'weight_map'"),
        ('{"weight_map": []}', "must be an object with a 'weight_map'"),
        ('{"weight_map": {}}', "must be an object with a 'weight_map'"),
        ('{"weight_map": {"a": 3}}', "must be an object with a 'weight_map'"),
        ('{"weight_map": {"a": "s1.safetensors", "a": "s1.safetensors"}}', "not proper JSON .it has the key 'a' twice"),
        ('{"weight_map": {"a": "s1.safetensors"}, "weight_map": {}}', "not proper JSON .it has the key 'weight_map' twice"),
        ("{", "not proper JSON"),
        ("[" * 100_000, "not proper JSON"),
        ('"\xff"', "not proper JSON"),
    ],
)
def test_an_index_of_another_form(tmp_path, content, message):
    shards(tmp_path)
    (tmp_path / INDEX).write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        open_weights(tmp_path)


def test_an_index_too_large_to_be_one(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_MAX_INDEX", 50)
    with pytest.raises(CheckpointError, match=r"index.json has \d+ bytes and an index has at most 50: copy"):
        open_weights(shards(tmp_path))


def test_a_single_file_beside_an_index(tmp_path):
    shards(tmp_path)
    io.save_tensors(tmp_path / SINGLE, TENSORS)
    with pytest.raises(CheckpointError, match=r"holds model.safetensors and model.safetensors.index.json, which names other"):
        open_weights(tmp_path)
    io.write_json(tmp_path / INDEX, {"weight_map": dict.fromkeys(TENSORS, SINGLE)})
    assert set(open_weights(tmp_path)) == set(TENSORS)


def test_no_weights(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=r"holds no weights: it needs model.safetensors, or model.safetensors.index"):
            open_weights(folder)


# --- links ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SINGLE, INDEX, "s1.safetensors"])
def test_links_that_leave_the_folder(tmp_path, name):
    folder = tmp_path / "model"
    if name == SINGLE:
        folder.mkdir()
        io.save_tensors(folder / name, TENSORS)
    else:
        shards(folder)
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match=rf"'{name}' is a link that leaves the folder, to .*outside\. The remedy: copy"):
        open_weights(folder)


def test_links_within_the_folder_and_to_the_folder(tmp_path):
    folder = shards(tmp_path / "model")
    (folder / "s1.safetensors").rename(folder / "data")
    (folder / "s1.safetensors").symlink_to("data")
    (tmp_path / "link").symlink_to(folder)
    assert torch.equal(open_weights(tmp_path / "link").read("a"), torch.ones(2))


@pytest.mark.parametrize("target", ["absent", SINGLE])
def test_links_to_nothing(tmp_path, target):
    (tmp_path / SINGLE).symlink_to(target)
    with pytest.raises(CheckpointError, match=r"'model.safetensors' is missing, or not a regular file|cannot be opened"):
        open_weights(tmp_path)


def test_the_links_of_the_hubs_cache(tmp_path):
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0123abcd"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    io.save_tensors(cache / "blobs" / "ff00", TENSORS)
    (snapshot / SINGLE).symlink_to("../../blobs/ff00")
    assert same(open_weights(snapshot).read("half"), TENSORS["half"])
    (cache / "blobs" / "ff00").rename(tmp_path / "other")
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to("../../../other")
    with pytest.raises(CheckpointError, match="a link that leaves the folder"):
        open_weights(snapshot)
    cache.rename(tmp_path / "stolen--org--name")
    snapshot = tmp_path / "stolen--org--name" / "snapshots" / "0123abcd"
    (tmp_path / "other").rename(tmp_path / "stolen--org--name" / "blobs" / "ff00")
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to("../../blobs/ff00")
    with pytest.raises(CheckpointError, match="a link that leaves the folder"):
        open_weights(snapshot)


# --- pickles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickles_are_refused_unless_asked_for(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=rf"{name}: .* only as pickles, which can run any program .* `athanor import --pickled`"
    ):
        open_weights(tmp_path)


def test_safetensors_come_before_pickles(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    io.save_tensors(tmp_path / SINGLE, TENSORS)
    assert set(open_weights(tmp_path, pickled=True)) == set(TENSORS)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles(tmp_path, zipped):
    large = torch.arange(12.0).reshape(3, 4)
    content = OrderedDict(TENSORS, turned=large.T, tied=large, parameter=torch.nn.Parameter(torch.ones(2)))
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    found = open_weights(tmp_path, pickled=True)
    assert set(found) == set(content)
    for name, tensor in content.items():
        assert found[name].nbytes == tensor.nbytes and found[name].offset is None
        read = found.read(name)
        assert same(read, tensor.detach()) and read.is_contiguous() and not read.requires_grad
    assert found.read("tied").data_ptr() != found.read("turned").data_ptr()
    assert torch.equal(found.read("half", torch.empty(5)), TENSORS["half"].float())


def test_shards_of_pickles(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "p1.bin")
    torch.save({"b": torch.zeros(2)}, tmp_path / "p2.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    io.write_json(index, {"weight_map": {"a": "p1.bin", "b": "p2.bin"}})
    assert torch.equal(open_weights(tmp_path, pickled=True).read("b"), torch.zeros(2))
    io.write_json(index, {"weight_map": {"a": "p1.bin", "b": "p1.bin"}})
    with pytest.raises(CheckpointError, match=r"p1.bin lacks 'b'"):
        open_weights(tmp_path, pickled=True)
    io.write_json(index, {"weight_map": {"a": "p1.safetensors"}})
    with pytest.raises(CheckpointError, match=r"is not the plain name of a .bin file"):
        open_weights(tmp_path, pickled=True)


class Bomb:
    """Unpickled without care, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["zip", "old", "bare"])
def test_a_pickle_that_runs_a_program_runs_nothing(tmp_path, kind):
    path, proof = tmp_path / "pytorch_model.bin", tmp_path / "proof"
    content = {"w": torch.ones(1), "bomb": Bomb(proof)}
    if kind == "bare":
        path.write_bytes(pickle.dumps(content["bomb"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    reason = r"it is damaged, or holds something else" if kind == "bare" else r"it names 'posix\.system'"
    with pytest.raises(CheckpointError, match=rf"alone \({reason}\): do not trust it, and get the weights as safetensors$"):
        open_weights(tmp_path, pickled=True)
    assert not proof.exists()
    pickle.loads(pickle.dumps(content["bomb"]))
    assert proof.exists()  # the bomb was live


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "must hold tensors by name and holds a list"),
        (torch.ones(1), "must hold tensors by name and holds a Tensor"),
        ({"w": torch.ones(1), "epoch": 3}, "under 'epoch', a int: save the model's weights alone"),
        ({"state_dict": {"w": torch.ones(1)}}, "under 'state_dict', a dict: save the model's weights alone"),
        ({3: torch.ones(1)}, "under 3, a Tensor: save the model's weights alone"),
        ({"w": torch.ones(1).expand(2**40)}, rf"'w' of shape \({2**40},\) has not the {2**42} bytes of data that it needs"),
        ({"w": torch.ones(1, device="meta")}, "'w' of shape .* has not the 4 bytes of data that it needs"),
        ({"w": torch.eye(2).to_sparse()}, "'w' of shape .* has not the 16 bytes of data that it needs"),
    ],
)
def test_pickles_of_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        open_weights(tmp_path, pickled=True)


def _rewritten(path, old, new, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            if name.endswith("data.pkl"):
                assert data.count(old) == 1
                data = data.replace(old, new)
            archive.writestr(name, data)


def test_a_pickle_whose_shape_is_larger_than_its_data(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(77)}, path)
    _rewritten(path, b"KM\x85", b"J\xff\xff\xff\x7f\x85")  # the integer 77 in one byte, and in four another
    with pytest.raises(CheckpointError, match="is not a pickle of tensors alone"):
        open_weights(tmp_path, pickled=True)


def test_a_compressed_pickle_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(77)}, path)
    _rewritten(path, b"KM\x85", b"KM\x85", zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"is not a pickle of tensors alone \(a member is compressed\)"):
        open_weights(tmp_path, pickled=True)


@given(st.randoms(use_true_random=False))
def test_damaged_pickles_raise_nothing_but_checkpoint_errors(tmp_path_factory, rng: random.Random):
    folder = tmp_path_factory.mktemp("damaged")
    torch.save({"a": torch.ones(2, 3), "b": torch.zeros(1)}, folder / "pytorch_model.bin")
    raw = bytearray((folder / "pytorch_model.bin").read_bytes())
    for _ in range(rng.randint(1, 3)):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    (folder / "pytorch_model.bin").write_bytes(raw if rng.random() < 0.7 else raw[: rng.randrange(len(raw))])
    try:
        found = open_weights(folder, pickled=True)
        for name in found:
            found.read(name)
    except CheckpointError:
        pass


# --- writing -------------------------------------------------------------------------------------------------------------

MANY = {f"w{i}": torch.full((10, i + 1), float(i)) for i in range(5)}  # 40, 80, 120, 160, 200 bytes


def _files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_saved_whole_or_in_shards_it_is_the_same(tmp_path):
    save_sharded(tmp_path / "whole", MANY)
    assert _files(tmp_path / "whole") == [SINGLE]
    save_sharded(tmp_path / "parts", MANY, {"format": "pt", "by": "us"}, max_bytes=170)
    names = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]  # w0 w1, w2, w3, w4
    assert _files(tmp_path / "parts") == [*names, INDEX]
    index = json.loads((tmp_path / "parts" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 600}
    assert index["weight_map"] == dict(zip(MANY, [names[0], *names], strict=True))
    assert io.read_header(tmp_path / "whole" / SINGLE)["__metadata__"] == {"format": "pt"}
    assert all(io.read_header(tmp_path / "parts" / n)["__metadata__"] == {"format": "pt", "by": "us"} for n in names)
    for folder in ("whole", "parts"):
        found = open_weights(tmp_path / folder)
        assert set(found) == set(MANY)
        assert all(same(found.read(name), MANY[name]) for name in MANY)


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 100))
def test_no_shard_is_larger_than_asked_for_unless_one_tensor_is(tmp_path_factory, sizes, most):
    folder = tmp_path_factory.mktemp("sharded")
    content = {f"w{i}": torch.ones(size) for i, size in enumerate(sizes)}
    save_sharded(folder, content, max_bytes=most)
    found = open_weights(folder)
    assert {name: found.read(name).numel() for name in found} == {name: t.numel() for name, t in content.items()}
    by_file = {}
    for e in found.values():
        by_file.setdefault(e.file, []).append(e.nbytes)
    assert all(sum(held) <= most or sum(n > 0 for n in held) == 1 for held in by_file.values())


@pytest.mark.parametrize("before", [100, 170, 10_000])
@pytest.mark.parametrize("after", [100, 170, 10_000])
def test_a_second_save_leaves_nothing_of_the_first(tmp_path, before, after):
    save_sharded(tmp_path, {name: tensor + 1 for name, tensor in MANY.items()}, max_bytes=before)
    (tmp_path / "config.json").write_text("{}")
    save_sharded(tmp_path, MANY, max_bytes=after)
    save_sharded(tmp_path / "fresh", MANY, max_bytes=after)
    assert _files(tmp_path / "fresh") == [name for name in _files(tmp_path) if name not in ("config.json", "fresh")]
    assert all(same(open_weights(tmp_path).read(name), MANY[name]) for name in MANY)


def test_a_save_that_stops_leaves_no_mixture(tmp_path, monkeypatch):
    save_sharded(tmp_path, MANY, max_bytes=170)
    write, written = io.save_tensors, []

    def stop(path, *args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *args)

    monkeypatch.setattr(io, "save_tensors", stop)
    with pytest.raises(KeyboardInterrupt):
        save_sharded(tmp_path, {name: tensor + 1 for name, tensor in MANY.items()}, max_bytes=170)
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_weights(tmp_path)


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(**shape))


@pytest.mark.parametrize(("size", "count"), [("20KB", 4), ("1GB", 1)])
def test_what_transformers_writes_reads_here(tmp_path, llama, size, count):
    llama.save_pretrained(tmp_path, max_shard_size=size)
    found = open_weights(tmp_path)
    assert len({entry.file for entry in found.values()}) >= count
    assert set(found) == set(llama.state_dict())
    assert all(same(found.read(name), tensor) for name, tensor in llama.state_dict().items())


@pytest.mark.parametrize("size", [20_000, 10**9])
def test_what_is_written_here_reads_in_transformers(tmp_path, llama, size):
    from transformers import LlamaForCausalLM

    llama.config.save_pretrained(tmp_path)
    save_sharded(tmp_path, llama.state_dict(), max_bytes=size)
    assert (tmp_path / INDEX).exists() == (size == 20_000)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(same(tensor, llama.state_dict()[name]) for name, tensor in theirs.state_dict().items())
