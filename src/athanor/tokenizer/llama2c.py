"""The vocabulary of llama2.c (https://github.com/karpathy/llama2.c, its `tokenizer.bin`) as a Hugging Face tokenizer.json.

It is a byte-pair vocabulary of SentencePiece without its merges: of all neighbours that make a token, those are merged first
whose token has the highest score, the leftmost of equals. Characters it lacks are written as bytes.
"""

from __future__ import annotations

import math
import struct
from itertools import pairwise
from pathlib import Path

from athanor.core.errors import TokenizerError

SPACE = "\u2581"  # SentencePiece's sign for a space
SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2; the file has line breaks around the last two
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # ids 3..258
_FIRST_PIECE = len(SPECIAL) + len(_BYTES)
_LONGEST = 1024  # bytes of a token
_REMEDY = "give the tokenizer.bin that llama2.c's tokenizer.py wrote for this model"


def read(path: Path, vocab_size: int) -> str:
    """The text of a tokenizer.json that gives the ids of llama2.c's own encoder: with its BOS where control tokens are added.

    One difference: U+2581 is a space here, as in SentencePiece, and three bytes there.

    Args:
        path: of a file with an int32 (the longest token), then per token a float32 score, an int32 length and its bytes.
        vocab_size: of the model; the file does not say how many tokens it has.

    Raises:
        TokenizerError: no such file; one that ends too early or too late; bytes not at ids 3..258; a token that is not UTF-8,
            occurs twice, or is longer than 1024 bytes; two merged tokens with the same score, whose order no tokenizer.json
            can express; a score that is not finite.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    scores = _read_pieces(path, vocab_size)
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *_BYTES, *scores])}
    if len(vocabulary) != vocab_size:
        raise TokenizerError(f"{path}: a token has the name of a control or byte token: {_REMEDY}")
    model = models.BPE(vocabulary, _merges(scores, path), unk_token=SPECIAL[0], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    bos = SPECIAL[1]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, SPECIAL.index(bos))])
    text: str = tokenizer.to_str()
    return text


def _read_pieces(path: Path, vocab_size: int) -> dict[str, float]:
    """Score of each token after the control and byte tokens, in the order of their ids."""
    try:
        size = path.stat().st_size
        if size > 4 + (8 + _LONGEST) * vocab_size:
            raise TokenizerError(f"{path} has {size} bytes, too many for a vocabulary of {vocab_size} tokens: {_REMEDY}")
        raw = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read ({error.strerror}): check the path") from error
    scores: dict[str, float] = {}
    position = 4
    for i in range(vocab_size):
        score, length = struct.unpack_from("<fi", raw, position) if position + 8 <= len(raw) else (0.0, 0)
        position += 8 + length
        if not 0 < length <= _LONGEST or position > len(raw):
            raise TokenizerError(
                f"{path}: token {i} of {vocab_size} has the length {length} (allowed: 1 to {_LONGEST}), or the file's"
                f" {len(raw)} bytes end before it does: {_REMEDY}"
            )
        try:
            piece = raw[position - length : position].decode("utf-8").replace(" ", SPACE)
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path}: token {i} is not UTF-8 ({error}): {_REMEDY}") from error
        if len(SPECIAL) <= i < _FIRST_PIECE and piece != _BYTES[i - len(SPECIAL)]:
            raise TokenizerError(f"{path}: token {i} must be {_BYTES[i - len(SPECIAL)]} and is {piece!r}: {_REMEDY}")
        if not math.isfinite(score):
            raise TokenizerError(f"{path}: token {i} ({piece!r}) has the score {score}: {_REMEDY}")
        if piece in scores:
            raise TokenizerError(f"{path}: token {i} ({piece!r}) occurs twice: {_REMEDY}")
        if i >= _FIRST_PIECE:
            scores[piece] = score
    if position != len(raw) or vocab_size < _FIRST_PIECE:
        raise TokenizerError(
            f"{path} goes on for {len(raw) - position} bytes after {vocab_size} tokens, and a vocabulary has at least"
            f" {_FIRST_PIECE}: {_REMEDY}"
        )
    return scores


def _merges(scores: dict[str, float], path: Path) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, in the order in which they are merged."""
    made: list[tuple[float, str, list[int]]] = []
    for whole, score in scores.items():
        cuts = [i for i in range(1, len(whole)) if whole[:i] in scores and whole[i:] in scores]
        if cuts:
            made.append((score, whole, cuts))
    made.sort(key=lambda entry: -entry[0])
    for (score, first, _), (other, second, _) in pairwise(made):
        if score == other:
            raise TokenizerError(f"{path}: the tokens {first!r} and {second!r} have the same score {score}: {_REMEDY}")
    merges = []
    for _, whole, cuts in made:
        # The leftmost of equals, where two cuts of one token share their middle in x y z with xy = yz: x|y goes before y|z.
        cuts.sort(key=lambda i: (whole[i:] != whole[: len(whole) - i], -i))
        merges += [(whole[:i], whole[i:]) for i in cuts]
    return merges
