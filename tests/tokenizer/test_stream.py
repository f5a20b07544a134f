"""Streaming: whatever the tokens, the stop texts and the moments of taking, the pieces together are the final text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from athanor.core.errors import RequestError, TokenizerError
from athanor.tokenizer.bpe import Tokenizer
from athanor.tokenizer.chat import parse
from athanor.tokenizer.stream import StreamDecoder, cut

# A small alphabet, so that stop texts come up, and half stop texts more often still.
_LETTERS = "ab \n你🎉"
STOPS = st.lists(st.text(_LETTERS, min_size=1, max_size=4) | st.just("\ufffd"), max_size=3).map(tuple)


def run(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...], every: int = 1) -> tuple[str, str, list[int], list[str]]:
    """Content, reasoning, the ids read until stopped, and the pieces of content."""
    decoder = StreamDecoder(tokenizer, stop)
    pieces, read = [], []
    for i, token in enumerate(ids):
        decoder.push(token)
        read.append(token)
        if i % every == 0:
            pieces.append(decoder.take())
        if decoder.stopped_by:
            break
    pieces.append(decoder.finish())
    return "".join(p[0] for p in pieces), "".join(p[1] for p in pieces), read, [p[0] for p in pieces]


@given(data=st.data(), stop=STOPS, every=st.integers(1, 5))
def test_pieces_are_the_final_text(tokenizer: Tokenizer, data: st.DataObject, stop: tuple[str, ...], every: int) -> None:
    single = {tokenizer.token_bytes(i): i for i in range(16, tokenizer.vocab_size)}
    byte_ids = [single[bytes([byte])] for byte in _LETTERS.encode()]
    any_ids = st.sampled_from(byte_ids) | st.integers(0, tokenizer.vocab_size - 1) | st.sampled_from([2, 6, 7])
    ids = data.draw(st.lists(any_ids, max_size=40))
    content, reasoning, read, _ = run(tokenizer, ids, stop, every)
    message = parse(tokenizer, read)
    assert content == cut(message.content, stop)[0]
    assert reasoning == (message.reasoning or "")


@given(text=st.text(_LETTERS), stop=STOPS, data=st.data())
@example(text="a你🎉b", stop=("🎉b",), data=None)
def test_text_in_bytes_is_cut_as_text_in_one_piece(
    tokenizer: Tokenizer, text: str, stop: tuple[str, ...], data: st.DataObject | None
) -> None:
    single = {tokenizer.token_bytes(i): i for i in range(16, tokenizer.vocab_size)}
    byte_by_byte = [single[bytes([byte])] for byte in text.encode()]
    expected = cut(text, stop)[0]
    assert run(tokenizer, byte_by_byte, stop)[0] == expected
    assert run(tokenizer, tokenizer.encode(text), stop)[0] == expected


@given(text=st.text(_LETTERS), stop=STOPS)
def test_cut_is_what_reading_character_by_character_gives(text: str, stop: tuple[str, ...]) -> None:
    for end in range(len(text) + 1):
        ended = [s for s in stop if text[:end].endswith(s)]
        if ended:
            longest = max(ended, key=len)
            assert cut(text, stop) == (text[: end - len(longest)], longest)
            return
    assert cut(text, stop) == (text, None)


def test_cut_is_before_the_stop_text_that_is_complete_first() -> None:
    assert cut("abcd", ("abcd", "c")) == ("ab", "c")
    assert cut("abcd", ("cd", "abcd", "d")) == ("", "abcd")
    assert cut("abcabc", ("bc",)) == ("a", "bc")
    assert cut("abc", ()) == cut("abc", ("x", "abcd")) == ("abc", None)


def test_half_a_character_is_held_back(tokenizer: Tokenizer) -> None:
    single = {tokenizer.token_bytes(i): i for i in range(16, tokenizer.vocab_size)}
    decoder = StreamDecoder(tokenizer)
    seen = []
    for byte in "é🎉".encode():
        decoder.push(single[bytes([byte])])
        seen.append(decoder.take()[0])
    assert seen == ["", "é", "", "", "", "🎉"]
    decoder.push(single["你".encode()[:1]])
    assert decoder.take() == ("", "")
    assert decoder.finish() == ("\ufffd", "")


def test_what_may_begin_a_stop_text_is_held_back(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer, ("STOP", "\n\n"))
    seen = []
    for piece in ("a ST", "x S", "T", "\n", "b", "STO"):
        for token in tokenizer.encode(piece):
            decoder.push(token)
        seen.append(decoder.take()[0])
    assert seen == ["a ", "STx ", "", "ST", "\nb", ""]
    assert not decoder.stopped_by
    assert decoder.finish() == ("STO", "")


def test_a_stop_text_ends_the_answer(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer, ("STOP",))
    for token in tokenizer.encode("fine STOP and more"):
        decoder.push(token)
    assert decoder.stopped_by == "STOP"
    assert decoder.take() == ("fine ", "")
    decoder.push(tokenizer.encode("x")[0])
    assert decoder.finish() == ("", "")


def test_stop_texts_count_in_content_only(tokenizer: Tokenizer) -> None:
    t = tokenizer
    decoder = StreamDecoder(t, ("STOP",))
    for token in [t.think_id, *t.encode("STOP it"), t.end_think_id, *t.encode("yes")]:
        decoder.push(token)
    assert not decoder.stopped_by
    assert decoder.take() == ("yes", "STOP it")


def test_control_tokens_are_no_text_and_end_ends(tokenizer: Tokenizer) -> None:
    t = tokenizer
    decoder = StreamDecoder(t)
    for token in [t.user_id, *t.encode("a"), t.end_id, *t.encode("b")]:
        decoder.push(token)
    assert decoder.finish() == ("a", "")
    assert not decoder.stopped_by


def test_text_of_control_tokens_streams_as_text(tokenizer: Tokenizer) -> None:
    text = "<think>no</think><|end|>"
    assert run(tokenizer, tokenizer.encode(text), ())[0] == text


@pytest.mark.parametrize("stop", [("",), ("a", ""), "a", (3,)])
def test_bad_stop_texts_are_refused(tokenizer: Tokenizer, stop: Any) -> None:
    with pytest.raises(RequestError, match=r"stop \(.*\) must be a list of texts, none of them empty") as caught:
        StreamDecoder(tokenizer, stop)
    assert caught.value.param == "stop"


def test_id_out_of_range_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="token id 600 must be"):
        StreamDecoder(tokenizer).push(600)
