"""The tokenizer.json made of a llama2.c vocabulary, against llama2.c's own way of encoding, written anew here."""

import contextlib
import struct
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from athanor.core.errors import TokenizerError
from athanor.tokenizer import llama2c

HEAD = [(0.0, b"<unk>"), (0.0, b"\n<s>\n"), (0.0, b"\n</s>\n"), *((0.0, b"<0x%02X>" % byte) for byte in range(256))]
TEXT = "the heat of the athanor and the hat, abababa aaa aaaa\n  the thin tin, a  cat   ate the tea\n你好你好 naïve naïve"


def learn(text, count):
    """Pieces of a byte-pair vocabulary learned from `text`: merges scored 0, -1, ..., then its characters, as SentencePiece."""
    words = [[*(" " + line)] for line in text.split("\n")]
    merged = []
    while len(merged) < count:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        whole = "".join(best)
        if whole not in merged:
            merged.append(whole)
        words = [join(word, best) for word in words]
    characters = sorted({character for character in " " + text} - {"\n"})
    return [(-float(i), piece.encode()) for i, piece in enumerate([*merged, *characters])]


def join(word, pair):
    out = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def write(path, tokens):
    body = b"".join(struct.pack("<fi", score, len(piece)) + piece for score, piece in tokens)
    path.write_bytes(struct.pack("<i", max(len(piece) for _, piece in tokens)) + body)
    return path


def parse(path):
    """(score, bytes) of each token."""
    raw, position, tokens = path.read_bytes(), 4, []
    while position < len(raw):
        score, length = struct.unpack_from("<fi", raw, position)
        position += 8 + length
        tokens.append((score, raw[position - length : position]))
    return tokens


def encode_as_llama2c(tokens, text):
    """A space in front, characters or their bytes, then always the best neighbours, the leftmost of equals."""
    ids = {piece: i for i, (_, piece) in enumerate(tokens)}
    out = []
    for character in " " + text if text else "":
        raw = character.encode()
        out += [ids[raw]] if raw in ids else [byte + 3 for byte in raw]
    while True:
        found = [ids.get(tokens[a][1] + tokens[b][1]) for a, b in pairwise(out)]
        scored = [(-tokens[whole][0], i) for i, whole in enumerate(found) if whole is not None]
        if not scored:
            return out
        _, i = min(scored)
        out[i : i + 2] = [found[i]]


def reader(path, size):
    tokenizer = Tokenizer.from_str(llama2c.read(path, size))
    tokenizer.encode_special_tokens = True  # the text <s> is text, as in llama2.c
    return tokenizer


def check(tokenizer, tokens, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == encode_as_llama2c(tokens, text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([1, *ids]) == text


# U+2581 is a space here; lone surrogates are no text.
any_text = st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]))
near_text = st.text(st.sampled_from("the anof,ibc\n好你ï<s>0xA/")) | st.lists(st.sampled_from(TEXT.split(" "))).map(" ".join)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    tokens = [*HEAD, *learn(TEXT, 60)]
    path = write(tmp_path_factory.mktemp("vocabulary") / "tokenizer.bin", tokens)
    return reader(path, len(tokens)), tokens


@given(any_text | near_text)
def test_the_ids_and_the_text_are_llama2cs(learned, text):
    check(*learned, text)


@given(st.lists(st.text("ab ", min_size=1), min_size=1).map("\n".join), st.text("ab "), st.integers(1, 30))
def test_any_learned_vocabulary_gives_llama2cs_ids(tmp_path_factory, corpus, text, count):
    tokens = [*HEAD, *learn(corpus, count)]
    if len(tokens) == len(HEAD):
        return
    path = write(tmp_path_factory.mktemp("vocabulary") / "tokenizer.bin", tokens)
    check(reader(path, len(tokens)), tokens, text)


@pytest.mark.shared
@given(text=any_text | near_text | st.text("abcdefghiklmnoprstuwy .,\"'\nTLS"))
def test_the_vocabulary_of_stories260k(story, text):
    check(*story, text)


@pytest.fixture(scope="module")
def story():
    path = Path(__file__).resolve().parents[3] / "shared/data/weights/stories260K/tok512.bin"
    return reader(path, 512), parse(path)


