"""`athanor import`: from folders, llama2.c files and the hub into a folder of ours."""

import json
import shlex
import shutil

import pytest
import torch

import athanor
from athanor import cli
from athanor.core import hub, io
from athanor.recipes import import_model
from tests.test_families import byte_level, made, word_pieces
from tests.tokenizer.test_llama2c import HEAD, learn, write


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def go(*arguments):
        capsys.readouterr()
        status = cli.main(["import", *map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out, " ".join(err.split())

    return go


def test_a_folder(run, tmp_path):
    theirs = made(("gpt2", "tiny"), tmp_path / "theirs", byte_level)
    status, out, err = run(tmp_path / "theirs", "--out", tmp_path / "ours")
    assert (status, err) == (0, "")
    assert f"gpt2: {theirs.num_parameters():,} parameters in float32, tokenizer: its own; in {tmp_path / 'ours'}" in out
    lm = athanor.load(tmp_path / "ours")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(lm.logits(ids), theirs(ids).logits, atol=1e-5, rtol=0)
    assert lm.lineage["source"] == "theirs" and lm.lineage["parent"] is None
    assert run(tmp_path / "theirs", "--out", tmp_path / "half", "--dtype", "bfloat16")[0] == 0
    assert next(athanor.load(tmp_path / "half").model.parameters()).dtype == torch.bfloat16


def test_what_is_there_already_stays(run, tmp_path):
    made(("llama", "tiny"), tmp_path / "theirs")
    assert run(tmp_path / "theirs", "--out", tmp_path / "ours")[0] == 0
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("ours")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("ours", "link", "dangling"):
        status, _, err = run(tmp_path / "theirs", "--out", tmp_path / name)
        assert status == 1 and f"out ({tmp_path / name}) exists already: name another, or remove it" in err
    assert (tmp_path / "ours" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "dangling").is_symlink()


def test_two_imports_to_one_place(run, tmp_path, monkeypatch):
    """The second is refused while the first writes, and when the first was done after the second had looked."""
    made(("llama", "tiny"), tmp_path / "theirs")
    with io.new_place(tmp_path / "ours"):
        status, _, err = run(tmp_path / "theirs", "--out", tmp_path / "ours")
    assert status == 1
    assert f"another process is writing {tmp_path / 'ours'}: wait until it ends, or name another place" in err
    true = import_model.load

    def slow(*args, **kw):
        lm = true(*args, **kw)
        (tmp_path / "ours").mkdir()
        return lm

    monkeypatch.setattr(import_model, "load", slow)
    status, _, err = run(tmp_path / "theirs", "--out", tmp_path / "ours")
    assert status == 1 and "exists already: name another, or remove it" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "theirs"] and not list((tmp_path / "ours").iterdir())


def test_the_next_commands_can_be_pasted(run, tmp_path):
    made(("llama", "tiny"), tmp_path / "theirs", byte_level)
    out = tmp_path / "it's $here now"
    status, said, _ = run(tmp_path / "theirs", "--out", out)
    commands = [shlex.split(line) for line in said.splitlines()[1:]]
    assert status == 0 and commands[:2] == [["athanor", "inspect", str(out)], ["athanor", "verify", str(out)]]
    assert commands[2][:2] == ["python", "-c"] and repr(str(out)) in commands[2][2]


def test_an_encoder_says_what_it_is_good_for(run, tmp_path):
    made(("bert", "tiny"), tmp_path / "bert", word_pieces)
    status, out, _ = run(tmp_path / "bert", "--out", tmp_path / "ours")
    assert status == 0 and ".embed(['a text'])" in out and ".generate(" not in out


def llama2c(folder):
    """A random model of llama2.c and its vocabulary."""
    import struct

    torch.manual_seed(0)
    tokens = [*HEAD, *learn("the heat of the athanor and the hat", 30)]
    dim, hidden, layers, heads, kv, vocab, time = 16, 24, 2, 4, 2, len(tokens), 32
    width = kv * dim // heads
    sizes = [vocab * dim, layers * dim, layers * dim * dim, 2 * layers * width * dim, layers * dim * dim, layers * dim]
    sizes += [3 * layers * hidden * dim, dim, time * dim // heads]
    folder.mkdir()
    header = struct.pack("<7i", dim, hidden, layers, heads, kv, vocab, time)
    (folder / "model.bin").write_bytes(header + torch.randn(sum(sizes)).mul(0.2).numpy().tobytes())
    write(folder / "tok.bin", tokens)
    return folder / "model.bin"


def test_a_llama2c_file(run, tmp_path, monkeypatch):
    path = llama2c(tmp_path / "c")
    monkeypatch.chdir(tmp_path)
    assert run(path)[0] == 0
    lm = athanor.load("runs/model")
    assert lm.prompt_ids("") == [1] and lm.model.token_ids.eos == (2,)
    assert lm.generate("the heat", temperature=0, max_tokens=5) == lm.generate("the heat", temperature=0, max_tokens=5)
    shutil.copy(path.parent / "tok.bin", path.parent / "tok2.bin")
    status, _, err = run(path, "--out", "runs/other")
    assert status == 1 and "has 2 files tok*.bin beside model.bin: say with --tokenizer which one has its vocabulary" in err
    assert run(path, "--tokenizer", path.parent / "tok2.bin", "--out", "runs/other")[0] == 0


def test_a_hub_id(run, tmp_path, monkeypatch):
    made(("llama", "tiny"), tmp_path / "cache")
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda *args, **kw: asked.append((args, kw)) or tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    assert run("org/tiny", "--revision", "v1", "--pickled")[0] == 0
    assert asked == [(("org/tiny", "v1"), {"pickled": True})]
    assert athanor.load("runs/tiny").lineage["source"] == "org/tiny"


def test_pickles_only_when_asked_for(run, tmp_path):
    theirs = made(("llama", "tiny"), tmp_path / "p")
    torch.save(theirs.state_dict(), tmp_path / "p" / "pytorch_model.bin")
    (tmp_path / "p" / "model.safetensors").unlink()
    status, _, err = run(tmp_path / "p", "--out", tmp_path / "o")
    assert status == 1 and "the weights are there only as pickles, which can run any program" in err
    assert run(tmp_path / "p", "--out", tmp_path / "o", "--pickled")[0] == 0
    assert (tmp_path / "o" / "model.safetensors").is_file() and not (tmp_path / "o" / "pytorch_model.bin").exists()


def test_code_in_a_folder_is_never_run(run, tmp_path):
    made(("llama", "tiny"), tmp_path / "m")
    fields = json.loads((tmp_path / "m" / "config.json").read_text())
    fields["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(fields))
    (tmp_path / "m" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert run(tmp_path / "m", "--out", tmp_path / "o")[0] == 0
    assert not (tmp_path / "ran").exists() and not (tmp_path / "o" / "evil.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "o" / "config.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "'nowhere' is neither a folder here nor a model id of the form org/name: check the spelling"),
        (["m", "--tokenizer", "t.bin"], "tokenizer (t.bin) is for llama2.c files, and m is none: leave it out"),
        (["m", "--revision", "v1"], "revision (v1) is for ids of the hub, and m is here: leave it out"),
        (["m", "--out", "./m"], "out (m) is the source itself, which would be lost: name a new folder"),
        (["m", "--out", "other"], "out (other) exists already: name another, or remove it"),
    ],
)
def test_refused(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    made(("llama", "tiny"), tmp_path / "m")
    (tmp_path / "other").mkdir()
    status, _, err = run(*arguments)
    assert status == 1 and message in err
