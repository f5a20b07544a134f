"""A checkpoint is read under any layout, whatever wrote it: boxes, files of many processes, and two real processes."""

import math
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from athanor.core import io
from athanor.core.errors import CheckpointError
from athanor.train import _written
from athanor.train._boxes import Box, tiling_fault
from athanor.train._placed import state_held
from athanor.train._written import Checkpoint, Part
from athanor.train.parallel.base import Alone
from athanor.train.pieces import Held, Piece, whole
from athanor.train.state import Progress, StateStore

RECORD = {"identity": {}, "step": 1, "seconds": 0.0, "history": [], "extra": {}}
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn)
shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@st.composite
def tilings(draw, shape):
    """Boxes that are all of a tensor, by cutting again and again; some may be empty."""
    boxes = [Box((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 5)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        d = draw(st.integers(0, len(shape) - 1))
        n = draw(st.integers(0, box.size[d]))
        for start, size in ((box.at[d], n), (box.at[d] + n, box.size[d] - n)):
            boxes.append(Box((*box.at[:d], start, *box.at[d + 1 :]), (*box.size[:d], size, *box.size[d + 1 :])))
    return draw(st.permutations(boxes))


@st.composite
def boxes(draw, shape):
    at = tuple(draw(st.integers(0, n)) for n in shape)
    return Box(at, tuple(draw(st.integers(0, n - a)) for n, a in zip(shape, at, strict=True)))


def mask(box, shape):
    out = torch.zeros(shape, dtype=torch.bool)
    out[box.within((0,) * len(shape))] = True
    return out


@given(st.data())
def test_two_boxes_meet_in_the_elements_that_both_have(data):
    shape = data.draw(shapes)
    a, b = data.draw(boxes(shape)), data.draw(boxes(shape))
    common = a.meet(b)
    both = mask(a, shape) & mask(b, shape)
    assert common == b.meet(a)
    assert (common is None) == (not both.any())
    if common is not None:
        assert torch.equal(mask(common, shape), both) and common.volume == int(both.sum())


@given(st.data())
def test_some_boxes_are_a_whole_tensor_if_each_element_is_in_one(data):
    shape = data.draw(shapes)
    some = data.draw(st.one_of(tilings(shape), st.lists(boxes(shape), max_size=4)))
    counts = sum((mask(box, shape).int() for box in some), torch.zeros(shape, dtype=torch.int32))
    assert (tiling_fault(shape, some) is None) == bool((counts == 1).all())


@pytest.mark.parametrize(
    ("shape", "some", "fault"),
    [
        ((4, 2), [Box((0, 0), (3, 2))], "2 of 8 elements are in no piece"),
        ((4,), [Box((0,), (3,)), Box((2,), (2,))], "pieces at (0,) of size (3,) and at (2,) of size (2,) overlap"),
        ((4,), [Box((2,), (3,))], "a piece at (2,) of size (3,) leaves it"),
        ((4,), [Box((), ())], "a piece at () of size () leaves it"),
        ((), [Box((), ()), Box((), ())], "pieces at () of size () and at () of size () overlap"),
    ],
)
def test_what_is_wrong_with_pieces_is_said(shape, some, fault):
    assert tiling_fault(shape, some) == fault


def filled(shape, dtype):
    values = torch.arange(math.prod(shape)).remainder(251).to(torch.uint8)
    return (values.bool() if dtype == torch.bool else values.float().to(dtype)).reshape(shape)


def written(folder, ranks, timeout=10.0):
    for rank, parts in enumerate(ranks):
        _written.write_rank(folder, rank, parts, {})
    _written.finish(folder, len(ranks), timeout, RECORD)
    return Checkpoint(folder)


@settings(max_examples=40)
@given(st.data())
def test_what_some_processes_wrote_others_read_bit_for_bit(data):
    """Random tensors, cut at random, dealt out to k processes; m others with other cuts read them."""
    k = data.draw(st.integers(1, 4))
    ranks, tensors = [{} for _ in range(k)], {}
    for n in range(data.draw(st.integers(1, 3))):
        shape = data.draw(shapes)
        tensor = tensors[f"t.{n}"] = filled(shape, data.draw(st.sampled_from(DTYPES)))
        for box in data.draw(tilings(shape)):
            parts = ranks[data.draw(st.integers(0, k - 1))]
            part = parts.setdefault(f"t.{n}", Part(shape, tensor.dtype, []))
            if box.volume:
                part.pieces.append((box, tensor[box.within((0,) * len(shape))].clone()))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = written(Path(folder), ranks)
        assert checkpoint.damage() == []
        for name, tensor in tensors.items():
            bits = torch.uint8 if tensor.dtype == torch.float8_e4m3fn else tensor.dtype
            assert torch.equal(checkpoint.whole(name).view(bits), tensor.view(bits))
            for box in data.draw(tilings(tuple(tensor.shape))):
                mine = torch.zeros(box.size, dtype=tensor.dtype)
                checkpoint.read(name, box, mine)
                assert torch.equal(mine.view(bits), tensor[box.within((0,) * tensor.ndim)].view(bits))


def test_only_pieces_that_overlap_are_read(tmp_path, monkeypatch):
    tensor = filled((6, 4), torch.float32)
    ranks = [{"x": Part((6, 4), torch.float32, [(Box((2 * i, 0), (2, 4)), tensor[2 * i : 2 * i + 2])])} for i in range(3)]
    checkpoint = written(tmp_path, ranks)
    read, true = [], Checkpoint._slice
    monkeypatch.setattr(Checkpoint, "_slice", lambda self, file, *a: read.append((file, a[-1].size)) or true(self, file, *a))
    out = torch.zeros(3, 2)
    checkpoint.read("x", Box((1, 1), (3, 2)), out)
    assert torch.equal(out, tensor[1:4, 1:3])
    assert read == [("rank-00000.safetensors", (1, 2)), ("rank-00001.safetensors", (2, 2))]


def test_processes_share_the_work_of_looking_for_damage(tmp_path):
    checkpoint = written(tmp_path, [{"a": Part((), torch.float32, [(Box((), ()), torch.ones(()))])}, {}, {}])
    for rank in (0, 2):
        (tmp_path / f"rank-{rank:05d}.safetensors").write_bytes(b"x")
    found = [checkpoint.damage(rank, 2) for rank in range(2)]
    assert [len(f) for f in found] == [2, 0]
    assert sorted(found[0] + found[1]) == sorted(checkpoint.damage())


def test_processes_that_do_not_make_up_whole_tensors_are_refused(tmp_path):
    one = {"w": Part((2,), torch.float32, [(Box((0,), (2,)), torch.zeros(2))])}
    with pytest.raises(CheckpointError, match=r"does not make up whole tensors: w: pieces at \(0,\).*overlap: is it one"):
        written(tmp_path, [one, one])
    other = {"w": Part((3,), torch.float32, [(Box((2,), (1,)), torch.zeros(1))])}
    with pytest.raises(CheckpointError, match=r"w is float32 \[2\] and float32 \[3\]"):
        written(tmp_path, [one, other])


def test_a_process_that_failed_or_says_nothing_is_named(tmp_path):
    _written.write_rank(tmp_path, 0, {}, {})
    with pytest.raises(CheckpointError, match=r"still lacks the parts of processes 1, 2 of 3 after 0 s: do all of them save"):
        _written.finish(tmp_path, 3, 0.0, RECORD)
    _written.write_failure(tmp_path, 1, OSError(28, "No space left on device"))
    with pytest.raises(CheckpointError, match=r"process 1 could not write its part: OSError: .*No space left on device"):
        _written.finish(tmp_path, 3, 1e9, RECORD)


def test_a_program_that_is_over_does_not_wait_for_long(tmp_path, monkeypatch):
    """An error in the main thread must not keep the process until `timeout`."""
    monkeypatch.setattr(_written.threading, "main_thread", lambda: threading.Thread())
    monkeypatch.setattr(_written, "_LAST", 0.0)
    with pytest.raises(CheckpointError, match="still lacks the parts of processes 0 of 1"):
        _written.gather(tmp_path, 1, 1e9)


HALF = Held((8, 2), (Piece((0, 0), (0, 0), (2, 2)), Piece((2, 0), (4, 0), (2, 2))))


def test_states_of_another_shape_are_whole_or_refused():
    p = nn.Parameter(torch.zeros(4, 2))
    plain = (torch.optim.SGD([p], lr=0.1), {}, p)
    assert state_held("m", torch.zeros(4, 2), plain, HALF) == HALF
    assert state_held("step", torch.zeros(()), plain, HALF) == whole(torch.zeros(()))
    other = Held((8, 2), (Piece((0, 0), (2, 0), (2, 2)), Piece((2, 0), (6, 0), (2, 2))))
    assert not state_held("step", torch.zeros(()), plain, other).writes  # the holder of the first element writes
    assert state_held("row", torch.zeros(4), plain, whole(p)) == whole(torch.zeros(4))
    with pytest.raises(CheckpointError, match=r"row of shape \(4,\) is neither a scalar nor of its parameter's shape \(8, 2\)"):
        state_held("row", torch.zeros(4), plain, HALF)


def test_states_of_the_whole_parameter_are_whole_whatever_their_shape():
    """Factors of a DTensor of 2 rows dealt out to 2 processes: the factor of columns looks like the one row held here."""

    class Seen(nn.Parameter):  # a DTensor's shape is that of the whole
        shape = (2, 3)

        def to_local(self):
            return torch.zeros(1, 3)

    p = Seen(torch.zeros(2, 3))
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.whole_state = ("column", "row")
    mine = Held((2, 3), (Piece((0, 0), (1, 0), (1, 3)),))
    assert state_held("a.column", torch.zeros(1, 3), (optimizer, {}, p), mine) == whole(torch.zeros(1, 3), writes=False)
    assert state_held("a.row", torch.zeros(2, 1), (optimizer, {}, p), mine) == whole(torch.zeros(2, 1), writes=False)
    assert state_held("a.other", torch.zeros(1, 3), (optimizer, {}, p), mine) == mine
    cut = nn.Parameter(torch.zeros(1, 3))  # cut by hand: its optimiser never sees the whole
    with pytest.raises(CheckpointError, match=r"a.column of shape \(1, 3\) is neither"):
        state_held("a.column", torch.zeros(1, 3), (optimizer, {}, cut), mine)


class Pieces(Alone):
    """Process r of 2 holds rows r, r + 2 ... of `fused` by pairs, a DTensor's rows of `dealt`; `same` is the same on both."""

    def __init__(self, rank):
        self.mine = rank

    def held(self, name, tensor):
        if name == "fused":
            starts = [2 * self.mine, 4 + 2 * self.mine]
            return Held((8, 2), tuple(Piece((2 * i, 0), (s, 0), (2, 2)) for i, s in enumerate(starts)))
        if name == "dealt":
            start, size = (0, 3) if self.mine == 0 else (3, 2)  # 5 rows, as torch deals them
            return Held((5, 3), (Piece((0, 0), (start, 0), (size, 3)),))
        return whole(tensor, writes=self.mine == 0)


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.fused = nn.Parameter(torch.randn(8, 2, generator=generator))
        self.dealt = nn.Parameter(torch.randn(5, 3, generator=generator))
        self.same = nn.Parameter(torch.randn(4, generator=generator))
        self.register_buffer("table", torch.arange(3))


def optimised(model, steps=2):
    """AdamW whose updates do not depend on who holds what."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    for _ in range(steps):
        for p in model.parameters():
            (p * p).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


WORKER = """
import sys
from pathlib import Path
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.device_mesh import init_device_mesh
from athanor.core import dist
from athanor.train.parallel.base import ALONE
from athanor.train.state import Progress, StateStore
from tests.train.test_state_layout import Pieces, Whole, optimised

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))

