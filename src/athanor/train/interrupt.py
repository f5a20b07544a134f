"""A signal to stop: the run saves between two updates and leaves, instead of dying in the middle of one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from athanor.core import dist

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
    """Which signal came, if any.

    Attributes:
        signal: SIGTERM or SIGINT once it came, here or (after `anywhere`) in another process; None before.
    """

    signal: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """What a process that a signal ended reports, 128 + its number: 143 for SIGTERM, 130 for SIGINT."""
        assert self.signal is not None
        return 128 + self.signal

    def message(self, step: int, steps: int) -> str:
        """What to tell the user once the state is saved."""
        assert self.signal is not None
        return f"stopped by {self.signal.name} after step {step} of {steps}, which is saved: give the same command to go on"

    def anywhere(self, device: torch.device) -> bool:
        """Whether any process of the run got a signal. All call it once per step, so all leave after the same step.

        Args:
            device: of the tensor that is summed over the processes (NCCL takes those of its own device only).
        """
        if dist.world_size() == 1:
            return self.signal is not None
        came = torch.tensor([float(self.signal == s) for s in _SIGNALS], device=device)
        for count, one in zip(dist.all_reduce_sum(came).tolist(), _SIGNALS, strict=True):
            if count:
                self.signal = one
                return True
        return False


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Take SIGTERM and SIGINT as a wish to stop, told by the yielded object. A second signal ends the process at once.

    The handlers there were come back afterwards. A signal that the process ignores (SIGINT under nohup or in the background)
    stays ignored, and outside the main thread, where Python has no handlers, nothing is taken.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def note(number: int, frame: FrameType | None) -> None:
        if interrupt.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        interrupt.signal = signal.Signals(number)

    before = {s: signal.getsignal(s) for s in _SIGNALS}
    taken = [s for s, handler in before.items() if handler not in (signal.SIG_IGN, None)]  # None: not Python's to put back
    try:
        for s in taken:
            signal.signal(s, note)
        yield interrupt
    finally:
        for s in taken:
            signal.signal(s, before[s])
