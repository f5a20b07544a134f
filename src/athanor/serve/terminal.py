"""The terminal of `athanor chat`: what is typed, what is shown, Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TextIO

from athanor.core.errors import RequestError

# What a model says must not move the cursor or recolour the terminal: control characters are shown, not sent.
_VISIBLE = {**{i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"}, 127: 0x2421, **dict.fromkeys(range(128, 160), 0xFFFD)}
QUOTES = '"""'
HISTORY = 1000  # lines that are kept from one chat to the next


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


class Entry(NamedTuple):
    """What was entered at once; `quoted`, between triple quotes, it is no command whatever it begins with."""

    text: str
    quoted: bool


def entries(source: TextIO, screen: Screen, commands: Sequence[str] = ()) -> Iterator[Entry]:
    r"""What the user types at a prompt, or what stands in `source` when that is no terminal: a line each.

    A line that ends in \ goes on in the next one; one that begins with triple quotes goes on to the line that ends with them.
    On a terminal lines are edited, Tab completes `commands`, and the lines of earlier chats can be called back.

    Raises RequestError for a line that is not UTF-8, and for quotes that are not closed.
    """
    typed = source.isatty()
    with _editing(commands) if typed else contextlib.nullcontext():
        while True:
            try:
                yield _entry(lambda more: _line(source, typed, more))
            except KeyboardInterrupt:
                if not typed:
                    raise
                screen.note("\n")
            except EOFError:
                if typed:
                    screen.note("\n")
                return


def _entry(read: Callable[[bool], str]) -> Entry:
    first = read(False).strip()
    if first.startswith(QUOTES):
        lines = [first[len(QUOTES) :]]
        while not lines[-1].rstrip().endswith(QUOTES):
            try:
                lines.append(read(True))
            except EOFError as error:
                raise RequestError(f"a text that begins with {QUOTES} has no end: put {QUOTES} after its last line") from error
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return Entry("\n".join(lines).strip("\n"), quoted=True)
    lines = [first]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\").rstrip()
        try:
            lines.append(read(True).rstrip())
        except EOFError:
            break
    return Entry("\n".join(lines).strip(), quoted=False)


def _line(source: TextIO, typed: bool, more: bool) -> str:
    try:
        # input() edits lines, but would put its prompt among the answers when they go to a file.
        if typed and sys.stdout.isatty():
            return input("… " if more else "> ")
        line = source.readline()
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8 ({error}): convert it first") from error
    if not line:
        raise EOFError
    return line.rstrip("\n")


@contextlib.contextmanager
def _editing(commands: Sequence[str]) -> Iterator[None]:
    """Inside, input() has editing, completion and the history of earlier chats, where Python has readline."""
    try:
        import readline
    except ImportError:  # on Windows
        yield
        return
    path = history_file()
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY)
    readline.set_completer_delims(" ")
    readline.set_completer(lambda text, i: [*(f"{c} " for c in commands if text and c.startswith(text)), None][i])
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
    try:
        yield
    finally:
        readline.set_completer(None)
        _keep(readline, path)


def history_file() -> Path:
    """Where the lines of chats are kept: in XDG_STATE_HOME, or ~/.local/state."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "athanor" / "chat_history"


def _keep(readline: ModuleType, path: Path) -> None:
    with contextlib.suppress(OSError):  # a home that cannot be written is no reason to fail
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.write_history_file(path)


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
