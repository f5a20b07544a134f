"""The vocabulary: no text is unencodable, none becomes a control token, nothing is lost, the same texts give the same one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from athanor.core.errors import CheckpointError, TokenizerError
from athanor.tokenizer.bpe import CONFIG_FILE, PATTERN, SMALLEST_VOCABULARY, TOKENIZER_FILE, Tokenizer, noise_tokens
from athanor.tokenizer.chat import render, split
from athanor.tokenizer.template import CONTROL_TOKENS
from athanor.types import Message

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
FRAGMENTS = st.lists(
    st.sampled_from(
        [
            *CONTROL_TOKENS,
            *(name[:k] for name in CONTROL_TOKENS for k in (1, 2, 5, -1)),
            *(name[2:] for name in CONTROL_TOKENS),
            *("<", ">", "|", "/", " ", "\n", "a", "你", "🎉", "\0"),
        ]
    ),
    max_size=12,
).map("".join)
SAMPLES = [
    *("", " ", "\n", "\r\n", "\t\tx", "  leading and trailing  ", "\n\ninner\n\n\nlines\n", "1234567890 3.14 -5"),
    *(
        "def f(x):\n    if x:\n        return 'it''s'\n",
        "你好，世界",
        "🎉👩‍👩‍👧",
        "é e\u0301 ﷽",
        "\0\x01\x7f\ufeff",
        "\U0010ffff",
        "it's we'll DON'T",
    ),
]


@pytest.mark.parametrize("text", SAMPLES)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=TEXTS)
def test_decoding_gives_any_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.encode_batch([text, "x", text]) == [ids, tokenizer.encode("x"), ids]


def test_every_byte_is_a_token(tokenizer: Tokenizer) -> None:
    single = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1}
    assert single == {bytes([byte]) for byte in range(256)}


@given(text=FRAGMENTS | TEXTS)
def test_text_never_becomes_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    for ids in (tokenizer.encode(text), *tokenizer.encode_batch([text, "<|end|>" + text])):
        assert all(len(CONTROL_TOKENS) <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_library_alone_would_make_control_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / TOKENIZER_FILE))
    text = "".join(CONTROL_TOKENS)
    assert plain.encode(text, add_special_tokens=False).ids == list(range(16))
    assert min(tokenizer.encode(text)) >= 16
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(data=st.data())
def test_decodes_as_the_library_does(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    reference = tokenizers.Tokenizer.from_str(tokenizer._definition)
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_control_tokens_have_fixed_ids_and_no_text(tokenizer: Tokenizer) -> None:
    names = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<think>", "</think>", "<|tool|>"]
    assert list(tokenizer.control) == [*names, *(f"<|reserved_{i}|>" for i in range(7))]
    assert list(tokenizer.control.values()) == list(range(16))
    ids = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.end_id, tokenizer.system_id, tokenizer.user_id, tokenizer.assistant_id)
    assert (*ids, tokenizer.think_id, tokenizer.end_think_id) == (0, 1, 2, 3, 4, 5, 6, 7)
    assert tokenizer.decode(range(16)) == ""


def test_half_a_character_decodes_to_the_replacement_character(tokenizer: Tokenizer) -> None:
    byte = next(i for i in range(16, tokenizer.vocab_size) if tokenizer.token_bytes(i) == "你".encode()[:1])
    assert tokenizer.decode([byte, *tokenizer.encode("x")]) == "\ufffdx"


def test_digits_stand_alone_and_indentation_stands_apart(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.token_bytes(i) for i in range(16, tokenizer.vocab_size)]
    assert not [piece for piece in pieces if re.search(rb"[0-9]", piece) and len(piece) > 1]
    assert b"       " in pieces  # seven of eight spaces; the eighth goes with the word
    assert not [piece for piece in pieces if re.search(rb"\n[ \t]*[a-z]", piece)]


@pytest.mark.parametrize("unit", [" ", "\n ", "a", "!", "你", "\r\n"])
def test_long_runs_are_encoded(tokenizer: Tokenizer, unit: str) -> None:
    text = unit * 100_000 + "x"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_space_is_matched_without_backtracking_over_all_of_it() -> None:
    # With an open bound in the pattern the regular-expression library panics here: more than ten million steps back.
    cut_out = tokenizers.normalizers.Replace(tokenizers.Regex(PATTERN), "")
    assert cut_out.normalize_str(" " * 10_100_000) == ""


_TRAIN = "import sys; from athanor.tokenizer.bpe import Tokenizer; print(Tokenizer.train(sys.stdin.read().split('@@'), 700).hash)"


def test_training_is_deterministic_across_processes() -> None:
    words = " ".join(f"{a}{b}{a}" for a in ("ab", "ba", "cd", "dc", "你好") for b in ("xy", "yx", "zz"))
    texts = [words * 3, words[::-1] * 3, words.upper()]
    here = Tokenizer.train(texts, 700)
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", _TRAIN],
            input="@@".join(texts),
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=True,
        )
        assert run.stdout.strip() == here.hash
    assert Tokenizer.train(texts[:2], 700).hash != here.hash


def test_vocabulary_is_smaller_when_the_text_has_no_more_pairs() -> None:
    assert Tokenizer.train([], SMALLEST_VOCABULARY).vocab_size == SMALLEST_VOCABULARY == 272
    assert Tokenizer.train(["abab"], 1000).vocab_size == 273


def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a")
    loaded = Tokenizer.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    assert loaded.hash == tokenizer.hash
    assert loaded.vocab_size == tokenizer.vocab_size == 600
    text = "<|end|> def f(): 你好"
    assert loaded.encode(text) == tokenizer.encode(text)
    for name in (TOKENIZER_FILE, CONFIG_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_hash_is_of_the_content_not_of_its_layout(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    path = tmp_path / TOKENIZER_FILE
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")), ensure_ascii=True), encoding="utf-8")
    assert Tokenizer.load(tmp_path).hash == tokenizer.hash


@pytest.mark.parametrize("size", [271, 0, -1])
def test_too_small_a_vocabulary_is_refused(size: int) -> None:
    with pytest.raises(
        TokenizerError, match=rf"vocab_size \({size}\) must be at least 272: 16 control tokens and 256 bytes; use 272"
    ):
        Tokenizer.train(["x"], size)


def test_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    message = r"lone surrogate U\+D83D at character 2.*: remove it"
    with pytest.raises(TokenizerError, match=message):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(TokenizerError, match=message):
        tokenizer.encode_batch(["fine", "ab\ud83d"])
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.train(["fine", "ab\ud83d"], 300)


@pytest.mark.parametrize("token", [-1, 600])
def test_id_out_of_range_is_refused(tokenizer: Tokenizer, token: int) -> None:
    with pytest.raises(TokenizerError, match=rf"token id {token} must be 0 <= id < 600 .* use the tokenizer"):
        tokenizer.decode([20, token])


def test_missing_files_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / CONFIG_FILE))):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / TOKENIZER_FILE).unlink()
    with pytest.raises(CheckpointError, match=rf"cannot read {re.escape(str(tmp_path / TOKENIZER_FILE))} .*: point to a folder"):
        Tokenizer.load(tmp_path)
    (tmp_path / TOKENIZER_FILE).write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="cannot read"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": "1.0"}'])
def test_broken_definition_is_named(tokenizer: Tokenizer, tmp_path: Path, content: str) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / TOKENIZER_FILE).write_text(content)
    with pytest.raises(
        TokenizerError, match=rf"{re.escape(TOKENIZER_FILE)}: not a tokenizer definition .*: use a tokenizer.json"
    ):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("config", [{"chat_template": "{{ messages }}"}, {"chat_template": None}, {}, [], "x"])
def test_another_template_is_refused(tokenizer: Tokenizer, tmp_path: Path, config: Any) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(
        TokenizerError, match=r"chat template mismatch: .*tokenizer_config.json has template \w+, this version renders"
    ):
        Tokenizer.load(tmp_path)


def _definition(tokenizer: Tokenizer) -> Any:
    return json.loads(tokenizer._definition)


def test_foreign_definitions_are_refused(tokenizer: Tokenizer) -> None:
    content = _definition(tokenizer)
    content["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    with pytest.raises(TokenizerError, match=r"post_processor must be null .* use a tokenizer.json that athanor saved"):
        Tokenizer(json.dumps(content))

    content = _definition(tokenizer)
    content["normalizer"] = {"type": "Lowercase"}
    with pytest.raises(TokenizerError, match="normalizer must be null"):
        Tokenizer(json.dumps(content))

    content = _definition(tokenizer)
    content["added_tokens"][6]["special"] = False
    with pytest.raises(TokenizerError, match="id 6 must be the special token '<think>', found '<think>'"):
        Tokenizer(json.dumps(content))

    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(TokenizerError, match=r"id 0 must be the special token '<\|pad\|>', found 'a'"):
        Tokenizer(plain.to_str())


def test_vocabulary_that_is_not_byte_level_is_refused(tokenizer: Tokenizer) -> None:
    content = _definition(tokenizer)
    vocabulary = content["model"]["vocab"]
    vocabulary["a b"] = len(vocabulary)
    with pytest.raises(TokenizerError, match=r"vocabulary must be byte-level \(all 256 bytes, nothing else\)"):
        Tokenizer(json.dumps(content))


def test_merges_that_spell_a_control_token_are_refused(tokenizer: Tokenizer) -> None:
    content = _definition(tokenizer)
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    merges.clear()
    done = "<"
    for letter in "think>":
        merges.append([done, letter])
        done += letter
        vocabulary.setdefault(done, len(vocabulary))
    with pytest.raises(TokenizerError, match="the text '<think>' must not encode as the control token, it does"):
        Tokenizer(json.dumps(content))


@pytest.fixture(scope="module")
def noisy() -> Tokenizer:
    """A vocabulary with a mask and three sentinels, trained on their names too."""
    names = "".join(noise_tokens(3))
    return Tokenizer.train(["the heat of the athanor, the athanor's heat " * 5, names * 50], 400, noise=3)


NOISE = ["<|mask|>", "<|sentinel_0|>", "<|sentinel_1|>", "<|sentinel_2|>"]


def test_tokens_of_noise_follow_the_control_tokens(noisy: Tokenizer) -> None:
    assert list(noisy.control.items()) == [(name, i) for i, name in enumerate([*CONTROL_TOKENS, *NOISE])]
    assert (noisy.mask_id, noisy.sentinel_ids) == (16, (17, 18, 19))
    assert noisy.decode(range(20)) == "" and [noisy.token(i) for i in range(16, 20)] == NOISE
    assert min(noisy.encode("the heat")) >= 20


def test_without_noise_there_is_none(tokenizer: Tokenizer) -> None:
    assert list(tokenizer.control) == list(CONTROL_TOKENS)
    assert tokenizer.mask_id is None and tokenizer.sentinel_ids == ()
    assert Tokenizer.train(["abab"], 300, noise=0).hash == Tokenizer.train(["abab"], 300).hash
    assert Tokenizer.train(["abab"], 300, noise=1).hash != Tokenizer.train(["abab"], 300).hash
    added = json.loads(Tokenizer.train(["abab"], 300)._definition)["added_tokens"]
    assert [token["content"] for token in added] == list(CONTROL_TOKENS)


@given(text=st.lists(st.sampled_from([*NOISE, *(x[:-1] for x in NOISE), *CONTROL_TOKENS, "<|", "a", " ", "你"])).map("".join))
def test_text_never_becomes_a_token_of_noise(noisy: Tokenizer, text: str) -> None:
    for ids in (noisy.encode(text), *noisy.encode_batch([text, "<|mask|>" + text])):
        assert all(20 <= i < noisy.vocab_size for i in ids)
    assert noisy.decode(noisy.encode(text)) == text


def test_noise_is_saved_and_loaded(noisy: Tokenizer, tmp_path: Path) -> None:
    noisy.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.hash, loaded.control, loaded.vocab_size) == (noisy.hash, noisy.control, noisy.vocab_size)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["mask_token"] == "<|mask|>"
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.mask_token_id == 16 and theirs.convert_tokens_to_ids(NOISE) == [16, 17, 18, 19]
    text = "the athanor's heat"
    assert theirs(text, add_special_tokens=False)["input_ids"] == noisy.encode(text)


def test_rooms_that_know_control_tokens_by_their_number_know_those_of_noise(noisy: Tokenizer) -> None:
    messages = [Message("user", "".join(NOISE)), Message("assistant", "heat")]
    rendered = render(noisy, messages)
    assert [i for i in rendered.ids if i < len(noisy.control)] == [1, 4, 2, 5, 2]
    content, _ = split(noisy, [*noisy.encode("he"), 16, 17, *noisy.encode("at"), 2])
    assert noisy.decode(content) == "heat"


@pytest.mark.parametrize(("noise", "size"), [(1, 273), (3, 275), (100, 372)])
def test_too_small_a_vocabulary_for_its_noise(noise: int, size: int) -> None:
    names = 17 + noise
    message = rf"vocab_size \({size}\) must be at least {size + 1}: {names} control tokens and 256 bytes; use {size + 1}"
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.train(["x"], size, noise=noise)
    assert Tokenizer.train(["x"], size + 1, noise=noise).vocab_size == size + 1


def test_noise_that_is_no_number_of_sentinels() -> None:
    with pytest.raises(TokenizerError, match=r"noise \(-1\) must be a number of sentinels: 0 for none, 100 is T5's"):
        Tokenizer.train(["x"], 300, noise=-1)


def test_other_added_tokens_are_refused(noisy: Tokenizer) -> None:
    content = _definition(noisy)
    content["added_tokens"][17]["special"] = False
    with pytest.raises(TokenizerError, match=r"id 17 must be the special token '<\|sentinel_0\|>', found '<\|sentinel_0\|>'"):
        Tokenizer(json.dumps(content))
    content = _definition(noisy)
    content["added_tokens"] = content["added_tokens"][:17]
    with pytest.raises(TokenizerError, match=r"id 17 must be the special token '<\|sentinel_0\|>'"):
        Tokenizer(json.dumps(content))
