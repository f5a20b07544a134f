"""The public face: load, generate, complete, logits, save."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

import athanor
from athanor.core.errors import CheckpointError, ConfigError, RequestError, TokenizerError
from athanor.lm import LM, MANIFEST
from athanor.tokenizer.bpe import Tokenizer
from athanor.tokenizer.chat import parse, render

GREEDY = {"temperature": 0, "max_tokens": 12}
QUESTION = [{"role": "user", "content": "What is 12 + 30?"}]


@pytest.fixture(scope="module")
def saved(lm, tmp_path_factory):
    return lm.save(tmp_path_factory.mktemp("run") / "base", stage="base", steps=3)


@pytest.fixture
def copy(saved, tmp_path):
    """A checkpoint that a test may spoil."""
    return shutil.copytree(saved, tmp_path / "copy")


def test_a_checkpoint_folder(saved, lm):
    assert sorted(p.name for p in saved.iterdir()) == [
        MANIFEST, "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    loaded = athanor.load(saved)
    assert (loaded.path, loaded.name, loaded.config) == (saved, f"{saved.parent.name}/base", lm.config)
    assert loaded.tokenizer.hash == lm.tokenizer.hash
    assert loaded.lineage["stage"] == "base" and loaded.lineage["steps"] == 3
    assert loaded.lineage.keys() >= {"tokenizer", "template", "config", "weights"}
    ids = [[20, 30, 40], [50, 60, 70]]
    assert torch.equal(loaded.logits(ids), lm.logits(ids))
    assert loaded.generate("The", **GREEDY) == lm.generate("The", **GREEDY)


def test_saving_again_gives_the_same_bytes_and_keeps_the_lineage(saved, tmp_path):
    again = athanor.load(saved).save(tmp_path / "again", steps=4)
    for path in saved.iterdir():
        if path.name != MANIFEST:
            assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    before, after = (json.loads((p / MANIFEST).read_text())["lineage"] for p in (saved, again))
    assert after == before | {"steps": 4}


@pytest.mark.parametrize(("stages", "chosen"), [(["base"], "base"), (["sft", "base"], "sft"), (["base", "rl", "int8"], "rl")])
def test_a_run_folder_means_the_last_of_its_life(saved, tmp_path, stages, chosen):
    for stage in stages:
        shutil.copytree(saved, tmp_path / stage)
    assert athanor.load(tmp_path).path == tmp_path / chosen
    assert athanor.load(str(tmp_path), stages[-1]).path == tmp_path / stages[-1]


def test_a_path_that_means_no_model(saved, tmp_path):
    def refused(message, *arguments):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            athanor.load(*arguments)

    refused(f"{tmp_path / 'x'} is not a folder: give a checkpoint folder or a run folder", tmp_path / "x")
    remedy = "give a checkpoint folder or a run folder such as runs/first"
    refused(f"path ('') is empty: {remedy}", "")
    refused(f"{tmp_path} is empty: {remedy}, or make one with `athanor run`", tmp_path)
    (tmp_path / "notes.txt").touch()
    refused(f"{tmp_path} holds neither config.json nor folders with one: {remedy}", tmp_path)
    (tmp_path / "model.safetensors").touch()
    refused(f"{tmp_path} holds weights and no config.json: copy or download the whole folder again", tmp_path)
    (tmp_path / "run.json").touch()
    refused(f"{tmp_path} has no checkpoint yet (no */config.json): let `athanor run --out {tmp_path}` finish", tmp_path)
    refused(f"{tmp_path} has no checkpoint 'rl'; it has none", tmp_path, "rl")
    shutil.copytree(saved, tmp_path / "base")
    refused(f"{tmp_path} has no checkpoint 'bas'; did you mean 'base'?; it has base", tmp_path, "bas")
    (tmp_path / "base").rename(tmp_path / "mine")
    refused(f"{tmp_path} holds no checkpoint itself but mine: give one of them, such as {tmp_path / 'mine'}", tmp_path)


class TestDamage:
    def refused(self, folder, message, error=CheckpointError):
        with pytest.raises(error, match=message):
            athanor.load(folder)

    def test_altered_weights(self, copy):
        data = bytearray((copy / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (copy / "model.safetensors").write_bytes(data)
        self.refused(copy, r"copy: weights differ from what athanor\.json recorded when it was saved: the folder was altered")

    def test_truncated_weights(self, copy):
        path = copy / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-4])
        self.refused(copy, "weights differ from what athanor.json recorded")

    def test_missing_weights(self, copy):
        (copy / "model.safetensors").unlink()
        self.refused(copy, "weights differ from what athanor.json recorded")

    def test_an_altered_config(self, copy):
        content = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(content | {"rope_theta": 9.0}))
        self.refused(copy, "config differ from what athanor.json recorded")

    def test_another_tokenizer(self, copy, tokenizer):
        other = Tokenizer.train(["other words, other merges " * 9], tokenizer.vocab_size)
        other.save(copy)
        self.refused(copy, "tokenizer differ from what athanor.json recorded")

    def test_another_template(self, copy):
        path = copy / "tokenizer_config.json"
        path.write_text(path.read_text().replace("add_generation_prompt", "add_the_generation_prompt"))
        self.refused(copy, "chat template mismatch", TokenizerError)

    @pytest.mark.parametrize("manifest", ['{"format": 2, "lineage": {}}', '{"format": 1}', "[]"])
    def test_another_format(self, copy, manifest):
        (copy / MANIFEST).write_text(manifest)
        found = json.loads(manifest)
        found = found.get("format") if found else None
        self.refused(copy, rf"athanor\.json has format {found}, and this version reads format 1 with a lineage: use the version")

    def test_without_a_manifest_it_is_a_model_from_elsewhere(self, copy):
        (copy / MANIFEST).unlink()
        assert athanor.load(copy).lineage == {}


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny, tokenizer):
    with pytest.raises(
        CheckpointError, match=r"the tokenizer has 320 tokens and the model's vocabulary 300: they were not saved"
    ):
        LM(tiny(vocab_size=300), tokenizer)
    assert LM(tiny(vocab_size=400), tokenizer).config.vocab_size == 400  # padded vocabularies are usual


def test_a_text_is_continued_and_a_conversation_answered(lm, tokenizer):
    assert lm.prompt_ids("The heat") == [tokenizer.bos_id, *tokenizer.encode("The heat")]
    assert lm.prompt_ids("") == [tokenizer.bos_id]
    assert lm.prompt_ids(QUESTION) == render(tokenizer, QUESTION, generation_prompt=True).ids
    for prompt in ("The heat", "", QUESTION):
        answer = lm.complete(prompt, **GREEDY)
        ids = lm.prompt_ids(prompt)
        for token in answer.ids:
            assert token == int(lm.logits([ids])[0, -1].argmax())
            ids.append(token)
        assert lm.generate(prompt, **GREEDY) == answer.text == parse(tokenizer, answer.ids).content


def test_parameters_reach_the_sampler(lm):
    def ids(**params):
        return lm.complete("The", **({"max_tokens": 10} | params)).ids

    assert ids(seed=1) == ids(seed=1) != ids(seed=2)
    assert len({ids() for _ in range(4)}) > 1  # no seed: another one each time
    assert len(ids(max_tokens=3)) == 3
    assert ids(top_k=1, seed=5) == ids(temperature=0)
    whole = lm.complete("", seed=3)
    assert whole.finish_reason in ("stop", "length") and len(whole.ids) <= 127  # all that the context holds


def test_one_stop_text_may_be_given_as_it_is(lm):
    text = lm.generate("The", **(GREEDY | {"max_tokens": 40}))
    stop = text[len(text) // 2 :][:2]
    cut = lm.complete("The", **(GREEDY | {"max_tokens": 40, "stop": stop}))
    assert cut.text == text[: text.index(stop)] and cut.finish_reason == "stop"
    assert cut.text == lm.generate("The", **(GREEDY | {"max_tokens": 40, "stop": (stop, "never")}))


def test_an_unknown_parameter_is_named_with_the_nearest(lm):
    with pytest.raises(
        ConfigError, match=r"unknown parameter 'temprature'; did you mean 'temperature'\?; there are temperature, top_p"
    ):
        lm.generate("The", temprature=1.0)
    with pytest.raises(RequestError, match="max_tokens"):
        lm.generate("The", max_tokens=0)
    with pytest.raises(RequestError, match="the prompt has"):
        lm.generate("heat " * 200)
    with pytest.raises(RequestError, match="role 'usr' must be one of"):
        lm.generate([{"role": "usr", "content": "x"}])


def test_logits_are_the_models_in_float32(lm):
    ids = torch.randint(0, 320, (2, 9))
    logits = lm.logits(ids)
    with torch.no_grad():
        assert torch.equal(logits, lm.model(ids))
    assert logits.shape == (2, 9, 320) and logits.dtype == torch.float32 and not logits.requires_grad


NONE = (
    [[1.5, 2.7]], [[1.0]], [[True, False]], [[1, True]], [1.5], 1.5, "abc", None, [[None]], [[1 + 2j]], [["a"]], [[2**70]],
    [["ab"]], torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool),
)  # fmt: skip


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2, 3], r"ids has shape \(3,\) and must be \(batch, time\): wrap one sequence in a list"),
        ([[]], r"ids has shape \(1, 0\) and must be \(batch, time\)"),
        ([[1, 2], [3]], r"ids must be sequences of one length .*: give those of another length apart"),
        ([[1] * 129], r"ids has 129 tokens and the context holds 128: shorten it"),
        ([[1, 2], [3, 320], [-1, 0]], r"ids\[1\]\[1\] is 320 and must lie in \[0, 320\): it was made by another tokenizer"),
        ([[-1]], r"ids\[0\]\[0\] is -1 and must lie in \[0, 320\)"),
        *(
            (ids, r"ids is .* and must be token ids, whole numbers in rows such as \[\[1, 2, 3\]\]: encode a text first")
            for ids in NONE
        ),
    ],
)
def test_ids_that_are_none_are_refused(lm, ids, message):
    with pytest.raises(ConfigError, match=message):
        lm.logits(ids)


def test_ids_of_any_whole_numbers(lm):
    expected = lm.logits([[1, 2]])
    for ids in (((1, 2),), torch.tensor([[1, 2]], dtype=torch.int32), np.array([[1, 2]], dtype=np.uint8)):
        assert torch.equal(lm.logits(ids), expected)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": 1.5}, "max_tokens is 1.5 (float) but must be int"),
        ({"max_tokens": "5"}, "max_tokens is '5' (str) but must be int"),
        ({"temperature": "x"}, "temperature is 'x' (str) but must be float"),
        ({"stop": 5}, "stop is 5 (int) but must be a list"),
        ({"stop": [5]}, "stop[0] is 5 (int) but must be str"),
        ({"ignore_eos": 1}, "ignore_eos is 1 (int) but must be bool"),
        ({"structure": "regex"}, "structure is 'regex' and must be an athanor.types.Structure: make one"),
        ({"beams": True}, "beams is True (bool) but must be int"),
        ({"beams": 2, "length_penalty": "1"}, "length_penalty is '1' (str) but must be float"),
    ],
)
def test_parameters_of_a_wrong_type_are_refused(lm, params, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        lm.generate("The", **({"max_tokens": 3} | params))


def test_parameters_may_be_numbers_of_other_libraries(lm):
    given = lm.complete("The", max_tokens=np.int64(3), temperature=np.float32(0), allowed_ids=np.arange(300).tolist())
    assert given.ids == lm.complete("The", max_tokens=3, temperature=0, allowed_ids=tuple(range(300))).ids


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: athanor.load(None), "path is None and must be a checkpoint folder or a run folder: give its name"),
        (
            lambda lm: athanor.load("x", dtype="float16"),
            "dtype ('float16') must be a floating torch.dtype, such as torch.bfloat16",
        ),
        (lambda lm: athanor.load("x", dtype=torch.int64), "dtype (torch.int64) must be a floating torch.dtype"),
        (lambda lm: lm.embed(None), "texts is None and must be a text or a list of texts: give these"),
        (lambda lm: lm.embed(["a", 3]), "texts is ['a', 3] and must be a text or a list of texts"),
        (lambda lm: lm.generate(None), "the prompt is None and must be a text or a conversation: give one"),
        (lambda lm: lm.generate(3), "the prompt is 3 and must be a text or a conversation: give one"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused(lm, call, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        call(lm)
