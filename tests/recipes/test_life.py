"""A whole tiny life: every stage, its report, its resume after kill -9, and what it says to bad input."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import athanor
from athanor.cli import main as athanor_cli
from athanor.core import io
from athanor.recipes.report import gather
from athanor.report.data import validate
from athanor.train.plan import Plan

PLAN = Plan(
    minutes=1.0,
    precision="fp32",
    threads=1,
    flops=1e9,
    tokens_per_second=1e3,
    parameters=1,
    shape={"d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64},
    vocab_size=400,
    tokenizer_sample=100_000,
    context=64,
    batch_tokens=512,
    pretrain_steps=6,
    sft_steps=6,
    grpo_steps=3,
    prompts=4,
    group=4,
    problems=28,
    heldout_fraction=0.2,
    seconds={},
)
CHECKPOINTS = ("base", "sft", "rl", "int8", "int4")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of text: this repository's own sources, 400 kB of them at most."""
    folder = tmp_path_factory.mktemp("text")
    size = 0
    for path in sorted((Path(athanor.__file__).parent).rglob("*.py")):
        content = path.read_text(encoding="utf-8")
        if content and size < 400_000:
            (folder / f"{len(list(folder.iterdir()))}.py").write_text(content, encoding="utf-8")
            size += len(content)
    return folder


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    io.write_json(path, asdict(PLAN))
    return path


@pytest.fixture(scope="module")
def life(tmp_path_factory, text, plan):
    out = tmp_path_factory.mktemp("life") / "run"
    assert athanor_cli(["run", "--out", str(out), "--plan", str(plan), "--text", str(text)]) == 0
    return out


def weights(folder):
    return {name: io.load_tensors(folder / name / "model.safetensors") for name in ("base", "sft", "rl")}


def same(a, b):
    return all(torch.equal(a[c][k], b[c][k]) for c in a for k in a[c])


def test_report_has_every_stage_and_checkpoint(life):
    report = io.read_json(life / "report.json")
    validate(report)
    names = [s["name"] for s in report["stages"]]
    assert names[:4] == ["plan", "corpus", "tokenizer", "pretrain"]
    assert names[-1] == "report"
    assert set(report["ladder"]) == set(CHECKPOINTS)
    for rung in report["ladder"].values():
        assert rung["accuracy"]["n"] == PLAN.problems
        assert rung["bits_per_byte"] > 0
    assert report["bits_per_byte"]["model"] == report["ladder"]["base"]["bits_per_byte"]
    assert set(report["bits_per_byte"]) == {"model", "gzip", "bz2", "xz"}
    assert len(report["curves"]["grpo"]) == PLAN.grpo_steps
    assert (life / "report.html").stat().st_size > 10_000


def test_rollouts_are_the_trainers(life):
    for record in io.read_json(life / "report.json")["curves"]["grpo"]:
        assert record["ratio_gap"] < 1e-5  # law L6 at every step


def test_lineage_leads_from_every_checkpoint_to_the_corpus(life):
    lineage = io.read_json(life / "report.json")["lineage"]
    assert [lineage[c]["parent"] for c in CHECKPOINTS] == [None, "base", "sft", "rl", "rl"]
    corpus = io.sha256_file(life / "corpus" / "train.jsonl")
    for checkpoint in CHECKPOINTS:
        assert lineage[checkpoint]["corpus"] == corpus
        assert lineage[checkpoint]["weights"] == io.sha256_file(life / checkpoint / "model.safetensors")


def test_the_public_face_opens_a_run(life):
    lm = athanor.load(life)
    assert lm.path == life / "rl"
    assert isinstance(lm.generate("def ", max_tokens=4), str)
    assert isinstance(lm.generate([{"role": "user", "content": "1+1?"}], temperature=0.0, max_tokens=8), str)
    assert lm.logits([[1, 2, 3]]).shape == (1, 3, lm.tokenizer.vocab_size)


def test_a_finished_life_started_again_changes_nothing(life, plan, text):
    before = weights(life)
    assert athanor_cli(["run", "--out", str(life), "--plan", str(plan), "--text", str(text)]) == 0
    assert same(before, weights(life))


def test_a_life_with_other_settings_is_refused(life, plan, text, capsys):
    assert athanor_cli(["run", "--out", str(life), "--plan", str(plan), "--text", str(text), "--seed", "1"]) == 1
    assert "other seed" in " ".join(capsys.readouterr().err.split())


