"""`athanor translate` learns a small language, goes on where it was stopped, and every option changes something."""

import json
import random

import pytest
import torch

import athanor
from athanor import cli
from athanor.core import io
from athanor.recipes import translate
from athanor.train import loop

WORDS = {"Rot": "red", "Blau": "blue", "Haus": "house", "Hund": "dog", "Mann": "man", "Frau": "woman", "Ball": "ball"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Word by word translations of four to six words, in files."""
    folder, chance = tmp_path_factory.mktemp("text"), random.Random(0)
    for name, count in (("train", 400), ("valid", 20), ("test", 8)):
        texts = [chance.choices(list(WORDS), k=chance.randint(4, 6)) for _ in range(count)]
        (folder / f"{name}.de").write_text("".join(" ".join(t) + "\n" for t in texts))
        (folder / f"{name}.en").write_text("".join(" ".join(WORDS[w] for w in t) + "\n" for t in texts))
    return folder


def arguments(text, run, **more):
    sides = {f"{part}{side}": text / f"{name}.{end}" for part, name in (("", "train"), ("valid-", "valid"))
             for side, end in (("source", "de"), ("target", "en"))}  # fmt: skip
    shape = {"shape.d-model": 32, "shape.n-layers": 1, "shape.n-heads": 2, "shape.d-ff": 64}
    options = {"vocab-size": 320, "batch-tokens": 512, "precision": "fp32", "max-tokens": 32, "epochs": 1, "search.beams": 1}
    given = {**sides, **shape, **options, **{name.replace("__", ".").replace("_", "-"): v for name, v in more.items()}}
    return ["translate", str(run), *(f"--{name}" if v is True else f"--{name}={v}" for name, v in given.items())]


def trained(text, run, **more):
    """The record of a run."""
    assert cli.main(arguments(text, run, **more)) == 0
    return io.read_json(run / "stages" / "translate.json")


@pytest.fixture(scope="module")
def learned(text, tmp_path_factory):
    run = tmp_path_factory.mktemp("learned") / "run"
    sides = {"test_source": text / "test.de", "test_target": text / "test.en"}
    return run, trained(text, run, epochs=25, optim__lr=0.01, dropout=0, search__beams=3, **sides), sides


def test_it_learns_to_translate(learned, text, capsys):
    run, record, sides = learned
    assert record["pairs"] == 400 and record["dropped"] == {"train": {"empty": 0, "long": 0}, "valid": {"empty": 0, "long": 0}}
    losses = [r["heldout_loss"] for r in record["curve"] if "heldout_loss" in r]
    assert len(losses) == 25 and losses[-1] < 0.2 < losses[0]
    assert set(record["bleu"]) == {"valid", "test"}
    assert record["bleu"]["valid"]["value"] > 90 and record["bleu"]["valid"]["open"] == 0
    written = (run / "translations" / "test.txt").read_text().splitlines()
    assert len(written) == 8
    assert cli.main(arguments(text, run, epochs=25, optim__lr=0.01, dropout=0, search__beams=3, **sides)) == 0  # done: only told
    out = capsys.readouterr().out
    for name in ("valid", "test"):
        b = record["bleu"][name]
        assert f"{name}: BLEU {b['value']:.2f} [{b['low']:.2f}, {b['high']:.2f}] nrefs:1|bs:1000|" in out
        assert f"0 translations without an end; all in translations/{name}.txt" in out
    source, ours, reference = record["bleu"]["test"]["examples"][0]
    assert f"source       {source}\n    translation  {ours}\n    reference    {reference}\n" in out and ours == written[0]


def test_the_model_is_one_like_others(learned, text):
    run, record, _ = learned
    lm = athanor.load(run, "translate")
    written = (run / "translations" / "test.txt").read_text().splitlines()
    sources = (text / "test.de").read_text().splitlines()
    assert [lm.generate(source, beams=3, max_tokens=31).strip() for source in sources] == written
    assert lm.model.n_parameters() == record["parameters"]


def test_stopped_and_started_again_it_is_the_same(text, tmp_path, monkeypatch):
    """Law L4: weights bit by bit, with dropout."""
    whole = trained(text, tmp_path / "whole", epochs=2)
    original, calls = loop.gradients, []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 12:
            raise MemoryError("stopped")
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "gradients", stop)
    with pytest.raises(MemoryError, match="stopped"):
        cli.main(arguments(text, tmp_path / "run", epochs=2, save_seconds=0))
    assert not (tmp_path / "run" / "translate").exists()
    calls.append(1)
    again = trained(text, tmp_path / "run", epochs=2, save_seconds=0)
    assert len(calls) < 12 + whole["steps"]  # it went on
    weights = [io.load_tensors(tmp_path / run / "translate" / "model.safetensors") for run in ("whole", "run")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert [r["loss"] for r in whole["curve"]] == [r["loss"] for r in again["curve"]]
    assert not (tmp_path / "run" / "state" / "translate").exists()


@pytest.fixture(scope="module")
def plain(text, tmp_path_factory):
    return trained(text, tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize(
    "more",
    [
        {"lower": True},
        {"vocab_size": 300},
        {"max_tokens": 7},
        {"arch": "bart"},
        {"batch_tokens": 300},
        {"dropout": 0.5},
        {"precision": "bf16"},
        {"seed": 1},
        {"shape__n_layers": 2},
        {"objective__smoothing": 0.3},
        {"optim__name": "adamw"},
        {"schedule__name": "inverse_sqrt"},
    ],
    ids=str,
)
def test_every_option_changes_the_training(text, tmp_path, plain, more):
    record = trained(text, tmp_path / "run", **more)
    assert [r["loss"] for r in record["curve"]] != [r["loss"] for r in plain["curve"]]


@pytest.mark.parametrize(
    "more",
    [
        {"search__beams": 4},
        {"search__ratio": 0.01},
        {"search__length_penalty": 9.0, "search__beams": 4},
        {"search__tokenize": "char"},
    ],
    ids=str,
)
def test_every_option_changes_the_translations(text, tmp_path, plain, more):
    record = trained(text, tmp_path / "run", **more)
    assert [r["loss"] for r in record["curve"]] == [r["loss"] for r in plain["curve"]]
    if "search__tokenize" in more:
        assert record["bleu"]["valid"]["signature"] != plain["bleu"]["valid"]["signature"]
    else:
        assert record["bleu"]["valid"]["examples"] != plain["bleu"]["valid"]["examples"]


@pytest.mark.parametrize("arch", ["t5", "pegasus"])
def test_other_architectures_and_one_file(text, tmp_path, arch, capsys):
    both = zip((text / "train.de").read_text().splitlines(), (text / "train.en").read_text().splitlines(), strict=True)
    rows = [{"source": a, "target": b} for a, b in both]
    rows += [{"source": "", "target": "x"}, {"source": "Rot " * 99, "target": "red"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [a for a in arguments(text, tmp_path / "run", arch=arch) if not a.startswith(("--source", "--target"))]
    assert cli.main([*given, f"--source={tmp_path / 'train.jsonl'}"]) == 0
    assert "train: 400 pairs; left out: 1 with an empty side, 1 with a side that is too long" in capsys.readouterr().out
    record = io.read_json(tmp_path / "run" / "stages" / "translate.json")
    assert record["dropped"]["train"] == {"empty": 1, "long": 1}
    assert athanor.load(tmp_path / "run", "translate").model.model_type == arch


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"epochs": 0}, "epochs (0) must be at least 1, max_tokens (32) at least 2"),
        ({"max_tokens": 1}, "epochs (1) must be at least 1, max_tokens (1) at least 2"),
        ({"arch": "llama"}, "arch ('llama') is no encoder-decoder but of the kind 'decoder': use transformer"),
        ({"arch": "trasformer"}, "did you mean 'transformer'"),
        ({"search__tokenize": "x"}, "tokenize ('x') must be one of sacrebleu's"),
        ({"test_target": "x"}, "test_target (x) has no test_source: give both sides"),
        ({"dropout": 1.0}, "dropout (1.0) must lie in [0, 1)"),
        ({"target": "nowhere"}, "nowhere cannot be read"),
    ],
    ids=str,
)
def test_refused(text, tmp_path, capsys, more, words):
    assert cli.main(arguments(text, tmp_path / "run", **more)) == 1
    assert words in " ".join(capsys.readouterr().err.split())


def test_other_settings_are_refused(learned, text, capsys):
    run, _, sides = learned
    more = {"epochs": 25, "optim__lr": 0.01, "dropout": 0, "search__beams": 3, **sides}
    assert cli.main(arguments(text, run, **(more | {"seed": 9}))) == 1
    assert "already has stage 'translate', done with other seed" in " ".join(capsys.readouterr().err.split())


def test_the_default_is_the_published_shape():
    shape = translate.Shape()
    assert (shape.n_layers, shape.d_model, shape.n_heads, shape.d_ff) == (3, 256, 8, 512)
