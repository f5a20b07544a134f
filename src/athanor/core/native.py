"""C++ of our own: compiled by the machine's compiler when it is first wanted, kept for the next time, called through ctypes.

Whoever asks has another way to compute the same thing, in PyTorch, and takes it where `load` gives None: on processors without
AVX-512, without a C++ compiler, or with `ATHANOR_NATIVE=0` in the environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

# PyTorch's own threads are used: both load a libgomp.so.1, and a process loads one file of that name.
_FLAGS = [
    *("-O3", "-std=c++17", "-w", "-fopenmp", "-shared", "-fPIC"),
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"),
]


def refusal() -> str:
    """Why nothing of our own is compiled or called here; "" where it is."""
    import torch

    if os.environ.get("ATHANOR_NATIVE") == "0":
        return "ATHANOR_NATIVE=0"
    if sys.platform != "linux" or platform.machine() != "x86_64" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "no AVX-512"
    return ""


def folder() -> Path:
    """Where compiled files are kept: the folder athanor in XDG_CACHE_HOME, by default ~/.cache. RuntimeError without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "athanor"


def compiler_name() -> str:
    """The C++ compiler that is asked for: the environment's CXX, or what torch.compile takes too."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def compiler() -> str | None:
    """Its path, None where it is not installed."""
    return shutil.which(compiler_name())


def _compile(source: Path, target: Path, cxx: str) -> None:
    """Compile beside the target, then rename: processes that start together do not meet, and a killed one leaves no half."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        made = Path(place) / target.name
        subprocess.run([cxx, *_FLAGS, str(source), "-o", str(made)], check=True, capture_output=True, text=True, timeout=300)
        made.replace(target)


@functools.cache
def load(source: Path) -> ctypes.CDLL | None:
    """The functions of a C++ file, compiled unless that has been done before; None where the machine can't have them.

    A compiler that fails, or a folder that can't be written, is told in a RuntimeWarning, once.
    """
    if refusal():
        return None
    key, cxx = hashlib.sha256("\0".join((source.read_text(), *_FLAGS)).encode()).hexdigest()[:16], compiler()
    try:
        target = folder() / f"{source.stem}-{key}.so"
        if target.exists():
            with contextlib.suppress(OSError):  # a damaged file is made anew
                return ctypes.CDLL(str(target))
        if cxx is None:
            return None
        _compile(source, target, cxx)
        return ctypes.CDLL(str(target))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        warnings.warn(
            f"{source.name} could not be compiled by {cxx} and kept ({said[-1] if said else error}): PyTorch computes instead,"
            " slower; mend the compiler or the folder (XDG_CACHE_HOME names another), or set ATHANOR_NATIVE=0 to go without",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def state() -> str:
    """Who computes what there is C++ for: "C++", or "PyTorch" and why."""
    why = refusal() or ("" if compiler() else "no C++ compiler")
    return f"PyTorch ({why})" if why else "C++"
