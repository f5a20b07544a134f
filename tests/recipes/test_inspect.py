"""`athanor inspect`: what a model is made of, without reading its weights."""

import json

import pytest

from athanor import cli
from athanor.compress.apply import compress
from athanor.lm import LM


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
    assert "weights                 " in out and "cache of a token        256 bytes" in out and "FLOPs of a token" in out


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
        "t5": "a token of source and one of answer",
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


def test_a_quantised_folder(run, tiny, tokenizer, tmp_path):
    small = compress(tiny(), 8)
    folder = LM(small, tokenizer).save(tmp_path / "int8")
    status, out, _ = run(folder, "--json")
    assert status == 0
    assert json.loads(out)["weights_bytes"] == sum(x.numel() * x.element_size() for x in small.state_dict().values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama:lama-3-8b"], "llama has no preset 'lama-3-8b'; did you mean 'llama-3-8b'?; it has tiny,"),
        (["lama:tiny"], "no architecture computes model_type 'lama'; did you mean 'llama'?"),
        (["nowhere"], "nowhere is not a folder: give a checkpoint folder or a run folder"),
        (["llama:tiny", "--context", "129"], "context (129) must lie between 1 and 128, the longest it takes"),
        (["llama:tiny", "--picture", "x.gif"], "picture (x.gif) must end with .svg, .png, .pdf: rename it"),
    ],
)
def test_refused(run, arguments, message):
    status, _, err = run(*arguments)
    assert status == 1 and message in err
