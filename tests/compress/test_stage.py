"""The stage: quantise, save, read back, compare (law L7), and nothing lost on the way; and the recipe around it."""

import json

import pytest
import torch

import athanor
from athanor.cli import main
from athanor.compress import stage
from athanor.core.errors import CheckpointError, ConfigError, VerificationError
from athanor.lm import MANIFEST
from athanor.models import io


@pytest.fixture
def source(lm, tmp_path):
    """The folder of a plain model in a run folder."""
    return lm.save(tmp_path / "run" / "rl", corpus="cafe")


@pytest.mark.parametrize(("bits", "group", "size"), [(8, None, None), (8, 32, 32), (4, None, 32)])
def test_figures_and_lineage(source, bits, group, size, tmp_path):
    lm, out = athanor.load(source), tmp_path / "run" / "small"
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    r = stage.run(lm, bits, group, out, "rl", athanor.load)
    assert json.loads(json.dumps(r)) == r
    assert (r["bits"], r["group"], r["parent"], r["logit_difference"]) == (bits, size, "rl", 0.0)
    assert r["bytes_before"] == sum(p.nbytes for p in lm.model.parameters())
    file = (out / io.WEIGHTS).stat().st_size
    assert r["bytes_after"] < file < r["bytes_after"] + 20_000  # the header
    assert 0 < r["mean_error"] < r["max_error"] < (0.1 if bits == 4 else 0.01)
    lineage = json.loads((out / MANIFEST).read_text())["lineage"]
    assert lineage["parent"] == "rl" and lineage["corpus"] == "cafe"
    assert lineage["quantisation"] == {"bits": bits, "group": size}
    # The model that was given is as it was.
    assert all(torch.equal(v, before[k]) for k, v in lm.model.state_dict().items())
    assert athanor.load(source).logits([[1, 2, 3]]).equal(lm.logits([[1, 2, 3]]))
    assert athanor.load(out).generate("The", max_tokens=4, temperature=0) is not None


def test_a_folder_that_reads_back_differently_is_an_error_and_is_removed(source, tmp_path):
    out = tmp_path / "run" / "int8"

    def load(path):
        lm = athanor.load(path)
        lm.model.blocks[0].attention.out.weight_int8[0] += 1
        return lm

    with pytest.raises(
        VerificationError, match=r"int8 read back gives logits that differ by .* only 1e-05 .*the folder was removed"
    ):
        stage.run(athanor.load(source), 8, None, out, "rl", load)
    assert not out.exists()
    assert athanor.load(source)


def test_logits_that_are_no_numbers_are_no_agreement(source, tmp_path):
    def load(path):
        lm = athanor.load(path)
        with torch.no_grad():
            lm.model.norm.weight.fill_(torch.nan)
        return lm

    with pytest.raises(VerificationError, match="differ by nan"):
        stage.run(athanor.load(source), 8, None, tmp_path / "int8", "rl", load)


def test_a_folder_that_cannot_be_read_back_is_an_error_and_is_removed(source, tmp_path):
    def load(path):
        raise CheckpointError("the file is damaged")

    with pytest.raises(VerificationError, match="int8 cannot be read back and was removed: the file is damaged"):
        stage.run(athanor.load(source), 8, None, tmp_path / "int8", "rl", load)
    assert not (tmp_path / "int8").exists()


def test_what_would_be_lost_is_not_overwritten(source, lm, tmp_path):
    given = athanor.load(source)
    with pytest.raises(ConfigError, match=r"out \(.*rl\) is the folder of the model itself: choose another"):
        stage.run(given, 8, None, source, "rl", athanor.load)
    other = lm.save(tmp_path / "run" / "sft")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("mine")
    for out in (other, notes, notes / "a.txt"):
        with pytest.raises(ConfigError, match=r"exists and is not the folder of a quantised model: choose another, or move"):
            stage.run(given, 8, None, out, "rl", athanor.load)
    assert athanor.load(other) and (notes / "a.txt").read_text() == "mine"


def test_an_empty_folder_and_an_older_result_are_replaced(source, tmp_path):
    given, out = athanor.load(source), tmp_path / "small"
    out.mkdir()
    for bits in (8, 4):
        stage.run(given, bits, None, out, "rl", athanor.load)
        assert athanor.load(out).lineage["quantisation"]["bits"] == bits


@pytest.mark.parametrize(("bits", "share"), [(8, "28%"), (4, "21%")])
def test_the_command_writes_beside_the_checkpoint_and_says_what_it_cost(source, bits, share, capsys):
    assert main(["quantize", str(source), "--bits", str(bits)]) == 0
    out = source.parent / f"int{bits}"
    said = capsys.readouterr().out
    assert f"rl: {bits} bits, " in said and f"read back from {out}, logits differ by 0e+00" in said
    before = sum(t.nbytes for t in athanor.load(source).model.state_dict().values())
    assert f" {before:,} -> " in said
    assert athanor.load(source.parent, f"int{bits}").lineage["parent"] == "rl"


def test_the_command_replaces_its_own_result_and_no_other(source, lm, capsys):
    for _ in range(2):
        assert main(["quantize", str(source)]) == 0
    said = capsys.readouterr().out
    assert said.count("it replaces the one that was there") == 1
    other, out = lm.save(source.parent / "sft"), source.parent / "int8"
    assert main(["quantize", str(other)]) == 1
    err = " ".join(capsys.readouterr().err.split())
    assert f"out ({out}) exists and was made of 'rl', not of 'sft': name another with --out, or remove it" in err
    assert athanor.load(out).lineage["parent"] == "rl"


def test_the_command_takes_a_run_folder_and_a_place_for_the_result(source, tmp_path, capsys):
    args = ["quantize", str(source.parent), "--checkpoint", "rl", "--bits", "8", "--group", "32", "--out", str(tmp_path / "x")]
    assert main(args) == 0
    assert "8 bits, groups of 32: " in capsys.readouterr().out
    assert athanor.load(tmp_path / "x").lineage["quantisation"] == {"bits": 8, "group": 32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "3"], "bits is 3 but must be 8 or 4"),
        (["--bits", "16"], "bits is 16 but must be 8 or 4"),
        (["--group", "5"], "group is 5 but must be 32, 64 or 128"),
    ],
)
def test_the_command_refuses_what_there_is_not(source, options, message, capsys):
    assert main(["quantize", str(source), *options]) == 1
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in source.parent.iterdir()) == ["rl"]


def test_the_command_refuses_a_quantised_model(source, capsys):
    assert main(["quantize", str(source)]) == 0
    assert main(["quantize", str(source.parent / "int8"), "--bits", "4"]) == 1
    assert "the model is quantised to 8 bits already: start from the checkpoint that it was made from" in capsys.readouterr().err
