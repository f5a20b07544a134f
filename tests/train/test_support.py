"""The table of what training supports: every tested pair is run, every refusal is real, the pages are what the code says."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from athanor import cli
from athanor.core.errors import ConfigError
from athanor.report import support as printed
from athanor.train import support
from athanor.train.parallel.base import ALONE
from athanor.train.setup import layout_of, ready
from athanor.train.step import train_step
from tests.train import layouts

DOCS = Path(__file__).resolve().parents[2] / "docs"
STEPS = 2
RATES = {"adamw": 3e-3, "muon": 1e-2, "sgd": 0.3, "adafactor": 1e-2}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def losses(case):
    """Of some steps on one batch, trained as recipes do it."""
    torch.manual_seed(0)
    model, loss, batches = layouts.prepared(case.architecture, case.objective)
    config = support.config_of(case)
    config = replace(config, optim=replace(config.optim, lr=RATES[case.optimizer]))
    layout_of(config)
    batch = batches(0)[:1]
    model, optimizers = ready(model, config, ALONE, loss, batch[0])
    torch.manual_seed(0)
    step = [train_step(model, loss, batch, optimizers, lr_factor=1.0, clip=1.0, precision=case.precision) for _ in range(STEPS)]
    return [result.loss for result in step]


@pytest.mark.parametrize("case", support.alone(), ids=str)
def test_one_process_learns_and_checkpointing_changes_nothing(case):
    found = losses(case)
    assert found[-1] < found[0]
    if case.checkpointing != "none":
        assert found == losses(replace(case, checkpointing="none"))


def test_no_tested_case_is_refused():
    cases = (*support.TESTED, *support.alone())
    assert [(str(case), why) for case in cases if (why := support.refusal(case))] == []
    assert not {case for case in cases if case.parallel and case in support.alone()}


def test_one_process_covers_every_pair_of_what_it_varies():
    axes = {"architecture", "objective", "precision", "optimizer", "checkpointing", "dropout"}
    assert [c for c in support.table() if set(c.axes) <= axes and c.verdict == "untested"] == []


def test_the_table_has_every_pair_once_and_a_reason_for_each_refusal():
    table = support.table()
    assert len({(c.axes, c.values) for c in table}) == len(table)
    assert {frozenset(c.axes) for c in table} == {frozenset((a, b)) for a in support.AXES for b in support.AXES if a != b}
    assert all(bool(c.reason) == (c.verdict == "refused") for c in table)


@pytest.mark.parametrize(
    ("axes", "values", "verdict", "reason"),
    [
        (("architecture", "parallel"), ("llama", "tp=2"), "tested", ""),
        (("architecture", "parallel"), ("gpt2", "hsdp=2x2"), "untested", ""),
        (("architecture", "parallel"), ("gpt2", "pp=2"), "refused", "the blocks of a plain decoder, and gpt2 is none"),
        (("objective", "architecture"), ("masked_lm", "llama"), "refused", "masked_lm trains models of kind encoder"),
        (("objective", "parallel"), ("masked_lm", "pp=2"), "refused", "plain decoder, and bert is none"),
        (("objective", "parallel"), ("seq2seq", "fsdp=2"), "tested", ""),
        (("parallel", "precision"), ("ddp=2,ep=2", "fp16"), "refused", "precision ('fp16') does not go with a CPU"),
        (("parallel", "compile"), ("ddp=2,ep=2", "yes"), "refused", "does not go with several processes (layout ddp=2,ep=2)"),
        (("parallel", "dropout"), ("tp=2", "yes"), "refused", "dropout (0.1) under tp or pp (layout tp=2)"),
        (("parallel", "dropout"), ("ddp=2", "yes"), "untested", ""),
        (("checkpointing", "compile"), ("selective", "yes"), "refused", "selective checkpointing looks at the operations"),
    ],
)  # fmt: skip
def test_some_pairs(axes, values, verdict, reason):
    cell = support.cell(axes, values)
    assert cell.verdict == verdict and reason in cell.reason


def test_reasons_are_those_that_training_gives():
    """What the loop's own checks raise, word by word."""
    with pytest.raises(ConfigError) as error:
        layout_of(replace(support.config_of(support.Case()), parallel="ddp=2", compile=True))
    assert str(error.value) == support.cell(("parallel", "compile"), ("ddp=2", "yes")).reason


def test_larger_layouts_are_of_the_kind_of_smaller_ones():
    assert [support.kind(text) for text in ("fsdp=4", "ddp=4,ep=4", "hsdp=3x2", "pp=4,micro=8", "")] == [
        "fsdp=2", "ddp=2,ep=2", "hsdp=2x2", "pp=2", "",
    ]  # fmt: skip


def test_a_reason_leaves_out_what_row_and_column_say():
    cell = support.cell(("objective", "architecture"), ("masked_lm", "rnn_lm"))
    assert printed.shortened(cell) == "… trains models of kind encoder, and … is of kind decoder"


@pytest.mark.parametrize(("name", "language"), [("support.md", "en"), ("support.zh-CN.md", "zh")])
def test_the_page_is_what_the_code_says(name, language):
    again = f"run: athanor support --markdown {language} > docs/{name}"
    assert (DOCS / name).read_text(encoding="utf-8") == printed.markdown(language), again


def run(capsys, *arguments):
    status = cli.main(["support", *arguments])
    return status, *capsys.readouterr()


def test_the_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    status, out, _ = run(capsys)
    assert status == 0 and "Architectures and objectives" in out and "… learns from rollouts, and pre-training has texts" in out
    status, out, _ = run(capsys, "--of", "arch", "llama")
    assert status == 0 and "one process" in out and "ep deals out experts and llama has none" in out
    assert out.count("multi_token needs mtp_hidden, which a llama has not") == 1
    status, out, _ = run(capsys, "--of", "parallel", "one process", "--json")
    cells = json.loads(out)
    assert {(c["axes"][0], c["values"][0]) for c in cells} == {("parallel", "")}
    assert len(cells) == sum(len(support.values(axis)) for axis in support.AXES if axis != "parallel")
    status, out, _ = run(capsys, "--markdown", "zh")
    assert status == 0 and out == printed.markdown("zh")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--of", "arc hitecture", "llama"), "of ('arc hitecture') must be one of objective, architecture"),
        (("--of", "objective", "masked"), "objective ('masked') must be one of next_token, denoise"),
        (("--markdown", "en", "--json"), "markdown ('en') is the whole page: leave json and of out"),
    ],
)
def test_what_makes_no_sense_is_said(capsys, arguments, message):
    status, _, err = run(capsys, *arguments)
    assert status == 1 and message in " ".join(err.split())
