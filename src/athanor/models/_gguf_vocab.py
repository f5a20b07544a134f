"""The vocabulary of a GGUF file, from a tokenizer.json of byte-pair encoding.

llama.cpp has two kinds of it: "gpt2" merges letters that stand for bytes, by a list of merges, within the pieces that one of its
own patterns finds; "llama" merges characters and writes unknown ones as bytes, by a score of each token, as SentencePiece does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athanor.core import io
from athanor.core.errors import CheckpointError

if TYPE_CHECKING:
    import gguf
    import tokenizers

_SPACE = "\u2581"  # SentencePiece's sign for a space
_WITHOUT = "write the file without the tokenizer and give llama.cpp token ids"
# The patterns that llama.cpp has under a name, as tokenizer.json writes them.
_CLITICS, _REST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    _CLITICS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST: "llama-bpe",
    _CLITICS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST: "qwen2",
}


def add(writer: gguf.GGUFWriter, fields: Mapping[str, Any], folder: Path | None, vocab_size: int) -> list[str]:
    """Write the vocabulary of the tokenizer in `folder`; return notes on what llama.cpp does otherwise.

    Ids of the model without a token are filled with unused ones. Raises CheckpointError when there is no tokenizer.json or
    tokenizer_config.json is not JSON, when it is of another kind, and when it has more tokens than the model.
    """
    if folder is None:
        writer.add_tokenizer_model("no_vocab")
        return []
    import gguf

    path = folder / "tokenizer.json"
    inner, content = _read(path)
    model = content["model"]
    ids: dict[str, int] = inner.get_vocab(with_added_tokens=True)
    if max(ids.values(), default=-1) >= vocab_size:
        raise CheckpointError(
            f"{path} has the token id {max(ids.values())} and the model's vocab_size is {vocab_size}: give the tokenizer that the"
            " model was trained with"
        )
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for token, i in ids.items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for added in content.get("added_tokens") or []:
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    steps = list(_steps(content.get("pre_tokenizer")))
    if model["type"] == "BPE" and model.get("byte_fallback"):
        notes = _add_sentencepiece(writer, inner, content, tokens, types)
    elif model["type"] == "BPE" and any(step["type"] == "ByteLevel" for step in steps):
        notes = _add_byte_level(writer, content, steps, path)
    else:
        raise CheckpointError(
            f"{path} is of kind {model['type']}, and GGUF files have byte-level or byte-fallback BPE: {_WITHOUT}"
        )
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    return notes + _add_special(writer, fields, folder, inner)


def _read(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    import tokenizers

    content = io.read_json(path)
    try:
        inner = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} is not a tokenizer ({error}): copy it again, or {_WITHOUT}") from error
    return inner, content


def _steps(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A pre-tokenizer or normalizer as its single steps."""
    if part is None:
        return
    inner = part.get("pretokenizers") or part.get("normalizers")
    if part["type"] != "Sequence":
        yield part
    for step in inner or []:
        yield from _steps(step)


def _add_byte_level(writer: gguf.GGUFWriter, content: dict[str, Any], steps: list[Mapping[str, Any]], path: Path) -> list[str]:
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    if not merges:
        raise CheckpointError(f"{path} has no merges, and llama.cpp refuses such a vocabulary: {_WITHOUT}")
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    others = {step["type"] for step in steps} - {"Split", "ByteLevel"}
    if not patterns and not others and any(step["type"] == "ByteLevel" and step.get("use_regex", True) for step in steps):
        pre, exact = "gpt-2", True
    elif len(patterns) == 1 and patterns[0] in _PATTERNS and not others:
        pre, exact = _PATTERNS[patterns[0]], True
    else:
        pre, exact = ("llama-bpe" if any("{1,3}" in str(pattern) for pattern in patterns) else "qwen2"), False
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_merges(merges)
    notes = []
    if not exact:
        notes.append(
            f"llama.cpp has not this tokenizer's way to split text: {pre!r}, the nearest that it has, gives other tokens for some"
            " texts; the model's own logits need ids from the model's own tokenizer"
        )
    return notes + _normalizer_note(content, frozenset())


def _add_sentencepiece(
    writer: gguf.GGUFWriter, inner: tokenizers.Tokenizer, content: dict[str, Any], tokens: list[str], types: list[gguf.TokenType]
) -> list[str]:
    import gguf

    model = content["model"]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    for i, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and types[i] == gguf.TokenType.NORMAL:
            types[i] = gguf.TokenType.BYTE
        elif token == model.get("unk_token"):
            types[i] = gguf.TokenType.UNKNOWN
            writer.add_unk_token_id(i)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    # The pair with the highest score is merged first: the order of the merges, downwards.
    writer.add_token_scores([-float(ranks.get(token, len(ranks))) for token in tokens])
    writer.add_add_space_prefix(inner.encode("a", add_special_tokens=False).tokens[:1] not in (["a"], []))
    return _normalizer_note(content, frozenset({"Prepend", "Replace"}))


def _normalizer_note(content: dict[str, Any], known: frozenset[str]) -> list[str]:
    others = sorted({step["type"] for step in _steps(content.get("normalizer"))} - known)
    return [f"the tokenizer normalises text ({', '.join(others)}) and llama.cpp does not"] if others else []


def _add_special(writer: gguf.GGUFWriter, fields: Mapping[str, Any], folder: Path, inner: tokenizers.Tokenizer) -> list[str]:
    """Ids with a meaning, what is put around a text, and the chat template."""
    path = folder / "tokenizer_config.json"
    config = io.read_json(path) if path.exists() else {}
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object: copy it again, or {_WITHOUT}")
    notes, ids = [], {}
    for name, write in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        token, number = config.get(f"{name}_token"), fields.get(f"{name}_token_id")
        found = inner.token_to_id(token["content"] if isinstance(token, dict) else token) if token else None
        if found is None and isinstance(number, list) and number:
            found = number[0]
            notes.append(f"{name}_token_id has several ids and a GGUF file one, {found}: llama.cpp may not stop at the others")
        elif found is None:
            found = number
        if found is not None:
            write(found)
            ids[name] = found
    plain, whole = (inner.encode("a", add_special_tokens=special).ids for special in (False, True))
    writer.add_add_bos_token("bos" in ids and whole[: len(whole) - len(plain)][:1] == [ids["bos"]])
    writer.add_add_eos_token("eos" in ids and len(whole) > len(plain) and whole[-1] == ids["eos"])
    template = config.get("chat_template")
    jinja = folder / "chat_template.jinja"
    if template is None and jinja.exists():
        template = jinja.read_text(encoding="utf-8")
    if template:
        writer.add_chat_template(template)
    return notes
