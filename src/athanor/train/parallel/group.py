"""Processes on one machine: the command starts them with torchrun, each joins the group, none outlives the others."""

from __future__ import annotations

import ctypes
import datetime
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td

from athanor.core import config as configs
from athanor.core import io
from athanor.core.errors import ConfigError
from athanor.train.parallel.base import Alone
from athanor.train.parallel.distributed import Distributed
from athanor.train.parallel.layout import Layout
from athanor.train.parallel.pipeline import Pipelined

_PDEATHSIG = 1  # of prctl(2)
TIMEOUT = datetime.timedelta(minutes=10)


def inside() -> bool:
    """Whether torchrun has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start(recipe: str, config: Any, layout: Layout, folder: Path, restarts: int) -> None:
    """Become torchrun with `layout.world` processes of the command `recipe`, each with this config; does not return.

    Does nothing for one process, or where torchrun has started this one already (many machines: run torchrun on each).

    Args:
        recipe: name of the command.
        config: its dataclass.
        layout: how many processes.
        folder: where the config is put for them to read.
        restarts: how often all processes are started again after one has died; they go on from the last checkpoint.
    """
    if layout.world == 1 or inside():
        return
    path = folder / "parallel.json"
    io.write_json(path, configs.to_dict(config))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // layout.world)))}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={layout.world}"]
    command += [f"--max-restarts={restarts}", "-m", "athanor", recipe, "--config", str(path)]
    sys.stdout.flush()
    os.execve(sys.executable, command, os.environ | threads)


@contextmanager
def joined(layout: Layout) -> Iterator[torch.device]:
    """This process in the group of all; gives its device.

    Raises ConfigError when torchrun started another number of processes than the layout has.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size != layout.world:
        raise ConfigError(
            f"the layout {layout} has {layout.world} processes and torchrun started {size}: start as many as the product says"
        )
    _die_with_parent()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    td.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    try:
        yield device
    finally:
        td.destroy_process_group()


@contextmanager
def strategy(layout: Layout) -> Iterator[Alone]:
    """How this process takes part in a layout: alone, or in the group that it joins for as long as the block runs."""
    if layout.world == 1:
        yield Alone()
        return
    with joined(layout) as device:
        yield (Pipelined if layout.pp > 1 else Distributed)(layout, device)


def _die_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it is gone, so that none is left behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:  # it was gone before we asked
            os._exit(1)
