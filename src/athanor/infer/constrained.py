"""Structured output: which tokens may come next, so that an answer has the form that was asked for.

The grammar is computed by the library llguidance (an extra); what stands here is its meeting with our two kinds of tokenizers,
with tokens that end a text, and with what people send. A form is compiled once and then followed by any number of answers:

    grammar = constrained.compile(structure, tokenizer, vocab_size)
    form = Constraint(grammar, end_ids)
    while not form.done:
        form.advance(choose(logits.masked_fill(~form.allowed(), -inf)))

Legend: V vocabulary of the model, which may be larger than the tokenizer's.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from athanor.core.errors import MissingExtraError, RequestError
from athanor.tokenizer.bpe import BYTE_OF_LETTER, Tokenizer
from athanor.tokenizer.template import ARGUMENTS, CALL, END_THINK, THINK
from athanor.tokenizer.vocabulary import Vocabulary
from athanor.types import Structure

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_LENGTH = 2**16
"""Characters of a schema, expression or grammar at most, and of the choices together."""

_NAMED = (CALL, ARGUMENTS, THINK, END_THINK)  # control tokens that a grammar may ask for by name
# Blanks between the parts of a JSON text: enough for indentation, too few for an answer that is nothing else.
_JSON = {"whitespace_pattern": r"[ \t\r\n]{1,32}", "lenient": False}
_STATES = 50_000  # of the lexer, 1 to 2 kB each
_ITEMS = 1000  # of the parser that are open at once: 250 optional properties, and no step of a hostile form above 50 ms
# A long chain of rules is followed by recursion, which a usual stack does not hold for the longest that MAX_LENGTH lets through.
_STACK = 2**28
_stack_lock = threading.Lock()
_NOTHING_FITS = "no token of this model's vocabulary fits"
_BROKE_OFF = "could not be followed to the end of the answer"

Kind = Literal["json_schema", "json", "regex", "choice", "grammar"]
_PARAM: dict[Kind, str] = {"json_schema": "response_format", "json": "response_format"}


@dataclass(frozen=True, eq=False)
class Grammar:
    """A form that `compile` has made ready; it never changes and may be shared by threads."""

    tokenizer: Vocabulary
    vocab_size: int
    table: _Table
    param: str
    _matcher: LLMatcher

    def matcher(self) -> LLMatcher:
        """A new walk through it, from its beginning."""
        return self._matcher.deep_copy()


class Constraint:
    """One answer's way through a grammar.

    Args:
        grammar: the form.
        end_ids: tokens that end the answer; they are allowed exactly where the form may end.
        before: what the answer goes on from. Some vocabularies write no space where a text begins, and there no token is allowed
            whose space would be lost.
        reasoning: whether the answer may think first: what stands between `<think>` and `</think>` at its beginning is free.
            Changes nothing where the vocabulary has no such tokens.

    Raises:
        RequestError: no token may come first.
    """

    def __init__(
        self, grammar: Grammar, end_ids: Collection[int] = (), *, before: Sequence[int] = (), reasoning: bool = False
    ) -> None:
        self._grammar = grammar
        self._matcher = grammar.matcher()
        self._end_ids = frozenset(end_ids)
        self._ends = [id for id in self._end_ids if id < grammar.vocab_size]
        self._think_id = grammar.tokenizer.think_id if reasoning else None
        # What each token so far was part of; thoughts and ends are no business of the grammar.
        self._parts: list[Literal["thought", "form", "end"]] = []
        self._thinking = [False]
        self._lost = grammar.table.spaces if _loses_space(grammar, before) else None
        if not self.allowed().any() and not self.done:
            raise _error(grammar.param, _NOTHING_FITS, "use another form")

    @property
    def done(self) -> bool:
        """Whether nothing but an end may follow: the form is complete and cannot go on, or an end was taken."""
        if self._parts and self._parts[-1] == "end":
            return True
        return not self._thinking[-1] and self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self) -> Tensor:
        """Which tokens may come next: (V,) bool, on the CPU. Tokens that end the answer are among them where the form may end.

        Once `done`, it holds at most those; it is empty only where nothing may follow and no token ends the answer. Raises
        RequestError when the form leads nowhere with this vocabulary (one that lacks some bytes), or is too complex to follow.
        """
        grammar, table = self._grammar, self._grammar.table
        mask = np.zeros(grammar.vocab_size, dtype=bool)
        if self._parts and self._parts[-1] == "end":
            return torch.from_numpy(mask)
        n = min(grammar.vocab_size, len(table.text))
        if self._thinking[-1]:
            mask[:n] = table.text[:n]
            mask[self._ends] = False
            mask[grammar.tokenizer.end_think_id] = True
            return torch.from_numpy(mask)
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        if self._matcher.is_error():
            raise _error(grammar.param, _reason(self._matcher.get_error()), "use a simpler form", _BROKE_OFF)
        mask[:n] = bits[:n].astype(bool) & table.permitted[:n]
        if self._lost is not None and "form" not in self._parts:
            mask[:n] &= ~self._lost[:n]
        may_end = bool(bits[table.end])
        mask[self._ends] = may_end
        if self._think_id is not None and not self._parts:
            mask[self._think_id] = True
        if self._parts and not may_end and not mask.any():
            raise _error(grammar.param, _NOTHING_FITS, "use another form", _BROKE_OFF)
        return torch.from_numpy(mask)

    def advance(self, id: int) -> None:
        """Take the next token, one of those allowed; after another one nothing is."""
        assert not (self._parts and self._parts[-1] == "end"), "the answer has ended"
        thinking = self._thinking[-1]
        if thinking or (id == self._think_id and not self._parts):
            self._parts.append("thought")
            self._thinking.append(id != self._grammar.tokenizer.end_think_id)
            return
        if id in self._end_ids:
            self._parts.append("end")
        else:
            self._matcher.consume_token(id)  # what goes wrong is told by `allowed`
            self._parts.append("form")
        self._thinking.append(False)

    def rollback(self, n: int) -> None:
        """Take back the last n tokens."""
        assert 0 <= n <= len(self._parts), f"{len(self._parts)} tokens were taken, {n} cannot be taken back"
        if n:
            formed = self._parts[-n:].count("form")
            del self._parts[-n:], self._thinking[-n:]
            if formed:
                self._matcher.rollback(formed)


def compile(structure: Structure, tokenizer: Vocabulary, vocab_size: int) -> Grammar:
    """Make `structure` ready for answers of a model of `vocab_size` tokens; kept, so that the next time costs nothing.

    It takes milliseconds, or a second for the largest forms, and some seconds for the first one with a new tokenizer.

    Args:
        structure: see `types.Structure`. A grammar is in llguidance's Lark; of control tokens it can ask for those of thoughts
            and of calls of tools, and for no other.

    Raises:
        MissingExtraError: llguidance is not installed.
        RequestError: the structure is malformed, uses what the library does not know, can never be fulfilled, or is too large.
    """
    param = structure.param or _PARAM.get(structure.kind, "structured_outputs")
    key = _Key(type(tokenizer), tokenizer.hash, tokenizer)
    table = _table(key)
    matcher = _compiled(structure.kind, structure.value, key, param)
    return Grammar(tokenizer, vocab_size, table, param, matcher)


@dataclass(frozen=True)
class _Key:
    """What is kept of a tokenizer is that of every equal one."""

    kind: type
    hash: str
    tokenizer: Vocabulary = field(compare=False)


@lru_cache(maxsize=256)
def _compiled(kind: Kind, value: str, key: _Key, param: str) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    if len(value) > MAX_LENGTH:
        raise _error(param, f"its {kind} has {len(value)} characters and may have {MAX_LENGTH}", "make it shorter")
    grammar = _grammar_text(kind, value, param)
    inner = _table(key).inner
    limits = LLParserLimits(max_lexer_states=_STATES, max_items_in_row=_ITEMS, verbose_errors=False)
    made: list[LLMatcher] = []

    def make() -> None:
        matcher = LLMatcher(inner, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # some forms show only here that they cannot be followed
        made.append(matcher)

    with _stack_lock:
        usual = threading.stack_size(_STACK)
        try:
            thread = threading.Thread(target=make, name="athanor-grammar")
            thread.start()
        finally:
            threading.stack_size(usual)
    thread.join()
    matcher = made[0]
    if matcher.is_error():
        what = {"json_schema": "schema", "json": "schema"}.get(kind, kind)
        raise _error(param, _reason(matcher.get_error()), f"correct the {what}, or leave out what is not supported")
    return matcher


def _grammar_text(kind: Kind, value: str, param: str) -> str:
    """What llguidance reads."""
    from llguidance import LLMatcher

    if kind == "grammar":
        return LLMatcher.grammar_from_lark(value)
    if kind == "regex":
        return LLMatcher.grammar_from_regex(value)
    if kind == "choice":
        choices = _parsed(value, "the choices", param)
        if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
            raise _error(param, "choice must be a list of at least one text", 'give texts, ["yes", "no"]')
        return LLMatcher.grammar_from_regex("|".join(map(_literal, choices)))
    schema = {"type": "object"} if kind == "json" else _parsed(value, "the schema", param)
    if schema is False or not isinstance(schema, (dict, bool)):
        found = "false, which no text fulfils" if schema is False else f"of type {type(schema).__name__}"
        raise _error(param, f"the schema must be an object or true, and is {found}", 'give {"type": "object"}')
    as_object = {} if schema is True else schema  # the library's settings are put into it
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(as_object), overrides=_JSON)  # type: ignore[arg-type]  # all optional
    except ValueError as error:
        raise _error(param, _reason(str(error)), "correct the schema") from None


def _literal(text: str) -> str:
    """A regular expression for `text` alone."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _parsed(text: str, what: str, param: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise _error(param, f"{what} nests too deeply", "make it flatter") from None
    except ValueError as error:
        raise _error(param, f"{what} must be JSON ({error})", "correct it") from None


