"""What is known of vocabularies, against what transformers says of the same files."""

import json
import re

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from athanor.objectives._vocabulary import Vocabulary
from athanor.tokenizer.foreign import ForeignTokenizer

TEXT = "the athanor keeps one steady heat. naive cafes and athanors keep heating"
LETTERS = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{x}" for x in "abcdefghijklmnopqrstuvwxyz")]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "ath", "##anor", "keep", "heat", "##ing", ".", *LETTERS]


def bert(folder):
    """Word pieces in a vocab.txt; the config names nothing, as in the files of 2018."""
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")


def roberta(folder):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = [AddedToken(x, special=True) for x in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=290, special_tokens=special, initial_alphabet=alphabet))
    names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "mask": "<mask>", "unk": "<unk>"}
    written(inner, folder, names)


def t5(folder):
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    inner.train_from_iterator(
        [TEXT] * 3, trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    inner.add_special_tokens([f"<extra_id_{k}>" for k in range(4)])
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    written(inner, folder, {"eos": "</s>", "pad": "<pad>", "unk": "<unk>"})


def written(inner, folder, names):
    inner.save(str(folder / "tokenizer.json"))
    fields = {f"{name}_token": token for name, token in names.items()} | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("kind", [roberta, t5])
def test_control_tokens_are_those_of_transformers(tmp_path, kind):
    kind(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = Vocabulary.of(ForeignTokenizer.load(tmp_path))
    assert ours.size == len(theirs)
    # theirs knows only those added tokens that a name is given to
    assert ours.special >= set(theirs.all_special_ids)
    assert ours.special - set(theirs.all_special_ids) <= set(ours.sentinels)
    found = (ours.bos, ours.eos, ours.pad, ours.mask, ours.cls, ours.sep)
    expected = [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id]
    assert found[:4] == tuple(expected)
    if kind is roberta:
        assert found[4:] == (theirs.cls_token_id, theirs.sep_token_id) and not ours.sentinels
    else:
        assert found[4:] == (None, theirs.eos_token_id)
        assert list(ours.sentinels) == theirs.convert_tokens_to_ids([f"<extra_id_{k}>" for k in range(4)])


def test_files_that_name_nothing(tmp_path):
    bert(tmp_path)
    ours = Vocabulary.of(ForeignTokenizer.load(tmp_path))
    assert (ours.pad, ours.cls, ours.sep, ours.mask) == (0, 2, 3, 4)
    assert (ours.bos, ours.eos) == (None, 3)
    assert ours.special == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("kind", [bert, roberta, t5])
def test_words_begin_where_they_do(tmp_path, kind):
    kind(tmp_path)
    tokenizer = ForeignTokenizer.load(tmp_path)
    ours = Vocabulary.of(tokenizer)
    ids = tokenizer.encode(TEXT)
    texts = [tokenizer._inner.id_to_token(id).removeprefix("##").strip("Ġ▁") for id in ids]
    words = words_of(ours, ids, texts)
    assert words == re.findall(r"[a-z]+|\.", TEXT) and len(ids) > len(words)
    assert [text for id, text in zip(ids, texts, strict=True) if ours.sentence_ends[id]] == ["."]


def words_of(vocabulary, ids, texts):
    """Texts of tokens joined to words; blanks alone are none."""
    words = [""]
    for i, (id, text) in enumerate(zip(ids, texts, strict=True)):
        if i and vocabulary.word_starts[id]:
            words.append("")
        words[-1] += text
    return [word for word in words if word]


def test_ours(noisy):
    v = Vocabulary.of(noisy)
    assert (v.size, v.bos, v.eos, v.pad, v.cls, v.sep, v.mask) == (320, 1, 2, 0, 1, 2, 16)
    assert v.sentinels == tuple(range(17, 41)) and v.special == frozenset(range(41)) and v.start is None
    assert v.ordinary.tolist() == list(range(41, 320))


def test_ours_without_noise(tokenizer):
    v = Vocabulary.of(tokenizer)
    assert v.mask is None and v.sentinels == () and v.special == frozenset(range(16))


@pytest.mark.parametrize(
    ("piece", "begins"),
    [
        (b" the", True),
        (b"the", False),
        (b"(the", True),
        (b"7", True),
        (b"\n", True),
        ("é".encode(), False),
        ("é".encode()[:1], False),
        ("é".encode()[1:], False),
        ("你好".encode(), True),
        ("你".encode()[:1], True),
        ("你".encode()[:2], True),
        ("你".encode()[1:], False),
        ("🔥".encode()[:2], True),
        ("\u0301".encode(), False),
    ],
)
def test_a_piece_goes_on_with_a_word_when_it_begins_with_a_letter_of_a_script_with_spaces(piece, begins):
    from athanor.objectives._vocabulary import _begins_word

    assert _begins_word(piece) == begins


def test_bytes_of_a_vocabulary_with_spaces_as_signs():
    from athanor.objectives._vocabulary import _pieces

    assert _pieces(["▁the", "<0x0A>", "heat", "<0xE4>"]) == [b" the", b"\n", b"heat", b"\xe4"]


def test_words_of_our_vocabulary(noisy):
    v = Vocabulary.of(noisy)
    text = "The athanor keeps (one) steady heat. 12, 天地!\n"
    ids = noisy.encode(text)
    characters = [noisy.token_bytes(id).decode("latin-1").strip(" ") for id in ids]
    words = [word.encode("latin-1").decode() for word in words_of(v, ids, characters)]
    assert words == [*("The", "athanor", "keeps", "(one", ")", "steady", "heat", ".", "1", "2", ",", "天", "地", "!"), "\n"]
    ends = [characters[i] for i, id in enumerate(ids) if v.sentence_ends[id]]
    assert ends == [".", "!", "\n"]
