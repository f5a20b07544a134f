"""What objectives that corrupt text must know of a vocabulary. Legend: V tokens."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tokenizers
import torch
from torch import Tensor

from athanor.tokenizer.bpe import BYTE_OF_LETTER, CONFIG_FILE, Tokenizer
from athanor.tokenizer.foreign import ForeignTokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_STOPS = (".", "!", "?", "。", "！", "？", "\n")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Ids of a vocabulary; None where it has no such token.

    size           V
    special        control tokens: never corrupted, and never what a token is replaced by at random
    word_starts    (V,) bool: tokens that do not go on with the word before them
    sentence_ends  (V,) bool: tokens that end with a full stop, its like or a newline
    bos, eos, pad  begin and end a text; fill rows
    mask           stands for what was taken out
    cls, sep       what an encoder reads before a text, and after it
    sentinels      stand for spans, each for another
    start          what an encoder-decoder's answers begin with; None for models of other kinds
    """

    size: int
    special: frozenset[int]
    word_starts: Tensor
    sentence_ends: Tensor
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    mask: int | None = None
    cls: int | None = None
    sep: int | None = None
    sentinels: tuple[int, ...] = ()
    start: int | None = None

    @cached_property
    def is_special(self) -> Tensor:
        """(V,) bool."""
        found = torch.zeros(self.size, dtype=torch.bool)
        found[list(self.special)] = True
        return found

    @cached_property
    def ordinary(self) -> Tensor:
        """Ids that are not special, in order."""
        return (~self.is_special).nonzero().squeeze(1)

    @classmethod
    def of(cls, tokenizer: Tokenizer | ForeignTokenizer) -> Vocabulary:
        """That of a tokenizer. Ours has its beginning and end of text in place of [CLS] and [SEP]."""
        if isinstance(tokenizer, Tokenizer):
            pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
            return cls(
                size=tokenizer.vocab_size,
                special=frozenset(tokenizer.control.values()),
                word_starts=torch.tensor([_begins_word(piece) for piece in pieces]),
                sentence_ends=_sentence_ends(pieces),
                bos=tokenizer.bos_id,
                eos=tokenizer.end_id,
                pad=tokenizer.pad_id,
                mask=tokenizer.mask_id,
                cls=tokenizer.bos_id,
                sep=tokenizer.end_id,
                sentinels=tokenizer.sentinel_ids,
            )
        return _of_foreign(tokenizer)


def _of_foreign(tokenizer: ForeignTokenizer) -> Vocabulary:
    inner: tokenizers.Tokenizer = tokenizer._inner
    config: Mapping[str, Any] = json.loads(tokenizer._files.get(CONFIG_FILE, b"{}"))

    def named(field: str, usual: str) -> int | None:
        value = config.get(field, usual)
        text = value.get("content") if isinstance(value, dict) else value
        found: int | None = inner.token_to_id(text) if isinstance(text, str) else None
        return found

    cls, sep = named("cls_token", "[CLS]"), named("sep_token", "[SEP]")
    pad, mask = named("pad_token", "[PAD]"), named("mask_token", "[MASK]")
    bos, eos = tokenizer.bos_id, tokenizer.end_id
    sentinels = tuple[int, ...]()
    while (sentinel := inner.token_to_id(f"<extra_id_{len(sentinels)}>")) is not None:
        sentinels += (sentinel,)
    added = {id for id, token in inner.get_added_tokens_decoder().items() if token.special}
    named_ids = {id for id in (bos, eos, pad, mask, cls, sep) if id is not None}
    texts = [inner.id_to_token(i) or "" for i in range(tokenizer.vocab_size)]
    if isinstance(inner.model, tokenizers.models.WordPiece):
        goes_on = inner.model.continuing_subword_prefix
        pieces = [text.removeprefix(goes_on).encode() for text in texts]
        starts = [not text.startswith(goes_on) for text in texts]
    else:
        pieces = _pieces(texts)
        starts = [_begins_word(piece) for piece in pieces]
    return Vocabulary(
        size=tokenizer.vocab_size,
        special=frozenset(added | named_ids | set(sentinels)),
        word_starts=torch.tensor(starts),
        sentence_ends=_sentence_ends(pieces),
        bos=bos,
        eos=sep if eos is None else eos,
        pad=pad,
        mask=mask,
        cls=bos if cls is None else cls,
        sep=eos if sep is None else sep,
        sentinels=sentinels,
    )


def _pieces(texts: list[str]) -> list[bytes]:
    """Tokens as bytes: of a byte-level vocabulary, or of one that writes spaces as U+2581 and bytes as <0x0A>."""
    if BYTE_OF_LETTER.keys() <= set(texts):
        return [bytes(BYTE_OF_LETTER[x] for x in text) if BYTE_OF_LETTER.keys() >= set(text) else text.encode() for text in texts]
    return [
        bytes([int(byte[1], 16)]) if (byte := _BYTE.fullmatch(text)) else text.replace("\u2581", " ").encode() for text in texts
    ]


def _begins_word(piece: bytes) -> bool:
    """Whether a token does not go on with a word.

    It does when it begins within a character, or with a letter of a script that writes words apart. In scripts that do not
    (Chinese, Japanese) each character is a word.
    """
    if piece and 0x80 <= piece[0] < 0xC0:
        return False
    text = piece.decode("utf-8", errors="ignore")
    if not text:  # the first bytes of a character: from 0xE3 on they are of wide ones
        return not piece or piece[0] >= 0xE3
    letter = text[0].isalpha() or unicodedata.category(text[0]).startswith("M")
    return not letter or unicodedata.east_asian_width(text[0]) in "WF"


def _sentence_ends(pieces: Iterable[bytes]) -> Tensor:
    return torch.tensor([piece.decode("utf-8", errors="ignore").rstrip(" ").endswith(_STOPS) for piece in pieces])