def test_a_stage_with_other_settings_is_refused(life, capsys):
    assert athanor_cli(["tokenizer", str(life), "--vocab-size", "500"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "already has stage 'tokenizer'" in said
    assert "vocab_size" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--minutes", "0"], "minutes (0.0) must be above 0"),
        (["run", "--minutes", "0.1"], "give 1 or more"),
        (["run", "--minuts", "3"], "--minutes"),
        (["rnu"], "did you mean 'run'"),
        (["sft", "{new}"], "has not done stage 'pretrain'"),
        (["eval", "{new}"], "not a folder"),
        (["grpo", "{new}", "--group", "1"], "group (1) must be at least 2"),
        (["grpo", "{new}", "--temperature", "0"], "temperature (0.0) must be above 0"),
        (["pretrain", "{new}", "--skill-share", "1"], "skill_share (1.0) must lie in [0, 1)"),
        (["sft", "{new}", "--replay", "1.5"], "replay (1.5) must lie in [0, 1)"),
        (["tokenizer", "{new}", "--sample", "0"], "sample (0) must be at least 1 character"),
        (["report", "{new}"], "life.json"),
    ],
)
def test_bad_input_is_named(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status = athanor_cli([a.replace("{new}", str(tmp_path / "new")) for a in arguments])
    said = " ".join(capsys.readouterr().err.split())
    assert status in (1, 2)
    assert words in said


def test_a_folder_that_is_no_run_is_left_alone(tmp_path, plan, capsys):
    (tmp_path / "precious.txt").write_text("mine")
    assert athanor_cli(["run", "--out", str(tmp_path), "--plan", str(plan)]) == 1
    assert "is not a run folder" in " ".join(capsys.readouterr().err.split())
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_a_run_of_another_version_is_refused(tmp_path, plan, capsys):
    io.write_json(tmp_path / "run.json", {"format": 99})
    assert athanor_cli(["run", "--out", str(tmp_path), "--plan", str(plan)]) == 1
    assert "another version of athanor (format 99" in " ".join(capsys.readouterr().err.split())


def test_a_report_without_evaluations_is_refused(tmp_path, capsys):
    io.write_json(tmp_path / "life.json", {})
    assert athanor_cli(["report", str(tmp_path)]) == 1
    assert "no evaluated checkpoint" in " ".join(capsys.readouterr().err.split())


def test_a_report_of_an_unfinished_life_leaves_out_what_is_not_there(life, tmp_path):
    for name in ("life.json", "run.json"):
        (tmp_path / name).write_bytes((life / name).read_bytes())
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "base.json").write_bytes((life / "eval" / "base.json").read_bytes())
    report = gather(tmp_path)
    validate(report)
    assert set(report["ladder"]) == {"base"}


@pytest.mark.slow
def test_killed_at_random_moments_a_life_ends_with_the_same_weights(tmp_path, text, plan):
    """Law L4 over the whole life: kill -9 at 20 random moments, started again each time."""
    longer = replace(PLAN, pretrain_steps=60, sft_steps=60, grpo_steps=20)
    plan = tmp_path / "plan.json"
    io.write_json(plan, asdict(longer))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def command(out):
        options = ["--out", str(out), "--plan", str(plan), "--text", str(text), "--save-seconds", "0.3"]
        return [sys.executable, "-m", "athanor", "run", *options]

    start = time.monotonic()
    subprocess.run(command(tmp_path / "whole"), check=True, env=environment, capture_output=True)
    whole = time.monotonic() - start
    rng = random.Random(0)
    kills = lives = 0
    while kills < 20:
        out = tmp_path / f"killed-{lives}"
        lives += 1
        while True:
            process = subprocess.Popen(command(out), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            try:
                process.wait(timeout=rng.uniform(0.3, 1.0) * whole)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
                continue
            assert process.returncode == 0, process.stderr.read().decode()
            process.communicate()
            break
        assert same(weights(tmp_path / "whole"), weights(out))
        for stage in ("pretrain", "sft", "grpo"):
            logged = [
                [json.loads(line)["loss"] for line in (run / "logs" / f"{stage}.jsonl").read_text().splitlines()]
                for run in (tmp_path / "whole", out)
            ]
            assert logged[0] == logged[1]
