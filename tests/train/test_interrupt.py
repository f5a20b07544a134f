"""Signals: the first is a wish, the second an end; handlers come back; all processes leave together."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from athanor.core import dist
from athanor.train.interrupt import interruptible

CPU = torch.device("cpu")


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "SIGINT")])
def test_a_signal_is_noted_and_handlers_come_back(number, code, name):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with interruptible() as interrupt:
        assert not interrupt.anywhere(CPU)
        os.kill(os.getpid(), number)
        assert interrupt.signal is number and interrupt.anywhere(CPU)
        assert interrupt.exit_code == code
        assert interrupt.message(3, 10) == (
            f"stopped by {name} after step 3 of 10, which is saved: give the same command to go on"
        )  # fmt: skip
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), interruptible():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible() as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupt.signal is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_is_taken():
    found = []

    def other():
        with interruptible() as interrupt:
            found.append((signal.getsignal(signal.SIGTERM), interrupt.signal))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found == [(signal.getsignal(signal.SIGTERM), None)]


SECOND = """
import os, signal, sys, threading
from athanor.train.interrupt import interruptible
with interruptible() as interrupt:
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    assert interrupt.signal is not None
    print("noted", flush=True)
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    threading.Event().wait()  # never gets here
"""


@pytest.mark.parametrize("signals", [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM")])
def test_a_second_signal_ends_the_process_at_once(signals):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", SECOND, *signals], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "noted\n" and done.returncode == -getattr(signal, signals[1]), done.stderr


@pytest.mark.parametrize(("counts", "wanted"), [([0, 0], None), ([2, 0], signal.SIGTERM), ([0, 1], signal.SIGINT)])
def test_a_signal_to_any_process_is_known_to_all(monkeypatch, counts, wanted):
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    told = []
    monkeypatch.setattr(dist, "all_reduce_sum", lambda own: told.append(own.tolist()) or torch.tensor(counts, dtype=own.dtype))
    with interruptible() as interrupt:
        assert interrupt.anywhere(CPU) == (wanted is not None)
        assert interrupt.signal is wanted
    assert told == [[0.0, 0.0]]
    with interruptible() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        interrupt.anywhere(CPU)
    assert told[1] == [0.0, 1.0]
