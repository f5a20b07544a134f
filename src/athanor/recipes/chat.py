"""Chat with a model in the terminal.

    athanor chat runs/first
    athanor chat runs/first --prompt "What is 12 + 30?" > answer.txt

On a terminal the reasoning is shown dim before the answer. Elsewhere standard output has the answers alone, and everything else
goes to standard error; standard input is then read as one message a line.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import athanor
from athanor.core import io
from athanor.core.errors import CheckpointError, RequestError, nearest
from athanor.serve.dialogue import Dialogue, Parameters, Turn
from athanor.serve.terminal import Screen, entries, interrupts
from athanor.tokenizer.chat import ours

POSITIONAL = ("path",)
HELP = """\
/reset             forget the conversation
/system TEXT       set the system text and forget the conversation; without TEXT: none
/params            show how answers are sampled; /params temperature=0 max_tokens=50 changes it, top_k= takes it back
/save FILE         write the conversation and the parameters to FILE, as JSON; /load FILE goes on from there
/help              this
/quit              leave (so does Ctrl-D); Ctrl-C stops an answer
A line that ends in \\ goes on in the next one; \"\"\" begins and ends a text of several lines."""
COMMANDS = ("/reset", "/system", "/params", "/save", "/load", "/help", "/quit")
SETTABLE = ("temperature", "top_p", "top_k", "max_tokens", "seed")  # on the command line too


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
    dialogue = Dialogue(lm.engine(max_batch=1), ours(lm.tokenizer), config.system)
    params = Parameters(**{name: getattr(config, name) for name in SETTABLE})
    chat = _Chat(lm.name, dialogue, params, Screen(sys.stdout, sys.stderr))
    if config.prompt is not None:
        return 130 if chat.answer(config.prompt).finish_reason == "abort" else 0
    if sys.stdin.isatty():
        chat.screen.note(f"{lm.name}: /help shows the commands, Ctrl-D leaves.\n")
    failures = 0
    for text, quoted in entries(sys.stdin, chat.screen, COMMANDS):
        try:
            if text.startswith("/") and not quoted:
                if text == "/quit":
                    break
                chat.command(*text.partition(" ")[::2])
            elif text:
                chat.answer(text)
        except (RequestError, CheckpointError, OSError) as error:
            chat.screen.note(f"{error}\n")
            failures += 1
    return 1 if failures and not sys.stdin.isatty() else 0


class _Chat:
    """The dialogue and how its answers are sampled."""

    def __init__(self, name: str, dialogue: Dialogue, params: Parameters, screen: Screen) -> None:
        self.name, self.dialogue, self.params, self.screen = name, dialogue, params, screen

    def answer(self, text: str) -> Turn:
        """Ask, show the answer while it comes, then what it cost."""
        with interrupts() as stopped:
            turn = self.dialogue.ask(text, stopped=stopped, **self.params.draw())
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
                self.params.set(rest)
                self.screen.note(f"{self.params}\n")
            case "/save" | "/load" if not rest.strip():
                raise RequestError(f"{name} needs a file: {name} talk.json")
            case "/save":
                kept = {"model": self.name, "parameters": self.params.values(), "messages": self.dialogue.messages()}
                io.atomic_write(Path(rest.strip()).expanduser(), json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
                self.screen.note(f"[{len(kept['messages'])} messages in {rest.strip()}]\n")
            case "/load":
                self._load(Path(rest.strip()).expanduser())
            case "/help":
                self.screen.note(HELP + "\n")
            case _:
                raise RequestError(f"no command {name!r}{nearest(name, COMMANDS)}; there are {', '.join(COMMANDS)}")

    def _load(self, path: Path) -> None:
        found: Any = io.read_json(path)
        if not isinstance(found, dict) or not isinstance(found.get("parameters", {}), dict) or "messages" not in found:
            raise RequestError(f"{str(path)!r} holds no conversation: it needs 'messages', as /save writes them")
        self.dialogue.resume(found["messages"])
        self.params.restore(found.get("parameters", {}))
        other = found.get("model", self.name)
        self.screen.note(f"[{len(found['messages'])} messages{f', of {other}' if other != self.name else ''}]\n")


def _cost(turn: Turn) -> str:
    if turn.finish_reason == "abort":
        return "stopped"
    cut = ", cut: that was the limit" if turn.finish_reason == "length" else ""
    return f"{turn.tokens} tokens, {turn.tokens / max(turn.seconds, 1e-9):.0f} tokens/s{cut}"
