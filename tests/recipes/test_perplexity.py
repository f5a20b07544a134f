"""`athanor perplexity`: what it prints is what was measured, and every option changes it."""

import json
import lzma

import pytest

from athanor import cli
from athanor.core import io
from athanor.data.clean import clean
from athanor.evals.perplexity import perplexity
from tests.test_families import byte_level, made, unigram

TEXT = " = The athanor = \n \n It keeps one steady heat . \n 你好 \n" * 4


@pytest.fixture
def run(capsys, tmp_path, lm, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lm.save(tmp_path / "run" / "base")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")

    def go(*arguments):
        capsys.readouterr()
        status = cli.main(["perplexity", *map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out, " ".join(err.split())

    return go


def figures(run, *arguments):
    status, out, err = run("run", "text.txt", "--json", *arguments)
    assert (status, err) == (0, "")
    return json.loads(out)


def test_figures(run, lm):
    cleaned = clean(TEXT).text
    found = perplexity(lm.decoder, lm.tokenizer, cleaned, window=128, stride=64)
    said = figures(run)
    assert said["value"] == pytest.approx(found.per("word"), rel=1e-5)
    assert said["perplexity"] == pytest.approx({unit: found.per(unit) for unit in ("word", "byte", "token")}, rel=1e-5)
    assert (said["window"], said["stride"], said["context"], said["windows"]) == (128, 64, 65, found.windows)
    assert said["cleaned"] == {"trailing": 16} and said["words"] == len(TEXT.split()) + 16
    assert (said["model"], said["bytes"]) == ("run/base", len(cleaned.encode()))


def test_words(run):
    status, out, _ = run("run", "text.txt", "--unit", "byte", "--window", 32, "--stride", 8)
    said = figures(run, "--unit", "byte", "--window", 32, "--stride", 8)
    assert status == 0
    assert f"run/base: perplexity {said['value']:,.3f} per byte, {said['bits_per_byte']:.4f} bits per byte, on text.txt" in out
    assert f"  {said['words']:,} words (ends of lines included), {said['bytes']:,} bytes, {said['tokens']:,} tokens" in out
    assert f"  {said['windows']} windows of 32 tokens, 8 of them new\n" in out
    assert "predicted from 25 tokens or more, fewer only at the text's start" in out
    assert "cleaned: 16 trailing" in out and "not predicted" not in out
    assert "bits per byte" not in run("run", "text.txt")[1]


def test_every_option_changes_something(run):
    plain = figures(run)
    values = [figures(run, *more)["value"] for more in (("--unit", "token"), ("--window", 16), ("--stride", 1), ("--raw",))]
    assert len({plain["value"], *values}) == 5
    assert figures(run, "--raw")["cleaned"] == {}
    assert figures(run, "--precision", "bf16")["nats"] != plain["nats"]


def test_the_window_is_that_of_the_pre_training(run, tmp_path):
    io.write_json(tmp_path / "run" / "stages" / "pretrain.json", {"settings": {"context": 48}})
    assert figures(run)["window"] == 48


def test_compressed_text_and_another_checkpoint(run, tmp_path, tiny, lm):
    type(lm)(tiny(seed=3), lm.tokenizer).save(tmp_path / "run" / "sft")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(TEXT.encode()))
    status, out, _ = run("run", "b.txt.xz", "--checkpoint", "base", "--json")
    assert status == 0 and json.loads(out)["value"] == pytest.approx(figures(run, "--checkpoint", "base")["value"])
    assert figures(run)["value"] != json.loads(out)["value"]


def test_a_model_from_elsewhere(run, tmp_path):
    made(("gpt2", "tiny"), tmp_path / "gpt2", byte_level)
    status, out, _ = run("gpt2", "text.txt")
    assert status == 0 and "windows of 128 tokens" in out
    fields = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(fields | {"bos_token_id": None}))
    (tmp_path / "gpt2" / "tokenizer_config.json").write_text("{}")
    status, out, _ = run("gpt2", "text.txt")
    assert status == 0 and "the first token was not predicted: the model knows no beginning of a text" in out


def test_refused(run, tmp_path):
    made(("t5", "tiny"), tmp_path / "t5", unigram)
    for arguments, words in (
        (["t5", "text.txt"], "this is done with decoders that generate: take one"),
        (["run", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["run", "text.txt", "--window", "1"], "window (1) must lie between 2 and 128"),
        (["run", "text.txt", "--stride", "0"], "stride (0) must lie between 1 and window (128)"),
    ):
        status, _, err = run(*arguments)
        assert status == 1 and words in err, err
