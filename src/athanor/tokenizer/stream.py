"""Tokens in, text out while they come: what a client may already see of an answer.

Tokens are pieces of bytes, so a character may be half there, and the last characters may turn out to begin a stop text; both
are held back until they are certain. All pieces together are exactly the text that `chat.parse` gives, cut by `cut`.
"""

from __future__ import annotations

from collections.abc import Sequence

from athanor.core.errors import RequestError
from athanor.tokenizer.bpe import Tokenizer
from athanor.tokenizer.template import ARGUMENTS, CALL
from athanor.tokenizer.vocabulary import Vocabulary


def cut(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """`text` before the stop text that is complete first, and which one that is.

    Of two that end at the same character the longer one counts, as if the text had come character by character.
    """
    matches = [(text.find(s) + len(s), text.find(s), s) for s in stop if s in text]
    return (text[: min(matches)[1]], min(matches)[2]) if matches else (text, None)


class StreamDecoder:
    """Turns the tokens of one answer into content and reasoning as they come, without ever taking a character back.

    Calls of tools are neither, as `chat.parse` has it.

    Raises RequestError (param "stop") when a stop text is empty.

    Attributes:
        stopped_by: the stop text that appeared in the content, after which no tokens are read; None so far.
    """

    def __init__(self, tokenizer: Vocabulary, stop: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        """`before` is what the answer goes on from."""
        if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise RequestError(f"stop ({stop!r}) must be a list of texts, none of them empty: leave it out", param="stop")
        self.stopped_by: str | None = None
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._ended = False
        self._thinking = False
        control = tokenizer.control if isinstance(tokenizer, Tokenizer) else {}
        self._call_id, self._arguments_id = control.get(CALL), control.get(ARGUMENTS)
        self._name: list[int] | None = None  # of a call, until its arguments make it one
        self._calling = False
        self._of_content, self._of_reasoning = tokenizer.pieces(before), tokenizer.pieces(())
        self._content = ""
        self._reasoning = ""

    def push(self, id: int) -> None:
        """Read one token; nothing after a stop text or `<|end|>` is read. Raises TokenizerError for an id out of range."""
        if self.stopped_by is not None or self._ended:
            return
        if id == self._tokenizer.end_id:
            self._release_name()
            self._ended = True
        elif id == self._tokenizer.think_id:
            self._thinking = True
        elif id == self._tokenizer.end_think_id:
            self._thinking = False
        elif self._thinking:
            self._reasoning += self._of_reasoning.push(id)
        elif id == self._call_id:
            self._release_name()
            self._name, self._calling = [], False
        elif id == self._arguments_id:
            if self._name is not None:
                self._calling, self._name = bool(self._name), None
        elif self._name is not None:
            if self._tokenizer.decode([id]):
                self._name.append(id)
        elif not self._calling:
            self._add_content(self._of_content.push(id))

    def take(self) -> tuple[str, str]:
        """New content and new reasoning since the last call, as far as they are certain."""
        certain = len(self._content) if self.stopped_by is not None else len(self._content) - self._held_back()
        content, self._content = self._content[:certain], self._content[certain:]
        reasoning, self._reasoning = self._reasoning, ""
        return content, reasoning

    def finish(self) -> tuple[str, str]:
        """The rest, when no more tokens come: what was held back is given out, half characters as U+FFFD."""
        self._release_name()
        if self.stopped_by is None:
            self._add_content(self._of_content.finish())
        self._reasoning += self._of_reasoning.finish()
        content, self._content = self._content, ""
        reasoning, self._reasoning = self._reasoning, ""
        return content, reasoning

    def _release_name(self) -> None:
        """What began as a call and was none is content."""
        for id in self._name or ():
            if self.stopped_by is None:
                self._add_content(self._of_content.push(id))
        self._name = None

    def _add_content(self, new: str) -> None:
        # What was taken cannot be part of a stop text, and what was searched before holds none.
        start = max(0, len(self._content) - self._longest + 1)
        head, tail = self._content[:start], self._content[start:] + new
        tail, self.stopped_by = cut(tail, self._stop)
        self._content = head + tail

    def _held_back(self) -> int:
        """Length of the longest end of the content that begins a stop text."""
        for length in range(min(self._longest - 1, len(self._content)), 0, -1):
            end = self._content[-length:]
            if any(s.startswith(end) for s in self._stop):
                return length
        return 0
