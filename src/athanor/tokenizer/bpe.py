"""Byte-level BPE on the `tokenizers` library, with control tokens that text can never produce (law L1).

Byte-level: the 256 byte values are in every vocabulary, so every text has an encoding and decoding gives it back exactly.
Source: Sennrich et al. 2016 (BPE); Radford et al. 2019, section 2.2 (byte level).
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from athanor.core import io
from athanor.core.errors import CheckpointError, TokenizerError
from athanor.tokenizer.template import (
    ASSISTANT,
    BOS,
    CONTROL_TOKENS,
    END,
    END_THINK,
    PAD,
    SYSTEM,
    TEMPLATE,
    THINK,
    USER,
    renders_alike,
    template_hash,
)

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_REMEDY = "use a tokenizer.json that athanor saved"
SMALLEST_VOCABULARY = len(CONTROL_TOKENS) + 256
MASK = "<|mask|>"

# Alternatives, in order: a word with the one sign before it and an English clitic after it; one digit; signs with their
# newlines; blank lines; indentation but its last space, which goes with the word; other space.
# The bound of 256 keeps time linear: with an open one, Oniguruma panics on a run of ten million spaces.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+(?:'(?i:s|t|re|ve|m|ll|d)(?!\p{L}))?"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s{0,256}[\r\n]+"
    r"|\s{1,256}(?!\S)"
    r"|\s+"
)


def _byte_of_letter() -> dict[str, int]:
    """The 256 printable letters that stand for bytes in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if chr(byte) not in table)
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table


BYTE_OF_LETTER = _byte_of_letter()


def noise_tokens(count: int) -> tuple[str, ...]:
    """Names of the control tokens with which text is corrupted for pre-training: a mask and `count` sentinels; () for 0."""
    return (MASK, *(f"<|sentinel_{k}|>" for k in range(count))) if count else ()


