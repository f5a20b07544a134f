"""What the engine and the public face ask of every tokenizer: ours (`bpe.py`) and those of imported models (`foreign.py`)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Protocol


class Pieces(Protocol):
    """Text while its tokens come: never a half character, never one taken back."""

    def push(self, id: int) -> str:
        """What the next token adds, as far as it is certain. Raises TokenizerError for an id that no model can give."""
        ...

    def finish(self) -> str:
        """What was held back; half characters become U+FFFD."""
        ...


class Vocabulary(Protocol):
    """A tokenizer. Control ids that it does not have are None."""

    @property
    def hash(self) -> str: ...  # SHA-256 (hex): equal vocabularies have equal hashes
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def end_id(self) -> int | None: ...
    @property
    def think_id(self) -> int | None: ...
    @property
    def end_think_id(self) -> int | None: ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text alone, in which no control token ever stands (law L1)."""
        ...

    def prompt(self, text: str) -> list[int]:
        """Ids of a text as the model is to read it: with the control tokens that belong before and after it."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, control tokens left out."""
        ...

    def token(self, id: int) -> str:
        """How one token is shown to a reader."""
        ...

    def pieces(self, before: Sequence[int]) -> Pieces:
        """A decoder of the tokens that come after `before`."""
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files that it was made of."""
        ...
