"""Devices, precision, seeds, and what this machine is."""

from __future__ import annotations

import ctypes
import os
import platform
import random
import resource
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from athanor.core import native
from athanor.core.errors import CheckpointError, ConfigError, MissingExtraError

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16"]
TrainPrecision = Literal["fp32", "bf16", "bf16-pure", "fp16"]  # what each is: optim/scale.py
# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_RNG_KEYS = ("torch", "python", "python_gauss", "numpy", "numpy_gauss")


def default_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def require_compiler(device: torch.device, verb: str) -> None:
    """See that torch.compile finds the C++ compiler that it needs for a CPU; `verb` is what goes without compiling, too.

    Raises MissingExtraError naming the compiler and what to do.
    """
    if device.type == "cpu" and native.compiler() is None:
        raise MissingExtraError(
            f"compiling on a CPU needs the C++ compiler {native.compiler_name()!r}, which is not installed: install it (on Debian"
            f" `apt install g++`), name another in the environment variable CXX, or {verb} without compiling"
        )


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # NumPy takes 32 bits
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """State of the global generators of Python, NumPy and torch, all as tensors (so that a safetensors file can hold it).

    Keys: torch, python, python_gauss, numpy, numpy_gauss, and cuda.0, cuda.1 ... where there are such devices.
    """
    import numpy as np
    import torch

    _, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    inner = numpy_state["state"]
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*inner["key"].tolist(), inner["pos"], numpy_state["has_gauss"]], dtype=torch.int64),
        "numpy_gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Set the generators to a state of `rng_state`. States of CUDA devices that this machine lacks have nothing to be set on.

    Raises CheckpointError when `state` is not such a state.
    """
    import numpy as np
    import torch

    missing = [key for key in _RNG_KEYS if key not in state]
    if missing:
        raise CheckpointError(f"random state lacks {', '.join(missing)}: it was not written by this version; start afresh")
    try:
        torch.set_rng_state(state["torch"].cpu())
        gauss = state["python_gauss"].tolist()
        random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
        *key, position, has_gauss = state["numpy"].tolist()
        np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position, has_gauss, state["numpy_gauss"].item()))
        for i in range(torch.cuda.device_count()):
            if f"cuda.{i}" in state:
                torch.cuda.set_rng_state(state[f"cuda.{i}"].cpu(), i)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"random state is damaged ({error}): start from another checkpoint") from error


def supports_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 natively. On a CPU that is AVX512-BF16 or AMX; without, bfloat16 is slower."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # Private names, the only ones there are in torch 2.11..2.13; absent ones mean a CPU of another family.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in checks)


def autocast(device: torch.device, precision: TrainPrecision) -> AbstractContextManager[Any]:
    """Context in which matrix products run in `precision`; weights keep theirs. Raises ConfigError for an unknown one.

    For bf16-pure, where weights are bfloat16 themselves, and fp32 it changes nothing.
    """
    import torch

    if precision in ("fp32", "bf16-pure"):
        return nullcontext()
    if precision in ("bf16", "fp16"):
        return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)
    raise ConfigError(f"precision is {precision!r} but must be 'fp32', 'bf16', 'bf16-pure' or 'fp16': choose one of them")


def _cpuinfo(field: str) -> str:
    """What Linux says of the first core; "" elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def halves_mkl() -> bool:
    """Whether MKL computes with half of the CPU's vectors: it takes AVX-512 on Intel's processors alone, AVX2 on all others."""
    import torch

    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkl.is_available() and _cpuinfo("vendor_id") != "GenuineIntel"


def machine() -> dict[str, Any]:
    """What a measurement was made on: cpu, cores (usable by this process), threads (torch's), kernels (who computes what there is
    C++ of our own for), memory (bytes), versions, gpu."""
    import torch

    import athanor

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "kernels": native.state(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "athanor": athanor.__version__,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def peak_memory() -> int:
    """The most memory this process has had resident so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def tune_allocator() -> None:
    """Make glibc keep freed memory instead of giving it back to the system after every step.

    Training allocates and frees the same large tensors over and over; by default each comes as a fresh mapping whose
    pages the kernel clears one by one, a fifth of the time of a small model's step (docs/log.md). Without glibc this does
    nothing.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20)):
        mallopt(option, value)


def free_memory() -> int | None:
    """Bytes that this process can still take: what is available on the machine, and what its control group leaves."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        pass
    group = Path("/sys/fs/cgroup")
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            found.append(max(0, int((group / limit).read_text()) - int((group / used).read_text())))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(found, default=None)