@pytest.mark.parametrize(
    "text", ["", " ", "  ", "the heat", "\n", "<s>", "</s> <unk>", "<0x41>", "\0", "�", "🔥 heat 你好", "aaaaa aaa", "x" * 3000]
)
def test_corners(learned, text):
    check(*learned, text)


def test_overlapping_occurrences_go_to_the_left_one(tmp_path):
    # ab|a|ba: both neighbours of the middle make aba.
    tokens = [*HEAD, (0.0, b"ab"), (-1.0, b"ba"), (-2.0, b"aba"), (-3.0, b" "), (-4.0, b"a"), (-5.0, b"b")]
    tokenizer = reader(write(tmp_path / "tokenizer.bin", tokens), len(tokens))
    for text in ("ababa", "abaaba", "ababba", "baaba", "abababa"):
        check(tokenizer, tokens, text)


def test_the_signs_of_sentencepiece_are_spaces(learned):
    tokenizer, _ = learned
    assert (
        tokenizer.encode("the▁heat", add_special_tokens=False).ids == tokenizer.encode("the heat", add_special_tokens=False).ids
    )


def test_control_tokens_are_special_and_no_text_gives_them(learned):
    tokenizer, _ = learned
    assert [tokenizer.id_to_token(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert tokenizer.decode([1, *tokenizer.encode("heat", add_special_tokens=False).ids, 2]) == "heat"
    assert min(tokenizer.encode("<s>heat</s>\n<s>\n", add_special_tokens=False).ids) > 2
    assert tokenizer.encode("heat").ids == [1, *tokenizer.encode("heat", add_special_tokens=False).ids]
    assert tokenizer.encode("").ids == [1]


FULL = [*HEAD, (-0.0, b"ab"), (-1.0, b"a"), (-2.0, b"b")]


def _with(i, score, piece):
    return [*FULL[:i], (score, piece), *FULL[i + 1 :]]


@pytest.mark.parametrize(
    ("tokens", "size", "message"),
    [
        (FULL, 261, "goes on for 9 bytes after 261 tokens, and a vocabulary has at least 259"),
        (FULL[:100], 100, "goes on for 0 bytes after 100 tokens, and a vocabulary has at least 259"),
        (FULL, 263, r"token 262 of 263 has the length 0 \(allowed: 1 to 1024\), or the file's \d+ bytes end before it"),
        (FULL, 1, r"has \d+ bytes, too many for a vocabulary of 1 tokens"),
        (_with(260, 0.0, b""), 262, "token 260 of 262 has the length 0"),
        (_with(260, 0.0, b"x" * 1025), 262, "token 260 of 262 has the length 1025"),
        (_with(260, 0.0, b"\xff"), 262, "token 260 is not UTF-8"),
        (_with(20, 0.0, b"<0x12>"), 262, "token 20 must be <0x11> and is '<0x12>'"),
        (_with(261, -2.0, b"a"), 262, r"token 261 \('a'\) occurs twice"),
        (_with(261, float("nan"), b"b"), 262, r"token 261 \('b'\) has the score nan"),
        (_with(261, -2.0, b"</s>"), 262, "a token has the name of a control or byte token"),
        (_with(261, -2.0, b"<0x41>"), 262, "a token has the name of a control or byte token"),
        ([*_with(259, -9.0, b"ab"), (-9.0, b"ba")], 263, "the tokens 'ab' and 'ba' have the same score -9.0"),
    ],
)
def test_what_no_llama2c_wrote_is_refused(tmp_path, tokens, size, message):
    with pytest.raises(TokenizerError, match=message + ".*: give the tokenizer.bin that"):
        llama2c.read(write(tmp_path / "tokenizer.bin", tokens), size)


@given(st.integers(0, 2000), st.binary(min_size=1, max_size=8))
def test_damage_raises_nothing_else(tmp_path_factory, at, noise):
    path = write(tmp_path_factory.mktemp("damaged") / "tokenizer.bin", FULL)
    raw = path.read_bytes()
    path.write_bytes(raw[:at] + noise + raw[at + len(noise) :] if at % 2 else raw[:at])
    with contextlib.suppress(TokenizerError):
        Tokenizer.from_str(llama2c.read(path, len(FULL)))


def test_no_file(tmp_path):
    with pytest.raises(TokenizerError, match=r"absent.bin cannot be read \(No such file or directory\): check the path"):
        llama2c.read(tmp_path / "absent.bin", 300)