def _error(param: str, reason: str, remedy: str, problem: str = "cannot be followed") -> RequestError:
    return RequestError(f"the form that {param} asks for {problem}: {reason}; {remedy}", param)


def _reason(message: str) -> str:
    """The library's own words, on one line and without what it shows of the grammar."""
    if message.startswith("NoExtension"):
        return _NOTHING_FITS
    lines = [line.strip() for line in message.replace("<non-verbose/>", "").split("; following")[0].splitlines()]
    told = " ".join(line for line in lines if line.strip("^") and "|" not in line[:6])
    return (told or message)[:300].rstrip(" .")


# --- tokenizers


@dataclass(frozen=True, eq=False)
class _Table:
    """A tokenizer as the library reads it: a token's bytes for each of its ids.

    end        the library's own end of a text
    text       tokens that stand for bytes
    permitted  those, and control tokens that a grammar may ask for by name
    spaces     tokens that begin with a space
    """

    inner: LLTokenizer
    end: int
    text: np.ndarray[Any, np.dtype[np.bool_]]
    permitted: np.ndarray[Any, np.dtype[np.bool_]]
    spaces: np.ndarray[Any, np.dtype[np.bool_]]


@lru_cache(maxsize=8)
def _table(key: _Key) -> _Table:
    tokenizer = key.tokenizer
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "structured output is computed by llguidance, which is not installed: pip install 'athanor-lm[structured]'"
        ) from error
    tokens = token_bytes(tokenizer)
    text = np.array([bool(token) for token in tokens])
    permitted, named = text.copy(), list[int]()
    if isinstance(tokenizer, Tokenizer):
        named = [tokenizer.control[name] for name in _NAMED]
        for name, id in zip(_NAMED, named, strict=True):
            tokens[id] = name.encode()
            permitted[id] = True
    spaces = np.array([token.startswith(b" ") for token in tokens])
    wrapped = _Wrapped(tokenizer, tokens, named)
    return _Table(LLTokenizer(TokenizerWrapper(wrapped)), wrapped.eos_token_id, text, permitted, spaces)


