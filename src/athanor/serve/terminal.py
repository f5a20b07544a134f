"""The terminal of `athanor chat`: what is typed, what is shown, Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from athanor.core.errors import RequestError

# What a model says must not move the cursor or recolour the terminal: control characters are shown, not sent.
_VISIBLE = {**{i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"}, 127: 0x2421, **dict.fromkeys(range(128, 160), 0xFFFD)}


class Screen:
    """Where answers and notes go.

    On a terminal both go to `out`, notes dim. Elsewhere `out` has the answers alone, without escape codes, and notes go to `err`.
    """

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out, self._notes = out, out if out.isatty() else err
        self._dim = self._notes.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

    def say(self, text: str) -> None:
        """Show a piece of an answer."""
        self._write(self._out, text, dim=False)

    def note(self, text: str) -> None:
        """Show what is not an answer."""
        self._write(self._notes, text, dim=self._dim)

    @staticmethod
    def _write(stream: TextIO, text: str, *, dim: bool) -> None:
        if stream.isatty():
            text = text.translate(_VISIBLE)
        stream.write(f"\x1b[2m{text}\x1b[0m" if dim else text)
        stream.flush()


def lines(source: TextIO, screen: Screen) -> Iterator[str]:
    """What the user types at a prompt, or the lines of `source` when that is no terminal.

    Raises RequestError for a line that is not UTF-8.
    """
    typed = source.isatty()
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() its editing and history, where there is one
    while True:
        try:
            # input() edits lines, but would put its prompt among the answers when they go to a file.
            line = input("> ") if typed and sys.stdout.isatty() else _next_line(source)
        except KeyboardInterrupt:
            if not typed:
                raise
            screen.note("\n")
        except EOFError:
            if typed:
                screen.note("\n")
            return
        except UnicodeDecodeError as error:
            raise RequestError(f"standard input is not UTF-8 ({error}): convert it first") from error
        else:
            yield line.strip()


def _next_line(source: TextIO) -> str:
    line = source.readline()
    if not line:
        raise EOFError
    return line


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C makes the yielded function true, so that no step of the engine is torn; a second interrupts."""
    pressed = False

    def press(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
