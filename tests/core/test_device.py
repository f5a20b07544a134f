import json
import platform
import random

import numpy as np
import pytest
import torch

import athanor
from athanor.core import device, io, native
from athanor.core.errors import CheckpointError, ConfigError

CPU = torch.device("cpu")


def _draw():
    return (
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
        [random.random(), random.gauss(0, 1)],
        np.random.rand(3).tolist(),
        np.random.randn(3).tolist(),
    )


@pytest.fixture(autouse=True)
def _leave_generators_alone():
    before = device.rng_state()
    yield
    device.set_rng_state(before)


def test_default_device_follows_what_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.default_device() == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.default_device() == torch.device("cuda")


def test_the_same_seed_gives_the_same_draws():
    device.seed_all(2**40 + 3)
    first = _draw()
    device.seed_all(2**40 + 3)
    assert _draw() == first
    device.seed_all(4)
    assert all(a != b for a, b in zip(_draw(), first, strict=True))


@pytest.mark.parametrize("half_drawn", [False, True])
def test_a_state_restores_every_generator_through_a_file(tmp_path, half_drawn):
    device.seed_all(1)
    _draw()
    if half_drawn:  # both generators of normals now hold a second value back
        random.gauss(0, 1)
        np.random.randn(1)
    io.save_tensors(tmp_path / "rng", device.rng_state())
    expected = _draw()
    device.seed_all(2)
    device.set_rng_state(io.load_tensors(tmp_path / "rng"))
    assert _draw() == expected


def test_a_state_that_lacks_something_is_refused():
    state = device.rng_state()
    del state["numpy"]
    with pytest.raises(CheckpointError, match="random state lacks numpy: it was not written by this version; start afresh"):
        device.set_rng_state(state)


@pytest.mark.parametrize("key", ["torch", "python", "numpy", "numpy_gauss"])
def test_a_damaged_state_is_refused(key):
    state = {**device.rng_state(), key: torch.zeros(2, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match=r"random state is damaged \(.*\): start from another checkpoint"):
        device.set_rng_state(state)


def test_bf16_support_is_what_the_processor_says(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert device.supports_bf16(CPU) is False
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert device.supports_bf16(CPU) is True
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert device.supports_bf16(CPU) is False
    assert device.supports_bf16(torch.device("meta")) is False


@pytest.mark.gpu
def test_bf16_support_of_a_gpu():
    capability = torch.cuda.get_device_capability()
    assert device.supports_bf16(torch.device("cuda")) is (capability >= (8, 0))


@pytest.mark.gpu
def test_a_state_restores_the_gpu_generator():
    state = device.rng_state()
    first = torch.rand(3, device="cuda").tolist()
    torch.rand(3, device="cuda")
    device.set_rng_state(state)
    assert torch.rand(3, device="cuda").tolist() == first


def test_autocast_sets_the_type_of_products_only():
    weight = torch.ones(4, 4)
    with device.autocast(CPU, "fp32"):
        assert (weight @ weight).dtype == torch.float32
    with device.autocast(CPU, "bf16"):
        assert (weight @ weight).dtype == torch.bfloat16
        assert weight.dtype == torch.float32
    with pytest.raises(ConfigError, match="precision is 'fp64' but must be 'fp32', 'bf16', 'bf16-pure' or 'fp16': choose one"):
        device.autocast(CPU, "fp64")


def test_machine_is_plain_json_and_true():
    found = json.loads(json.dumps(device.machine(), allow_nan=False))
    assert set(found) == {"cpu", "cores", "threads", "kernels", "memory", "platform", "python", "torch", "athanor", "gpu"}
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["threads"] == torch.get_num_threads()
    assert found["kernels"] == native.state()
    assert found["memory"] > 1 << 28
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["athanor"] == athanor.__version__


def test_machine_without_procfs_still_names_a_processor(monkeypatch):
    def absent(*_):
        raise OSError

    monkeypatch.setattr(device.Path, "read_text", absent)
    assert device.machine()["cpu"]


@pytest.mark.parametrize(
    ("vendor", "vectors", "mkl", "halves"),
    [
        ("AuthenticAMD", "AVX512", True, True),
        ("GenuineIntel", "AVX512", True, False),
        ("AuthenticAMD", "AVX2", True, False),
        ("AuthenticAMD", "AVX512", False, False),
    ],
)
def test_mkl_takes_the_widest_vectors_of_its_makers_processors_alone(monkeypatch, vendor, vectors, mkl, halves):
    said = f"processor : 0\nvendor_id : {vendor}\nmodel name : Some Processor\n"
    monkeypatch.setattr(device.Path, "read_text", lambda self: said)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert device.halves_mkl() is halves
    assert device.machine()["cpu"] == "Some Processor"


def test_peak_memory_grows_by_what_is_touched():
    before = device.peak_memory()
    assert before > 1 << 24
    touched = torch.ones(1 << 28, dtype=torch.uint8)
    assert device.peak_memory() - before >= 0
    assert device.peak_memory() >= touched.numel()
