"""Tokenizers of other people's models: tokenizer.json of any kind, and BERT's vocab.txt, computed by the library `tokenizers`.

Their control tokens are their own, and so is what they put around a text. What they have no part in is our chat template.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from athanor.core import io
from athanor.core.errors import TokenizerError
from athanor.tokenizer.bpe import CONFIG_FILE, TOKENIZER_FILE, checked
from athanor.tokenizer.template import CONTROL_TOKENS

WORD_PIECES = "vocab.txt"
# Files that describe the same vocabulary for other programs; they are kept.
_KEPT = (
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model"),
    *("spiece.model", "sentencepiece.bpe.model"),
)
_SPACE = "\u2581"  # SentencePiece's sign for one
_WINDOW = 8  # tokens: no character has more bytes
_REMEDY = "copy it again, or save it anew with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...))"


def is_ours(folder: Path) -> bool:
    """Whether the folder's tokenizer.json has our control tokens, or something in their place that names itself so."""
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return False
    content = io.read_json(path)
    added = content.get("added_tokens") if isinstance(content, dict) else None
    names = {t.get("content") for t in added if isinstance(t, dict)} if isinstance(added, list) else set()
    return names >= set(CONTROL_TOKENS)


def present(folder: Path) -> bool:
    """Whether the folder has a tokenizer that this file reads."""
    return (folder / TOKENIZER_FILE).is_file() or (folder / WORD_PIECES).is_file()


