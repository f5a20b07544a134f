"""bench/train.py measures what it says; how fast anything is, is not asked here."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import count, cycle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from athanor.core.errors import VerificationError
from athanor.models import llama
from athanor.recipes import pretrain
from athanor.tokenizer.chat import Rendered

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
SCRIPT = Path(__file__).parents[2] / "bench" / "train.py"


@pytest.fixture(scope="module")
def bench():
    """The script and its parts; they are no installed modules."""
    parts = ("rounds", "sides", "trainer", "conversations", "pretraining", "footprint", "tuning")
    names = {"train": "train"} | {part: f"training.{part}" for part in parts}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield SimpleNamespace(**{key: importlib.import_module(name) for key, name in names.items()})
    for name in (*names.values(), "training"):
        del sys.modules[name]


def measured(out, *options):
    """What the script printed and wrote; in a process of its own, with warnings of others allowed."""
    command = [sys.executable, str(SCRIPT), "--shapes", "tiny", "--seconds", "0.01", *options, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


@pytest.mark.slow
def test_the_tiny_shape_from_end_to_end(tmp_path):
    shown, found = measured(tmp_path / "train.json", "--rounds", "2", "--cpu-time")
    assert found["cpu_time"]
    assert found["machine"]["threads"] == 1
    assert found["machine"]["transformers"]
    memory = found["memory"]["tiny"]
    assert memory["bytes"].keys() == {"athanor", "Trainer"}
    assert memory["ratio"] == memory["bytes"]["athanor"] / memory["bytes"]["Trainer"] > 0
    pretraining = found["pretraining"]["tiny"]
    assert pretraining["tokens_per_step"] == 256
    assert pretraining["tokens_per_second"].keys() == {"athanor", "Trainer"}
    assert pretraining["loss"]["athanor"] == pytest.approx(pretraining["loss"]["transformers"], abs=1e-3)
    sets = found["tuning"]["tiny"]
    assert sets.keys() == {"skills", "ragged, 16..400 tokens"}
    for r in (pretraining, *sets.values()):
        for side, rates in r["tokens_per_second"].items():
            assert len(rates) == 2, side
            assert all(rate > 0 for rate in rates), side
            assert side in shown
        assert r["ratio_to_best"][r["best_peer"]] == 1.0
    for r in sets.values():
        assert 16 <= r["mean_length"] <= 400
        assert 0 < r["padding_of_eight"] < 1
        assert r["ratio"]["Trainer, its batch of 8"] == 1.0


@pytest.mark.slow
def test_compiled_contenders_are_added_where_asked(tmp_path):
    shown, found = measured(tmp_path / "train.json", "--rounds", "1", "--parts", "pretraining", "--compiled")
    r = found["pretraining"]["tiny"]
    assert r["first_step_seconds"].keys() == {"athanor, compiled", "Trainer, torch_compile"}
    assert r["first_step_seconds"].keys() < r["tokens_per_second"].keys()
    assert all(seconds > 0 for seconds in r["first_step_seconds"].values())
    assert shown.count("first step") == 3  # of each, and its loss
    assert "tuning" not in found


def test_different_weights_are_no_comparison(bench, monkeypatch):
    theirs = bench.sides.their_model
    monkeypatch.setattr(bench.pretraining, "their_model", lambda config, ours: theirs(config))
    with pytest.raises(VerificationError, match=r"the loss of the first step is \d.* here and \d.* in transformers"):
        bench.pretraining.pretraining(
            bench.train.SHAPES["tiny"], "fp32", bench.rounds.Timing(0.01, 1), compiled=False, tuned=False
        )


def test_one_mask_wrong_is_no_comparison(bench):
    """Packed and padded losses agree on the same conversations, and do not when the labels of one side differ."""
    from transformers import DataCollatorForSeq2Seq

    class Pads:
        padding_side = "right"

        def pad(self, features, **_):
            longest = max(len(f["input_ids"]) for f in features)
            rows = [f["input_ids"] + [0] * (longest - len(f["input_ids"])) for f in features]
            mask = [[1] * len(f["input_ids"]) + [0] * (longest - len(f["input_ids"])) for f in features]
            return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}

    config = bench.train.SHAPES["tiny"].config
    ours = bench.sides.our_model(config)
    theirs = bench.sides.their_model(config, ours)
    conversations = bench.conversations.ragged(config.vocab_size, 8)
    collator = DataCollatorForSeq2Seq(Pads())
    bench.tuning.same_loss(ours, theirs, conversations, collator)
    everything = [Rendered(c.ids, [True] * len(c.ids)) for c in conversations]
    with pytest.raises(VerificationError, match="the loss of 8 conversations"):
        bench.tuning.same_loss(ours, theirs, conversations, lambda _: collator(bench.conversations.records(everything)))


def test_flattened_sequences_do_not_see_each_other_and_must_not(bench):
    """transformers' loss of flattened conversations is ours; without their positions it is another and is refused."""
    from transformers import DataCollatorWithFlattening

    config = bench.train.SHAPES["tiny"].config
    ours = bench.sides.our_model(config)
    theirs = bench.sides.their_model(config, ours)
    conversations = bench.conversations.ragged(config.vocab_size, 8)
    bench.tuning.same_loss(ours, theirs, conversations, DataCollatorWithFlattening())
    blind = DataCollatorWithFlattening(return_position_ids=False)
    with pytest.raises(VerificationError, match="the loss of 8 conversations"):
        bench.tuning.same_loss(ours, theirs, conversations, blind)