class _Wrapped:
    """What the library asks of a tokenizer.

    Behind our tokens stand the bytes that they lack, since it takes every text to have an encoding, and its end of a text; no
    mask of ours reaches there.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Vocabulary, tokens: list[bytes], named: list[int]) -> None:
        lacking = sorted({bytes([byte]) for byte in range(256)} - set(tokens))
        tokens = [*tokens, *lacking]
        self.eos_token_id = len(tokens)
        self.tokens = [*tokens, b"<end of text>"]
        self.special_token_ids = [*named, self.eos_token_id]
        self._tokenizer = tokenizer
        self._ids = {token: id for id, token in reversed(list(enumerate(tokens))) if token and id not in named}
        self._longest = max(map(len, self._ids))

    def __call__(self, data: bytes) -> list[int]:
        """How a text that the grammar leaves no choice in is to be written: as the tokenizer does, or by longest tokens."""
        try:
            ids = self._tokenizer.encode(data.decode())
        except UnicodeDecodeError:
            ids = []
        if b"".join(self.tokens[id] for id in ids) == data:
            return ids
        ids = []
        while data:
            n = next(n for n in range(min(self._longest, len(data)), 0, -1) if data[:n] in self._ids)
            ids.append(self._ids[data[:n]])
            data = data[n:]
        return ids


def token_bytes(tokenizer: Vocabulary) -> list[bytes]:
    """The bytes that each token stands for within a text; b"" for control tokens and gaps."""
    n = tokenizer.vocab_size
    if isinstance(tokenizer, Tokenizer):
        return [tokenizer.token_bytes(id) for id in range(n)]
    # At the start of a text some vocabularies write a token otherwise, so each is read after another one.
    alone = ((id, tokenizer.decode([id])) for id in range(n))
    anchor = next((id for id, text in alone if text.strip() and "\ufffd" not in text), None)
    if anchor is None:
        return [b""] * n
    before = tokenizer.decode([anchor])
    tokens = []
    for id in range(n):
        text = tokenizer.decode([anchor, id])[len(before) :]
        # Half a character has no text, but a name that tells its bytes: <0xE4>, or the letters of a byte-level vocabulary.
        tokens.append((_named_bytes(tokenizer.token(id)) if "\ufffd" in text else b"") or text.encode())
    return tokens


def _named_bytes(name: str) -> bytes:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes.fromhex(name[3:5])
    return bytes(BYTE_OF_LETTER[letter] for letter in name) if all(letter in BYTE_OF_LETTER for letter in name) else b""


def _loses_space(grammar: Grammar, before: Sequence[int]) -> bool:
    """Whether a space would be lost that the answer begins with."""
    spaces = np.flatnonzero(grammar.table.spaces)
    if not len(spaces):
        return False
    pieces = grammar.tokenizer.pieces(before)
    return not (pieces.push(int(spaces[0])) + pieces.finish()).startswith(" ")
