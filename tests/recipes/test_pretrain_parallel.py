"""`athanor pretrain --parallel`: one command starts the processes, which save the model of one; a dead one is replaced."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from athanor.cli import main
from athanor.core.io import load_tensors

TEXT = "The cat sat on the mat and counted {} of its {} toes. "
SIZES = {"d-model": 32, "n-layers": 2, "n-heads": 2, "n-kv-heads": 1, "d-ff": 48}
MODEL = ("--context", "32", "--skill-share", "0", *(x for k, v in SIZES.items() for x in (f"--shape.{k}", str(v))))
SMALL = ("--batch-tokens", "512", "--precision", "fp32", *MODEL)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run folders with a corpus and a tokenizer, a new one for each call."""
    folder = tmp_path_factory.mktemp("runs")
    texts = folder / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i}.txt").write_text("".join(TEXT.format(i * k, k) for k in range(60)), encoding="utf-8")

    def make(name):
        out = folder / name
        assert main(["corpus", str(out), "--text", str(texts), "--heldout-fraction", "0.1"]) == 0
        assert main(["tokenizer", str(out), "--vocab-size", "300", "--skills", "0"]) == 0
        return out

    return make


def command(run, *options):
    return [sys.executable, "-m", "athanor", "pretrain", str(run), *SMALL, *options]


def weights(run):
    return load_tensors(run / "base" / "model.safetensors")


def records(run):
    return [json.loads(line) for line in (run / "logs" / "pretrain.jsonl").read_text().splitlines()]


def test_two_processes_save_the_model_of_one(run):
    alone, both = run("alone"), run("both")
    assert main(["pretrain", str(alone), *SMALL, "--steps", "6"]) == 0
    done = subprocess.run(
        command(both, "--steps", "6", "--parallel", "fsdp=2", "--detail", "2"), env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pretrain: ") == 1  # one of them speaks
    one, two = weights(alone), weights(both)
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-4
    losses = [[r["loss"] for r in records(folder)] for folder in (alone, both)]
    assert len(losses[1]) == 6 and max(abs(a - b) for a, b in zip(*losses, strict=True)) <= 1e-5
    last = records(both)[-1]
    assert 0 < last["communication_share"] < 1 and last["heldout_loss"] > 0
    assert not (both / "state" / "pretrain").exists()


@pytest.mark.slow
def test_a_process_that_dies_is_replaced_and_the_run_goes_on(run):
    whole, killed = run("whole"), run("killed")
    options = ("--steps", "60", "--parallel", "ddp=2", "--save-seconds", "0")
    subprocess.run(command(whole, *options), env=ENVIRONMENT, capture_output=True, check=True)
    with subprocess.Popen(
        command(killed, *options), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        log, victim = killed / "logs" / "pretrain.jsonl", None
        while victim is None:
            assert process.poll() is None, process.stderr.read().decode()
            if log.exists() and len(log.read_bytes().splitlines()) >= 10:
                victim = int(subprocess.check_output(["pgrep", "-P", str(process.pid)]).split()[-1])
            time.sleep(0.05)
        os.kill(victim, signal.SIGKILL)
        said = process.stderr.read().decode()
        assert process.wait() == 0, said
    first, second = weights(whole), weights(killed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [r["step"] for r in records(killed)] == list(range(1, 61))
    assert [r["loss"] for r in records(killed)] == [r["loss"] for r in records(whole)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--parallel", "dpp=2"), "unknown part 'dpp'"),
        (("--parallel", "tp=2", "--dropout", "0.1"), "dropout (0.1) under tp or pp (layout tp=2)"),
        (("--parallel", "tp=2", "--optim.name", "adafactor"), "whose parts layout tp=2 reorders"),
        (("--parallel", "ddp=2", "--compile"), "compile does not go with several processes (layout ddp=2) yet"),
        (("--parallel", "ddp=2", "--precision", "bf16-pure"), "precision 'bf16-pure' is for one process and the layout is ddp=2"),
        (("--precision", "fp16"), "precision ('fp16') does not go with a CPU"),
        (("--objective", "masked_lm"), "objective 'masked_lm' does not fit this model"),
        (("--arch", "llama:llama-3-80b"), "llama has no preset 'llama-3-80b'"),
        (("--shape.d-modl", "3"), "unknown field 'd_modl'; did you mean 'd_model'?"),
        (("--options.smothing", "0.1"), "smothing"),
        (("--keep", "0"), "keep (0) must be at least 1"),
        (("--steps", "0"), "steps (0) must be at least 1"),
        (("--batch-tokens", "8"), "batch_tokens (8) / accumulate (1) must hold a row of context (32) tokens"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_starts(run, options, words, capsys, request):
    folder = request.getfixturevalue("refused")
    assert main(["pretrain", str(folder), *MODEL, *options]) in (1, 2)
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def refused(run):
    return run("refused")
