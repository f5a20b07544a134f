"""Processes that tests start: how to find all that is left of them, and to wait for what they come to."""

import os
import secrets
import sys
import threading
import time
from pathlib import Path

_MARK = "ATHANOR_TEST_RUN"  # in the environment of a command and of all that it starts
_pause = threading.Event().wait


def environment():
    """The environment of a command that runs this very code on one thread, with a mark of its own."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", _MARK: secrets.token_hex(8)}


def alive(env, worker=False):
    """Processes with this mark that run, by /proc: process groups do not tell, torchrun's workers have sessions of their own."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            given = (folder / "environ").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            continue  # gone in between, or somebody else's
        marked = f"{_MARK}={env[_MARK]}".encode() in given
        is_worker = any(entry.startswith(b"LOCAL_RANK=") for entry in given)
        if marked and state != "Z" and (is_worker or not worker):
            found.append(int(folder.name))
    return sorted(found)


def until(condition, what, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        _pause(0.01)