def cut():
    model = Whole()
    rows = [*range(2 * rank, 2 * rank + 2), *range(4 + 2 * rank, 6 + 2 * rank)]
    model.fused = nn.Parameter(model.fused.detach()[rows].clone())
    model.dealt = nn.Parameter(distribute_tensor(model.dealt.detach(), mesh, [Shard(0)]))
    return model

strategy = Pieces(rank)
model = cut()
optimizer = optimised(model)
torch.manual_seed(rank)
two = StateStore(folder / "two", {})
two.save(Progress(2), model, [optimizer], strategy=strategy)
drawn = torch.rand(2)

# what one process wrote
back = cut()
with torch.no_grad():
    for p in back.parameters():
        p.zero_()
empty = torch.optim.AdamW(back.parameters(), lr=0.1, foreach=False)
progress = StateStore(folder / "one", {}).resume(back, [empty], strategy=strategy)
assert progress.step == 2
local = lambda t: t.to_local() if hasattr(t, "to_local") else t
for (name, p), q in zip(back.named_parameters(), model.parameters(), strict=True):
    assert torch.equal(local(p), local(q)), name
    for key, value in optimizer.state[q].items():
        assert type(empty.state[p][key]) is type(value) and torch.equal(local(empty.state[p][key]), local(value)), (name, key)