class ForeignTokenizer:
    """A vocabulary that another program made.

    Attributes:
        hash: SHA-256 (hex) of the canonical content of tokenizer.json (of vocab.txt where there is none).
        bos_id, end_id: of the tokens that tokenizer_config.json calls bos and eos, or None.
    """

    think_id: int | None = None
    end_think_id: int | None = None

    def __init__(self, files: dict[str, bytes], where: str = "the tokenizer") -> None:
        """`files` by name, as `load` reads them. Raises TokenizerError when they define no tokenizer."""
        self._files = files
        config = _table(files.get(CONFIG_FILE, b"{}"), f"{where}/{CONFIG_FILE}")
        try:
            if TOKENIZER_FILE in files:
                definition = files[TOKENIZER_FILE].decode("utf-8")
                self._inner = tokenizers.Tokenizer.from_str(definition)
                canonical = json.dumps(json.loads(definition), sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()
            else:
                canonical = files[WORD_PIECES]
                self._inner = _word_pieces(canonical.decode("utf-8"), config)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{where} defines no tokenizer ({error}): {_REMEDY}") from error
        # What the files say of rows in a batch would cut texts without a word.
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True
        unknown = self._inner.token_to_id(getattr(self._inner.model, "unk_token", None) or "<unk>")
        special = {id for id, token in self._inner.get_added_tokens_decoder().items() if token.special}
        self._control = frozenset(special - {unknown})
        self.hash: str = hashlib.sha256(canonical).hexdigest()
        self.bos_id = self._named(config, "bos_token")
        self.end_id = self._named(config, "eos_token")
        self.mask_id = self._named(config, "mask_token")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ForeignTokenizer:
        """Read tokenizer.json or vocab.txt, and tokenizer_config.json where it is there. Raises TokenizerError."""
        folder = Path(folder)
        if not present(folder):
            others = [name for name in _KEPT if (folder / name).is_file()]
            found = f"it has {', '.join(others)}" if others else "it has none"
            raise TokenizerError(
                f"{folder} has neither {TOKENIZER_FILE} nor {WORD_PIECES} ({found}): add the {TOKENIZER_FILE} that transformers"
                " makes of it (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
            )
        names = (TOKENIZER_FILE, WORD_PIECES, CONFIG_FILE, *_KEPT)
        return cls({name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}, str(folder))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files as they were read; those of word pieces gain a tokenizer.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            io.atomic_write(folder / name, content)

    def _named(self, config: dict[str, Any], name: str) -> int | None:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        return self._inner.token_to_id(text) if isinstance(text, str) else None

    @property
    def vocab_size(self) -> int:
        """One more than the greatest id."""
        return max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone; names of control tokens in it are letters (law L1). Raises TokenizerError for lone surrogates."""
        return self._as_text(self._inner.encode(checked(text), add_special_tokens=False))[0]

    def prompt(self, text: str, pair: str | None = None, *, control: bool = False) -> list[int]:
        """Ids as the model reads them: with what the files put around a text (BOS, [CLS] ... [SEP], an end), or its BOS alone.

        Args:
            text: any.
            pair: a second text, for models of pairs.
            control: whether names of control tokens in the texts ("[MASK]") are those tokens.
        """
        ids, _ = self.segments(text, pair, control=control)
        return ids or ([] if self.bos_id is None else [self.bos_id])

    def segments(self, text: str, pair: str | None = None, *, control: bool = False) -> tuple[list[int], list[int]]:
        """Ids as `prompt` gives them, and for each which text it belongs to (BERT's token types)."""
        self._inner.encode_special_tokens = not control
        try:
            encoding = self._inner.encode(checked(text), None if pair is None else checked(pair))
        finally:
            self._inner.encode_special_tokens = True
        return (encoding.ids, encoding.type_ids) if control else self._as_text(encoding)

    def _as_text(self, encoding: tokenizers.Encoding) -> tuple[list[int], list[int]]:
        """Ids and segments in which no text is a control token.

        Vocabularies of pieces with scores hold their control tokens among the pieces, so the name of one in a text would be
        that token: it becomes its letters.
        """
        if self._control.isdisjoint(encoding.ids):
            return encoding.ids, encoding.type_ids
        ids, segments = list[int](), list[int]()
        for id, segment, placed in zip(encoding.ids, encoding.type_ids, encoding.special_tokens_mask, strict=True):
            letters = [id]
            if id in self._control and not placed:
                letters = [
                    token.id for letter in self._inner.id_to_token(id) or "" for token in self._inner.model.tokenize(letter)
                ]
            ids += letters
            segments += [segment] * len(letters)
        return ids, segments

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without control tokens. Ids beyond the vocabulary, which padded models can give, have none."""
        text: str = self._inner.decode([id for id in ids if self._inner.id_to_token(id) is not None], skip_special_tokens=True)
        return text

    def token(self, id: int) -> str:
        """The text of one token within a text, or its name where it has none of its own."""
        text: str = self._inner.decode([id], skip_special_tokens=False)
        name = self._inner.id_to_token(id) or f"<{id}>"
        within = name.replace(_SPACE, " ")
        if within == " " + text:  # at the start of a text, where decoding has it, the space is left out
            return within
        return text if text and "\ufffd" not in text else name

    def pieces(self, before: Sequence[int]) -> _Pieces:
        """A decoder of what comes after `before`: only there it is known whether a text begins, where a space is left out."""
        return _Pieces(self, before)


class _Pieces:
    """Text by difference: what a new token adds to the text of the few before it, once that does not end within a character.

    A vocabulary may write a token otherwise at the start of a text than within it, so single tokens cannot be decoded. The
    library's own stream raises where bytes that are no UTF-8 come in.
    """

    def __init__(self, tokenizer: ForeignTokenizer, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        n = _WINDOW
        while "\ufffd" in tokenizer.decode(before[-n:]) and n < len(before):  # a cut within a character spoils all bytes after it
            n *= 2
        self._known = list(before[-n:])
        self._new: list[int] = []

    def push(self, id: int) -> str:
        self._new.append(id)
        text = self._added()
        if text.endswith("\ufffd") and len(self._new) < _WINDOW:
            return ""
        if text:
            self._known, self._new = self._new, []
        return text

    def finish(self) -> str:
        text = self._added()
        self._known, self._new = self._new or self._known, []
        return text

    def _added(self) -> str:
        return self._tokenizer.decode([*self._known, *self._new])[len(self._tokenizer.decode(self._known)) :]


def _table(data: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except ValueError as error:
        raise TokenizerError(f"{where} is not JSON ({error}): {_REMEDY}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{where} must hold a table, and holds {type(content).__name__}: {_REMEDY}")
    return content


def _word_pieces(text: str, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """BERT's way: one piece a line; lower case and without accents unless tokenizer_config.json says otherwise."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    pieces = {line.rstrip("\r"): i for i, line in enumerate(text.removesuffix("\n").split("\n"))}
    missing = [name for name in ("[UNK]", "[CLS]", "[SEP]") if name not in pieces]
    if missing:
        raise TokenizerError(f"{WORD_PIECES} lacks {', '.join(missing)}, which every vocabulary of word pieces has")
    inner = tokenizers.Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, pieces[name]) for name in ("[CLS]", "[SEP]")],
    )
    inner.decoder = decoders.WordPiece()
    inner.add_special_tokens([name for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if name in pieces])
    return inner
