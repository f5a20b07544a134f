"""`athanor export`: folders and GGUF files that others read, proved before they stay."""

import json

import pytest
import torch
import transformers

from athanor import cli
from athanor.compress.apply import compress
from athanor.lm import LM
from athanor.recipes import export
from tests.models.reference import config_of, theirs_of
from tests.test_families import byte_level, made


@pytest.fixture
def run(capsys):
    def go(*arguments):
        capsys.readouterr()
        status = cli.main(["export", *map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out, " ".join(err.split())

    return go


@pytest.fixture(scope="module")
def saved(lm, tmp_path_factory):
    return lm.save(tmp_path_factory.mktemp("run") / "base")


IDS = torch.tensor([[17, 30, 40, 50]])


def test_a_folder_that_transformers_reads(run, saved, lm, tmp_path):
    status, out, err = run(saved, "--to", "hf", "--out", tmp_path / "hf")
    assert (status, err) == (0, "")
    assert "read back: logits of 64 tokens: 0 apart" in out and "ours and transformers: logits of 64 tokens" in out
    assert not (tmp_path / "hf" / "athanor.json").exists()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        assert torch.allclose(theirs(IDS).logits, lm.logits(IDS), atol=1e-5, rtol=0)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)


def test_beside_the_checkpoint_by_default(run, saved):
    assert run(saved.parent, "--checkpoint", "base", "--to", "hf")[0] == 0
    assert (saved.parent / "base-hf" / "config.json").is_file()
    status, _, err = run(saved, "--to", "hf")
    assert status == 1 and "base-hf) exists already: name another, or remove it" in err
    assert run(saved, "--to", "gguf")[0] == 0 and (saved.parent / "base-f16.gguf").is_file()


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
def test_a_gguf_file_that_transformers_reads(run, saved, lm, tmp_path, kind):
    path = tmp_path / "m" / "model.gguf"
    status, out, err = run(saved, "--to", "gguf", "--kind", kind, "--out", path)
    assert (status, err) == (0, "")
    assert "read back by transformers: logits differ by" in out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    with torch.no_grad():
        far = (theirs(IDS).logits - lm.logits(IDS)).square().mean().sqrt() / lm.logits(IDS).std()
    assert far < {"f32": 1e-5, "f16": 1e-3, "q8_0": 0.05, "q4_0": 0.5}[kind]


def test_a_family_that_transformers_does_not_read_as_gguf_says_so(run, tmp_path):
    made(("mixtral", "tiny"), tmp_path / "m", byte_level)
    status, out, _ = run(tmp_path / "m", "--to", "gguf", "--kind", "f16", "--out", tmp_path / "x.gguf")
    assert status == 0 and "read back by transformers: skipped, it finds no place for 6 tensors of such a file" in out


def test_sizes_that_transformers_takes_for_its_own_are_no_fault_of_the_file(run, tmp_path):
    made(("gpt2", "tiny"), tmp_path / "m", byte_level)  # whose positions are not the 1024 of GPT-2
    status, out, err = run(tmp_path / "m", "--to", "gguf", "--out", tmp_path / "x.gguf")
    assert (status, err) == (0, "") and (tmp_path / "x.gguf").is_file()
    assert "skipped, it does not read such files (it takes some sizes for those of its own defaults)" in out


def test_other_failures_of_reading_are_ours(saved, tmp_path, monkeypatch):
    def fail(*args, **kw):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        cli.main(["export", str(saved), "--to", "gguf", "--out", str(tmp_path / "x.gguf")])
    assert list(tmp_path.iterdir()) == []


def test_no_more_is_compared_than_the_file_says_its_model_takes(run, tmp_path):
    made(("mistral", "tiny"), tmp_path / "m", byte_level)
    window = json.loads((tmp_path / "m" / "config.json").read_text())["sliding_window"]
    status, out, err = run(tmp_path / "m", "--to", "gguf", "--out", tmp_path / "x.gguf")
    assert (status, err) == (0, "") and window < 64
    assert "read back by transformers: logits differ by 0.000" in out
    assert f"note: read back within {window} tokens, which is all that the file says its model takes" in out


@pytest.mark.parametrize("case", ["tiny-2", "tiny-3"])
def test_transformers_is_told_what_it_does_not_read(run, tmp_path, case):
    made(("gemma", case), tmp_path / "m", byte_level)
    fields = json.loads((tmp_path / "m" / "config.json").read_text())
    scaled = fields | {"query_pre_attn_scalar": fields["head_dim"]}
    (tmp_path / "m" / "config.json").write_text(json.dumps(scaled))
    status, out, err = run(tmp_path / "m", "--to", "gguf", "--out", tmp_path / "x.gguf")
    assert (status, err) == (0, "")
    assert "read back by transformers: logits differ by 0.00" in out
    assert "note: transformers does not read query_pre_attn_scalar, layer_types, " in out


def test_a_kind_is_of_gguf_files(run, saved, tmp_path):
    status, _, err = run(saved, "--to", "hf", "--kind", "q4_0", "--out", tmp_path / "hf")
    assert status == 1 and "kind (q4_0) is for GGUF files, and to is hf: leave it out, or make a smaller model with" in err


@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForNextSentencePrediction"])
def test_other_heads_of_bert(run, tmp_path, name):
    torch.manual_seed(0)
    config = theirs_of(config_of(("bert", "tiny"))).config
    getattr(transformers, name)(config).save_pretrained(tmp_path / "m")
    status, out, err = run(tmp_path / "m", "--to", "hf", "--out", tmp_path / "hf")
    assert (status, err) == (0, "") and "ours and transformers: logits of 64 tokens: " in out and "skipped" not in out


def test_without_transformers_nothing_is_compared(run, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    _, out, _ = run(saved, "--to", "gguf", "--out", tmp_path / "x.gguf")
    assert "read back by transformers: skipped, transformers is not installed" in out


def test_what_does_not_hold_is_not_left_behind(run, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_read_back", lambda *_: 0.5)
    status, _, err = run(saved, "--to", "gguf", "--out", tmp_path / "x.gguf")
    assert status == 1 and "logits from the file that differ by 0.5 of their standard deviation, and 0.01 is allowed" in err
    assert err.endswith("nothing was written")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_read_back", stop)
    assert run(saved, "--to", "gguf", "--out", tmp_path / "x.gguf")[0] == 130
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(export.laws, "same_logits", lambda *a, **kw: _broken())
    status, _, err = run(saved, "--to", "hf", "--out", tmp_path / "hf")
    assert status == 1 and "read back differ by 2, and 0 is allowed: nothing was written" in err
    assert list(tmp_path.iterdir()) == []


def _broken():
    from athanor.types import Finding

    return Finding("L7", "read back", 2.0)


def test_quantised_models(run, tiny, tokenizer, tmp_path):
    folder = LM(compress(tiny(), 8), tokenizer).save(tmp_path / "int8")
    status, _, err = run(folder, "--to", "gguf")
    assert status == 1 and "is quantised: export the checkpoint that it was made from, which --kind quantises anew" in err
    status, out, _ = run(folder, "--to", "hf", "--out", tmp_path / "hf")
    assert status == 0 and "skipped, the model is quantised: other programs round otherwise" in out