def test_trainers_batches_are_whole_and_of_its_own_grouping(bench):
    found = bench.conversations.records(bench.conversations.ragged(512, 100))
    spread = {}
    for grouped in (False, True):
        batches = bench.tuning.batches_of(found, 8, grouped)
        assert [len(b) for b in batches] == [8] * 12
        assert len({id(r) for b in batches for r in b}) == 96
        sizes = [[len(r["input_ids"]) for r in b] for b in batches]
        spread[grouped] = sum(max(s) - min(s) for s in sizes)
        assert sizes != sorted(sizes, key=max, reverse=True)
    assert spread[True] < spread[False] / 2


def test_rounds_of_trainer_go_on_where_the_last_one_ended(bench, tmp_path):
    config = bench.train.SHAPES["tiny"].config
    batches = [[{"input_ids": [i] * (i + 2), "labels": [i] * (i + 2)}] for i in range(40)]
    seen = []

    def collate(features):
        seen.append(features[0]["input_ids"][0])
        return bench.trainer.by_position(features)

    firsts = []
    run = bench.trainer.trainer(
        bench.sides.their_model(config), batches, collate, str(tmp_path), time.perf_counter, firsts=firsts
    )
    assert run(0.0) > 0
    assert seen[:3] == [0, 1, 2]
    seen.clear()
    assert run(0.0) > 0
    assert seen[:3] == [3, 4, 5]
    assert len(firsts) == 2


def test_nan_agrees_with_nothing(bench):
    bench.sides.agree("x", 1.0, 1.0005, 1e-3)
    for value in (1.002, float("nan")):
        with pytest.raises(VerificationError, match=r"must agree within 0.001"):
            bench.sides.agree("x", 1.0, value, 1e-3)


def test_turns_are_taken_forwards_and_backwards(bench):
    seen = []
    contenders = {name: lambda seconds, name=name: seen.append((name, seconds)) or len(seen) for name in "ab"}
    rates = bench.rounds.take_turns(contenders, bench.rounds.Timing(10.0, 5))
    assert "".join(name for name, _ in seen) == "abbaabbaab"
    assert {seconds for _, seconds in seen} == {2.0}
    assert rates == {"a": [1, 4, 5, 8, 9], "b": [2, 3, 6, 7, 10]}


def test_the_ratio_is_the_median_of_the_rounds(bench):
    assert bench.rounds.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0


def test_the_first_step_of_a_round_is_not_counted(bench):
    steps = []
    run = bench.rounds.repeated(lambda: steps.append(0) or 10, partial(next, count()))
    assert run(3.0) == pytest.approx(20 / 3)  # two steps seen in three ticks
    assert len(steps) == 3


def test_a_step_is_filled_with_whole_conversations(bench):
    conversations = [Rendered([1] * n, [True] * n) for n in (5, 6, 7)]
    order = cycle(conversations)
    assert [len(c.ids) for c in bench.conversations.filled(12, order)] == [5, 6, 7]
    assert [len(c.ids) for c in bench.conversations.filled(5, order)] == [5]
    assert [len(c.ids) for c in bench.conversations.eight(order)] == [6, 7, 5, 6, 7, 5, 6, 7]


def test_the_12m_shape_has_12_6_million_parameters(bench):
    with torch.device("meta"):
        assert llama.Model(bench.train.SHAPES["12m"].config).n_parameters() == 12_587_264


def test_the_124m_shape_has_124_3_million_parameters(bench):
    shape = bench.train.SHAPES["124m"]
    with torch.device("meta"):
        assert llama.Model(shape.config).n_parameters() == 124_275_456
    assert shape.config.vocab_size == bench.footprint.VOCABULARY


def test_the_life_shape_is_the_recipes_default(bench):
    default, shape = pretrain.Config(Path()), bench.train.SHAPES["life"]
    assert default.arch == "llama"
    assert shape.config == replace(llama.Config(shape.config.vocab_size), **default.shape)
    assert (shape.length, shape.tokens) == (default.context, default.batch_tokens)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--seconds", "0"], "--seconds (0) must be above 0: 5 is usual"),
        (["--rounds", "0"], "--rounds (0) must be above 0: 5 is usual"),
        (
            ["--compiled", "--parts", "tuning", "memory"],
            "--compiled is about pretraining, and --parts has only tuning and memory: leave one away",
        ),
    ],
)
def test_options_that_make_no_sense_are_errors(bench, capsys, argv, told):
    assert bench.train.main(argv) == 1
    assert told in capsys.readouterr().err


def test_a_missing_peer_is_named(bench, capsys, monkeypatch):
    monkeypatch.setattr(bench.train.importlib.util, "find_spec", lambda name: None if name == "accelerate" else object())
    assert bench.train.main([]) == 1
    assert "accelerate not installed, to compare with: pip install 'athanor-lm[dev]'" in capsys.readouterr().err
