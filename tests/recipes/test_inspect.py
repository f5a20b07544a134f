"""`athanor inspect`: what a model is made of, without reading its weights."""

import json
import re

import pytest

from athanor import cli
from athanor.compress.apply import compress
from athanor.core.weights import open_weights
from athanor.lm import LM
from athanor.report import words


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")

    def go(*arguments):
        status = cli.main(["inspect", *map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out, " ".join(err.split())

    return go


def test_a_folder(run, lm, tmp_path):
    folder = lm.save(tmp_path / "base")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-64:] = b"\xff" * 64  # weights that no model has: they are not read
    (folder / "model.safetensors").write_bytes(data)
    status, out, err = run(folder)
    assert (status, err) == (0, "")
    n = lm.model.n_parameters()
    assert f"parameters              {n:,}" in out and "blocks 0-1" in out
    assert (
        "weights                 " in out
        and "cache of a token        256 bytes in float32, 128 in bfloat16" in out
        and "FLOPs of a token" in out
    )


def test_json(run):
    status, out, _ = run("mixtral:mixtral-8x7b", "--json", "--context", 100, "--dtype", "bfloat16")
    found = json.loads(out)
    assert status == 0 and found["parameters"] == 46_702_792_704 and found["active"] == 12_879_925_248
    assert found["context"] == 100 and found["family"] == "mixtral" and found["kind"] == "decoder"
    assert found["weights_bytes"] == 2 * found["parameters"] and found["config"]["n_experts"] == 8
    assert sum(part["parameters"] for part in found["parts"]) == found["parameters"]


@pytest.mark.parametrize(
    "preset", ["t5:t5-small", "rnn_lm:lstm-200", "mixtral:mixtral-8x7b", "bilstm_crf:tiny", "gemma:gemma-2-2b"]
)
def test_every_kind(run, preset):
    status, out, err = run(preset)
    assert (status, err) == (0, "")
    said = {
        "t5": "in bfloat16, of source and answer",
        "rnn": "state of a sequence",
        "mix": "active for a token",
        "gem": "(window 4096)",
    }
    assert all(words in out for start, words in said.items() if preset.startswith(start))


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_a_picture(run, tmp_path, suffix):
    path = tmp_path / f"layers{suffix}"
    status, out, _ = run("gemma:gemma-2-2b", "--picture", path)
    assert status == 0 and f"picture: {path}" in out
    data = path.read_bytes()
    assert data.startswith({".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}[suffix])
    if suffix == ".svg":
        text = data.decode()
        assert "blocks 0, 2, 4 ... 24 (window 4096)   x 13" in text and "output (tied)" in text
        first = data
        run("gemma:gemma-2-2b", "--picture", path)
        assert path.read_bytes() == first


def test_a_picture_of_any_name(run, lm, tmp_path):
    """Chinese is drawn without a warning, which would be an error here, and a long name is broken into lines within the edge."""
    folder = lm.save(tmp_path / ("模型" * 20) / ("a-long-name-" * 12))
    status, _, err = run(folder, "--picture", tmp_path / "long.svg")
    assert (status, err) == (0, "")
    text = (tmp_path / "long.svg").read_text(encoding="utf-8")
    lines = re.findall(r'<text style="font-weight: 700; font-size: 16px[^>]*>([^<]*)</text>', text)
    assert len(lines) > 2 and "".join(lines) == "模型" * 20 + "/" + "a-long-name-" * 12
    assert run(folder, "--picture", tmp_path / "long.png")[0] == 0


def test_a_quantised_folder(run, tiny, tokenizer, tmp_path):
    small = compress(tiny(), 8)
    folder = LM(small, tokenizer).save(tmp_path / "int8")
    status, out, _ = run(folder, "--json")
    assert status == 0
    found, held = json.loads(out), sum(x.numel() * x.element_size() for x in small.state_dict().values())
    assert found["weights_bytes"] == held and found["parameters"] == tiny().n_parameters()
    _, out, _ = run(folder)
    stored = words.size(open_weights(folder).nbytes)
    assert f"weights                 {words.size(held)} in int8 and float32; {stored} in files" in out


def test_a_narrow_terminal_cuts_no_number(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run("deepseek_v3:deepseek-v3")
    assert "…" not in out and "667,422,588,928" in out and max(map(len, out.splitlines())) < 100
    (row,) = [line for line in out.splitlines() if "667,422,588,928" in line]
    assert "blocks 3-60" in row and "97.8" in row and "72.8 GFLOP" in row
    below = out[out.index(row) :].split("norm        ")[0]
    cells = "".join(line.split("│")[-2].strip() for line in below.splitlines() if "│" in line)
    assert "feed_forward_norm" in cells.replace(" ", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama:lama-3-8b"], "llama has no preset 'lama-3-8b'; did you mean 'llama-3-8b'?; it has tiny,"),
        (["lama:tiny"], "no architecture computes model_type 'lama'; did you mean 'llama'?"),
        (["nowhere"], "nowhere is not a folder: give a checkpoint folder or a run folder"),
        (["llama:tiny", "--context", "129"], "context (129) must lie between 1 and 128, the longest it takes"),
        (["gpt2:gpt2", "--checkpoint", "base"], "checkpoint ('base') is of run folders, and gpt2:gpt2 is a preset: leave it out"),
        (["llama:tiny", "--picture", "x.gif"], "picture (x.gif) must end with .svg, .png, .pdf: rename it"),
    ],
)
def test_refused(run, arguments, message):
    status, _, err = run(*arguments)
    assert status == 1 and message in err