# what the two wrote: generators of its own for each
assert two.resume(back, [empty], strategy=strategy).step == 2
assert torch.equal(torch.rand(2), drawn)

# both write all of it: no layout
store = StateStore(folder / "wrong", {})
store.save(Progress(1), Whole(), [], strategy=ALONE)
try:
    store.wait()
    print("written")
except Exception as error:
    print(error)
torch.distributed.barrier()

# one cannot write
import athanor.core.io as io
true = io.save_tensors
def full(*a, **k):
    raise OSError(28, "No space left")
if rank == 1:
    io.save_tensors = full
store.save(Progress(2), model, [], strategy=strategy)
try:
    store.wait()
except Exception as error:
    print(error)
assert store.steps() == []
torch.distributed.barrier()
io.save_tensors = true
torch.distributed.destroy_process_group()
"""


def test_two_processes_write_and_one_reads_and_the_other_way_round(tmp_path):
    """A DTensor dealt out unevenly, a tensor of two pieces, a copied one and a buffer; with AdamW's moments and step counts."""
    model = Whole()
    optimizer = optimised(model)
    store = StateStore(tmp_path / "one", {})
    torch.manual_seed(7)
    store.save(Progress(2), model, [optimizer])
    store.close()
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, os.getcwd()]), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", WORKER, str(tmp_path)]
    workers = [
        subprocess.Popen([*argv, str(i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) for i in range(2)
    ]
    try:
        said = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert "does not make up whole tensors: model.fused: pieces at (0, 0) of size (8, 2)" in said[0][0]
    assert said[1][0].startswith("written\n")  # only process 0 can know
    assert "process 1 could not write its part: OSError: [Errno 28] No space left" in said[0][0]
    assert "the checkpoint of step 2 was not written" in said[1][0]
    back = Whole()
    with torch.no_grad():
        for p in back.parameters():
            p.zero_()
    fresh = torch.optim.AdamW(back.parameters(), lr=0.1)
    assert StateStore(tmp_path / "two", {}).resume(back, [fresh]).step == 2
    for p, q in zip(back.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert fresh.state[p].keys() == optimizer.state[q].keys()
        assert all(torch.equal(fresh.state[p][key], value) for key, value in optimizer.state[q].items())
    assert sorted(p.name for p in (tmp_path / "two" / "step-00000002").iterdir()) == [
        "manifest.json", "rank-00000.safetensors", "rank-00001.safetensors",
    ]  # fmt: skip
    names = io.read_json(tmp_path / "two" / "step-00000002" / "manifest.json")["tensors"]
    assert {name.split(".")[1] for name in names if name.startswith("rng.")} == {"0", "1"}
