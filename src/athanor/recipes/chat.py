"""Chat with a model in the terminal.

    athanor chat runs/first
    athanor chat runs/first --prompt "What is 12 + 30?" > answer.txt

On a terminal the reasoning is shown dim before the answer. Elsewhere standard output has the answers alone, and everything else
goes to standard error; standard input is then read as one message a line.
"""

from __future__ import annotations

import secrets
import sys
from dataclasses import dataclass
from pathlib import Path

import athanor
from athanor.core.errors import RequestError, nearest
from athanor.serve.dialogue import Dialogue, Turn
from athanor.serve.terminal import Screen, interrupts, lines
from athanor.tokenizer.chat import ours

POSITIONAL = ("path",)
HELP = """\
/reset             forget the conversation
/system TEXT       set the system text and forget the conversation; without TEXT: none
/params            show how answers are sampled; /params temperature=0 max_tokens=50 changes it
/help              this
/quit              leave (so does Ctrl-D); Ctrl-C stops an answer"""
COMMANDS = ("/reset", "/system", "/params", "/help", "/quit")
SETTABLE = {"temperature": float, "top_p": float, "top_k": int, "max_tokens": int, "seed": int}


@dataclass(frozen=True)
class Config:
    path: Path
    """A run folder (runs/first) or one checkpoint of it (runs/first/rl)."""
    checkpoint: str | None = None
    """Which checkpoint of a run folder: base, sft, rl, int8, int4 ...; by default the run's own choice."""
    prompt: str | None = None
    """Answer this one message and leave."""
    system: str | None = None
    """The system text."""
    temperature: float = 0.7
    """0 always takes the most probable token; the higher, the more varied."""
    top_p: float = 1.0
    """Sample from the most probable tokens that reach this probability together."""
    top_k: int = 0
    """Sample from this many most probable tokens; 0 is all."""
    max_tokens: int | None = None
    """Length of an answer in tokens; by default what the context has left."""
    seed: int | None = None
    """Same seed, same answers; by default another one for every answer."""


def main(config: Config) -> int:
    lm = athanor.load(config.path, config.checkpoint)
    chat = _Chat(config, Dialogue(lm.engine(max_batch=1), ours(lm.tokenizer), config.system), Screen(sys.stdout, sys.stderr))
    if config.prompt is not None:
        return 130 if chat.answer(config.prompt).finish_reason == "abort" else 0
    if sys.stdin.isatty():
        chat.screen.note(f"{lm.name}: /help shows the commands, Ctrl-D leaves.\n")
    failures = 0
    for line in lines(sys.stdin, chat.screen):
        try:
            if line.startswith("/"):
                if line == "/quit":
                    break
                chat.command(*line.partition(" ")[::2])
            elif line:
                chat.answer(line)
        except RequestError as error:
            chat.screen.note(f"{error}\n")
            failures += 1
    return 1 if failures and not sys.stdin.isatty() else 0


class _Chat:
    """The dialogue and how its answers are sampled."""

    def __init__(self, config: Config, dialogue: Dialogue, screen: Screen) -> None:
        self.dialogue, self.screen = dialogue, screen
        self._default = {name: getattr(config, name) for name in SETTABLE}
        self._params = dict(self._default)

    def answer(self, text: str) -> Turn:
        """Ask, show the answer while it comes, then what it cost."""
        with interrupts() as stopped:
            seed = secrets.randbits(62) if self._params["seed"] is None else self._params["seed"]
            turn = self.dialogue.ask(text, stopped=stopped, **{**self._params, "seed": seed})
            if turn.dropped:
                self.screen.note(f"[the context is full: the oldest {turn.dropped} messages are forgotten]\n")
            thought = False
            for chunk in turn:
                if chunk.reasoning:
                    self.screen.note(chunk.reasoning)
                    thought = True
                if chunk.content:
                    if thought:
                        self.screen.note("\n")
                        thought = False
                    self.screen.say(chunk.content)
        self.screen.say("\n")
        self.screen.note(f"[{_cost(turn)}]\n")
        return turn

    def command(self, name: str, rest: str) -> None:
        """Carry out a line that begins with a slash. Raises RequestError for one that cannot be understood."""
        match name:
            case "/reset":
                self.dialogue.reset()
            case "/system":
                self.dialogue.system = rest.strip() or None
                self.dialogue.reset()
            case "/params":
                for word in rest.split():
                    self._set(*word.partition("=")[::2])
                shown = (f"{name}={'auto' if value is None else value}" for name, value in self._params.items())
                self.screen.note(" ".join(shown) + "\n")
            case "/help":
                self.screen.note(HELP + "\n")
            case _:
                raise RequestError(f"no command {name!r}{nearest(name, COMMANDS)}; there are {', '.join(COMMANDS)}")

    def _set(self, name: str, value: str) -> None:
        if name not in SETTABLE:
            raise RequestError(f"no parameter {name!r}{nearest(name, SETTABLE)}; there are {', '.join(SETTABLE)}")
        try:
            self._params[name] = SETTABLE[name](value) if value else self._default[name]
        except ValueError as error:
            raise RequestError(f"{name} is {value!r}, but must be a number ({SETTABLE[name].__name__})", name) from error


def _cost(turn: Turn) -> str:
    if turn.finish_reason == "abort":
        return "stopped"
    cut = ", cut: that was the limit" if turn.finish_reason == "length" else ""
    return f"{turn.tokens} tokens, {turn.tokens / max(turn.seconds, 1e-9):.0f} tokens/s{cut}"
