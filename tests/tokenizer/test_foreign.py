"""Tokenizers of other programs: what transformers makes of the same files."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertTokenizer

from athanor.core.errors import TokenizerError
from athanor.tokenizer.foreign import ForeignTokenizer, is_ours

TEXT = [
    "The athanor keeps one steady heat.",
    "naïve café, 12 + 30 = 42",
    "你好 世界 🔥",
    "the heat of the athanor and the hat",
] * 3
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "heat", "##s", "a", "cafe", "naive", ",", "世", "界", "keep"]


def byte_level(folder):
    """GPT-2's kind; its end is also its beginning."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    )
    return written(inner, folder, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def sentence_piece(folder):
    """LLaMA's kind: a sign for spaces, one before each text, bytes for what is missing, a BOS."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    inner.train_from_iterator(["the heat of the athanor"] * 3, trainers.BpeTrainer(vocab_size=290, special_tokens=special))
    content = json.loads(inner.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are no special tokens
    inner = Tokenizer.from_str(json.dumps(content))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return written(inner, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram(folder):
    """T5's kind: pieces with scores, an end after each text."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator(TEXT, trainer)
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    return written(inner, folder, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def written(inner, folder, **names):
    inner.save(str(folder / "tokenizer.json"))
    names |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def word_pieces(folder):
    """BERT's kind, of its oldest files."""
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


KINDS = {"byte_level": byte_level, "sentence_piece": sentence_piece, "unigram": unigram}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    folder = KINDS[request.param](tmp_path_factory.mktemp(request.param))
    return ForeignTokenizer.load(folder), AutoTokenizer.from_pretrained(folder), folder


@given(text=st.text() | st.text("the aonhr.世\n", max_size=30))
def test_ids_and_texts_are_those_of_transformers(pair, text):
    ours, theirs, _ = pair
    assert ours.encode(text) == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ids = theirs(text, split_special_tokens=True)["input_ids"]
    assert ours.prompt(text) == (ids or [ours.bos_id])
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_control_tokens(pair):
    ours, theirs, _ = pair
    assert (ours.bos_id, ours.end_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)
    name = theirs.eos_token
    assert ours.end_id not in ours.encode(f"heat {name} heat") and ours.end_id not in ours.prompt(f"heat{name}")[:-1]
    assert ours.decode(ours.encode(name)) in (name, name.strip("</>"))  # letters that a vocabulary lacks are unknown
    assert ours.end_id in ours.prompt(f"heat {name} heat", control=True)
    assert ours.end_id not in ours.encode(f"heat {name} heat")  # what was asked for once is not kept
    assert ours.token(ours.end_id) == name


def test_a_token_keeps_its_space(pair):
    """Where decoding leaves out the space that a text begins with, as SentencePiece's does, single tokens have theirs still."""
    ours, _, _ = pair
    tokens = [ours.token(id) for id in ours.encode("the heat of the hat")]
    assert "".join(tokens).strip() == "the heat of the hat" and len(tokens) >= 4
    alone = [ours.token(id) for id in ours.encode("the  heat")]
    assert "".join(alone).strip() == "the  heat"


@given(data=st.data())
def test_a_stream_gives_the_text_without_taking_anything_back(pair, data):
    ours, theirs, _ = pair
    text = data.draw(st.text("the athanor.世🔥é\n", min_size=1, max_size=25))
    ids = ours.encode(text)
    at = data.draw(st.integers(0, len(ids)))
    stream = ours.pieces(ids[:at])
    pieces = [stream.push(id) for id in ids[at:]]
    given_out = "".join(pieces) + stream.finish()
    whole, before = (theirs.decode(part, skip_special_tokens=True) for part in (ids, ids[:at]))
    if whole.startswith(before) and "\ufffd" not in before:
        assert given_out == whole[len(before) :] and "\ufffd" not in "".join(pieces)


def test_half_a_character_comes_out_at_the_end(pair):
    ours = pair[0]
    ids = ours.encode("🜂")
    if len(ids) < 3:
        pytest.skip("this vocabulary has no bytes")
    stream = ours.pieces(())
    assert [stream.push(id) for id in ids[:-1]] == [""] * (len(ids) - 1)
    assert set(stream.finish()) == {"\ufffd"} and stream.finish() == ""


@given(data=st.data())
def test_a_stream_takes_any_ids(pair, data):
    ours = pair[0]
    known = st.lists(st.integers(0, ours.vocab_size - 1), max_size=12)
    before, ids = data.draw(known), data.draw(known | st.lists(st.integers(0, ours.vocab_size + 3), max_size=40))
    stream = ours.pieces(before)
    text = "".join([*map(stream.push, ids), stream.finish()])
    whole, start = ours.decode([*before, *ids]), ours.decode(before)
    if "\ufffd" not in whole and whole.startswith(start):
        assert text == whole[len(start) :]


def test_saved_files_are_the_files(pair, tmp_path):
    ours, theirs, folder = pair
    ours.save(tmp_path)
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert ForeignTokenizer.load(tmp_path).hash == ours.hash
    assert AutoTokenizer.from_pretrained(tmp_path)("the heat")["input_ids"] == theirs("the heat")["input_ids"]
    assert not is_ours(folder)


@given(text=st.text() | st.text("Tthe aeskCcÀé,世界 ", max_size=30))
def test_word_pieces_are_those_of_transformers(bert, text):
    ours, theirs = bert
    assert ours.prompt(text) == theirs(text, split_special_tokens=True)["input_ids"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = word_pieces(tmp_path_factory.mktemp("bert"))
    return ForeignTokenizer.load(folder), BertTokenizer.from_pretrained(folder)


def test_pairs_and_masks(bert):
    ours, theirs = bert
    expected = theirs("the heat", "a cafe")
    assert ours.segments("the heat", "a cafe") == (expected["input_ids"], expected["token_type_ids"])
    assert ours.prompt("the [MASK]", control=True) == [2, 5, 4, 3]
    assert 4 not in ours.prompt("the [MASK]")
    assert ours.decode([2, 6, 7, 3]) == "heats"


def test_upper_case_where_the_files_say_so(tmp_path):
    word_pieces(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert ForeignTokenizer.load(tmp_path).prompt("The the") == [2, 1, 5, 3]


def test_what_the_files_say_of_batches_cuts_no_text(tmp_path):
    byte_level(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"truncation": cut}))
    assert ForeignTokenizer.load(tmp_path).decode(ForeignTokenizer.load(tmp_path).prompt("the heat of it")) == "the heat of it"


def test_ids_beyond_the_vocabulary_have_no_text(pair):
    ours = pair[0]
    assert ours.decode([ours.vocab_size, *ours.encode("the")]) == ours.decode(ours.encode("the"))
    assert ours.pieces(()).push(ours.vocab_size) == "" and ours.token(10**6) == "<1000000>"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has neither tokenizer.json nor vocab.txt (it has none): add the tokenizer.json that transformers makes"),
        ({"spiece.model": "x"}, "has neither tokenizer.json nor vocab.txt (it has spiece.model): add"),
        ({"tokenizer.json": "{}"}, "defines no tokenizer ("),
        ({"tokenizer.json": "nonsense"}, "defines no tokenizer ("),
        ({"vocab.txt": "a\nb\n"}, "vocab.txt lacks [UNK], [CLS], [SEP], which every vocabulary of word pieces has"),
        ({"vocab.txt": "\n".join(WORDS), "tokenizer_config.json": "["}, "tokenizer_config.json is not JSON"),
        (
            {"vocab.txt": "\n".join(WORDS), "tokenizer_config.json": "[]"},
            "tokenizer_config.json must hold a table, and holds list",
        ),
    ],
)
def test_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(TokenizerError, match=re.escape(message)):
        ForeignTokenizer.load(tmp_path)


def test_a_lone_surrogate(pair):
    with pytest.raises(TokenizerError, match="lone surrogate"):
        pair[0].encode("\ud800")
