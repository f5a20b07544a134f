"""Devices that training is planned for: peak speeds, memory, price; and this machine, measured.

Peaks are the makers' figures for dense products (data sheets of V100, A100, H100 SXM and H200 SXM), in decimal units. Prices are
assumptions: about what an hour cost on demand at clouds for hire in 2025. Nobody should plan a bill with them: give `--price`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from athanor.core.device import machine, supports_bf16
from athanor.core.errors import ConfigError, nearest


@dataclass(frozen=True)
class Device:
    """One device.

    memory     bytes
    bandwidth  of its memory, bytes a second
    fp32       FLOP/s of float32 products, without TF32
    half       FLOP/s of products of 16 bits
    bf16       whether these are bfloat16; else float16
    price      dollars an hour
    kind       cpu or cuda
    """

    name: str
    memory: float
    bandwidth: float
    fp32: float
    half: float
    bf16: bool
    price: float
    kind: str = "cuda"

    def peak(self, precision: str) -> float:
        """FLOP/s in fp32, or in anything else."""
        return self.fp32 if precision == "fp32" else self.half


CATALOGUE = {
    "v100": Device("V100 SXM2 32 GB", 32e9, 900e9, 15.7e12, 125e12, False, 0.6),
    "a100-40gb": Device("A100 SXM 40 GB", 40e9, 1555e9, 19.5e12, 312e12, True, 1.3),
    "a100-80gb": Device("A100 SXM 80 GB", 80e9, 2039e9, 19.5e12, 312e12, True, 1.8),
    "h100": Device("H100 SXM 80 GB", 80e9, 3350e9, 67e12, 989.4e12, True, 2.8),
    "h200": Device("H200 SXM 141 GB", 141e9, 4800e9, 67e12, 989.4e12, True, 3.6),
}
THIS = "this"


def get(name: str) -> Device:
    """A device of the catalogue, or this machine's (measured, some seconds). Raises ConfigError for an unknown one."""
    if name == THIS:
        return this()
    if name not in CATALOGUE:
        known = [THIS, *CATALOGUE]
        raise ConfigError(f"device ({name!r}) is none that is known{nearest(name.lower(), known)} Known: {', '.join(known)}.")
    return CATALOGUE[name]


def this(seconds: float = 0.5) -> Device:
    """This machine's device: products of 2,048 x 2,048 and copies of 256 MB, the best of `seconds` each."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    facts = machine()
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else facts["memory"]
    bf16 = supports_bf16(device)
    fp32 = _product(device, torch.float32, seconds)
    half = _product(device, torch.bfloat16, seconds) if bf16 else fp32
    source = torch.ones(64_000_000, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _best(lambda: target.copy_(source), device, seconds)
    name = facts["gpu"] or f"{facts['cpu']}, {facts['threads']} threads"
    return Device(name, float(memory), bandwidth, fp32, half, bf16, 0.0, device.type)


def _product(device: torch.device, dtype: torch.dtype, seconds: float, n: int = 2048) -> float:
    a, b = torch.ones(2, n, n, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2.0 * n**3 / _best(lambda: torch.mm(a, b, out=out), device, seconds)


def _best(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    best = float("inf")
    work()
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or best == float("inf"):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