class Tokenizer:
    """A byte-level BPE vocabulary of V tokens; ids 0..15 are the control tokens, and those of noise follow where it has them.

    Made by `Tokenizer.train` or `Tokenizer.load`. It never changes afterwards and may be shared by threads.

    Attributes:
        control: id of each control token by its name, `{"<|pad|>": 0, "<|bos|>": 1, ...}`; all ids below its length.
        mask_id, sentinel_ids: of the tokens of noise; None and () in a vocabulary without.
        hash: SHA-256 (hex) of the canonical content of tokenizer.json; equal vocabularies have equal hashes.
    """

    def __init__(self, definition: str) -> None:
        """`definition` is the text of a tokenizer.json. Raises TokenizerError when it is not one of ours."""
        try:
            content = json.loads(definition)
            inner = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"not a tokenizer definition ({error}): {_REMEDY}") from error
        # Text of a user can never become a control token: the library then encodes their names letter by letter.
        inner.encode_special_tokens = True
        names = _control_names(inner)
        _check_definition(content, inner, names)
        self._definition = definition
        self._inner = inner
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        self.hash: str = hashlib.sha256(canonical.encode()).hexdigest()
        self.control: dict[str, int] = {name: i for i, name in enumerate(names)}
        self._bytes = [b""] * len(names)
        self._bytes += [bytes(BYTE_OF_LETTER[letter] for letter in token) for token in _text_tokens(inner, len(names))]
        self.pad_id = self.control[PAD]
        self.bos_id = self.control[BOS]
        self.end_id = self.control[END]
        self.system_id = self.control[SYSTEM]
        self.user_id = self.control[USER]
        self.assistant_id = self.control[ASSISTANT]
        self.think_id = self.control[THINK]
        self.end_think_id = self.control[END_THINK]
        self.mask_id = self.control.get(MASK)
        self.sentinel_ids: tuple[int, ...] = tuple(range(len(CONTROL_TOKENS) + 1, len(names)))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, noise: int = 0) -> Tokenizer:
        """Learn a vocabulary of `vocab_size` tokens from `texts`; the same texts in the same order give the same one.

        It is smaller (see `vocab_size`) when `texts` hold too few pairs that occur twice.

        Args:
            texts: what merges are learned from.
            vocab_size: tokens, control tokens included.
            noise: sentinels that the vocabulary gets, and a mask with them, for objectives that corrupt text; 0 for neither.

        Raises TokenizerError when `vocab_size` is below 272 (16 control tokens and 256 bytes) and what noise adds.
        """
        if noise < 0:
            raise TokenizerError(f"noise ({noise}) must be a number of sentinels: 0 for none, 100 is T5's")
        names = (*CONTROL_TOKENS, *noise_tokens(noise))
        smallest = len(names) + 256
        if vocab_size < smallest:
            raise TokenizerError(
                f"vocab_size ({vocab_size}) must be at least {smallest}: {len(names)} control tokens"
                f" and 256 bytes; use {smallest} or more"
            )
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[AddedToken(name, special=True, normalized=False) for name in names],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(map(checked, texts), trainer)
        return cls(inner.to_str())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Read what `save` wrote.

        Raises CheckpointError naming the file that is missing or malformed, and TokenizerError when the vocabulary is not
        ours or the stored chat template is another than this version's.
        """
        folder = Path(folder)
        path = folder / TOKENIZER_FILE
        config = io.read_json(folder / CONFIG_FILE)
        stored = config.get("chat_template") if isinstance(config, dict) else None
        if not renders_alike(stored):
            other = hashlib.sha256(stored.encode()).hexdigest()[:16] if isinstance(stored, str) else "none"
            raise TokenizerError(
                f"chat template mismatch: {folder / CONFIG_FILE} has template {other}, this version renders"
                f" {template_hash()[:16]}; use the athanor version that wrote the folder, or train again"
            )
        try:
            definition = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read {path} ({error}): point to a folder that Tokenizer.save wrote") from error
        try:
            return cls(definition)
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json into `folder`; transformers' AutoTokenizer reads them too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": END,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "chat_template": TEMPLATE,
        } | ({} if self.mask_id is None else {"mask_token": MASK})
        io.atomic_write(folder / TOKENIZER_FILE, self._definition)
        io.write_json(folder / CONFIG_FILE, config)

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens, control tokens included; ids are 0 <= id < V."""
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, none of a control token: their names written out in the text are encoded as ordinary letters.

        Raises TokenizerError for a lone surrogate, which no UTF-8 can hold.
        """
        ids: list[int] = self._inner.encode(checked(text), add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`[encode(text) for text in texts]`, on all cores unless TOKENIZERS_PARALLELISM=false."""
        encodings = self._inner.encode_batch_fast([checked(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def prompt(self, text: str) -> list[int]:
        """The beginning-of-text token, and the ids of `text`."""
        return [self.bos_id, *self.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without control tokens; bytes that are not UTF-8 become U+FFFD.

        Raises TokenizerError for an id that is not 0 <= id < V.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token(self, id: int) -> str:
        """The text of one token, bytes that are no character as \\xNN; the name of a control token."""
        if 0 <= id < len(self.control):
            return list(self.control)[id]
        return self.token_bytes(id).decode("utf-8", errors="backslashreplace")

    def pieces(self, before: Sequence[int]) -> _Pieces:
        """A decoder of tokens as they come; a byte-level vocabulary needs nothing of what stands before them."""
        return _Pieces(self)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for; b"" for a control token. Raises TokenizerError for an id not in 0 <= id < V."""
        if not 0 <= id < len(self._bytes):
            raise TokenizerError(
                f"token id {id} must be 0 <= id < {len(self._bytes)} (the vocabulary's size):"
                " use the tokenizer that the model was trained with"
            )
        return self._bytes[id]


class _Pieces:
    """Characters out of bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        return self._bytes.decode(self._tokenizer.token_bytes(id))

    def finish(self) -> str:
        return self._bytes.decode(b"", final=True)


def checked(text: str) -> str:
    """`text` as it is. Raises TokenizerError when UTF-8 cannot hold it."""
    try:
        if not text.isascii():  # a flag lookup; only other text pays for the check
            text.encode("utf-8")
        return text
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which is no character:"
            " remove it, or decode the source with errors='replace'"
        ) from error


def _control_names(inner: tokenizers.Tokenizer) -> tuple[str, ...]:
    """The control tokens that a vocabulary with so many added tokens must have."""
    more = len(inner.get_added_tokens_decoder()) - len(CONTROL_TOKENS)
    return (*CONTROL_TOKENS, *noise_tokens(max(more - 1, 1) if more > 0 else 0))


def _text_tokens(inner: tokenizers.Tokenizer, first: int) -> list[str]:
    """The tokens from id `first` on, in letters that stand for bytes; "" is no token and stands for a gap in the ids."""
    return [inner.id_to_token(i) or "" for i in range(first, inner.get_vocab_size())]


def _check_definition(content: dict[str, object], inner: tokenizers.Tokenizer, names: Sequence[str]) -> None:
    """Raise TokenizerError unless this is a byte-level BPE with our control tokens and nothing that adds tokens."""
    for i, name in enumerate(names):
        added = inner.get_added_tokens_decoder().get(i)
        if added is None or added.content != name or not added.special:
            found = inner.id_to_token(i)
            raise TokenizerError(f"id {i} must be the special token {name!r}, found {found!r}: {_REMEDY}")
    if content.get("post_processor") is not None:
        raise TokenizerError(f"post_processor must be null (the chat template places {BOS}), it is set: {_REMEDY}")
    if content.get("normalizer") is not None:
        raise TokenizerError(f"normalizer must be null (encoding keeps text as it is), it is set: {_REMEDY}")
    tokens = set(_text_tokens(inner, len(names)))
    letters = set("".join(tokens))
    if "" in tokens or not BYTE_OF_LETTER.keys() <= tokens or not letters <= BYTE_OF_LETTER.keys():
        raise TokenizerError(f"the vocabulary must be byte-level (all 256 bytes, nothing else): {_REMEDY}")
    for name in names:
        if min(inner.encode(name, add_special_tokens=False).ids) < len(names):
            raise TokenizerError(f"the text {name!r} must not encode as the control token, it does: {_REMEDY}")
