"""bench/train.py measures what it says; how fast anything is, is not asked here."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from itertools import cycle
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
    parts = ("rounds", "sides", "conversations", "pretraining", "tuning")
    names = {"train": "train"} | {part: f"training.{part}" for part in parts}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield SimpleNamespace(**{key: importlib.import_module(name) for key, name in names.items()})
    for name in (*names.values(), "training"):
        del sys.modules[name]


@pytest.mark.slow
def test_the_tiny_shape_from_end_to_end(tmp_path):
    out = tmp_path / "train.json"
    command = [sys.executable, str(SCRIPT), "--shapes", "tiny", "--seconds", "0.01", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["machine"]["threads"] >= 1
    assert found["machine"]["transformers"]
    pretraining = found["pretraining"]["tiny"]
    assert pretraining["tokens_per_step"] == 256
    assert pretraining["memory"].keys() == {"athanor", "transformers"}
    assert pretraining["loss"]["athanor"] == pytest.approx(pretraining["loss"]["transformers"], abs=1e-3)
    sets = found["tuning"]["tiny"]
    assert sets.keys() == {"skills", "ragged, 16..400 tokens"}
    for r in (pretraining, *sets.values()):
        for side, rates in r["tokens_per_second"].items():
            assert len(rates) == found["rounds"], side
            assert all(rate > 0 for rate in rates), side
            assert side in done.stdout
    for r in sets.values():
        assert 16 <= r["mean_length"] <= 400
        assert 0 < r["padding_of_eight"] < 1
        assert [v for k, v in r["ratio"].items() if "defaults" in k] == [1.0]


def test_different_weights_are_no_comparison(bench, monkeypatch):
    theirs = bench.sides.their_model
    monkeypatch.setattr(bench.pretraining, "their_model", lambda config, ours: theirs(config))
    with pytest.raises(VerificationError, match=r"the loss of the first step is \d.* here and \d.* in transformers"):
        bench.pretraining.pretraining(bench.train.SHAPES["tiny"], "fp32", 0.01)


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


def test_nan_agrees_with_nothing(bench):
    bench.sides.agree("x", 1.0, 1.0005, 1e-3)
    for value in (1.002, float("nan")):
        with pytest.raises(VerificationError, match=r"must agree within 0.001"):
            bench.sides.agree("x", 1.0, value, 1e-3)


def test_turns_are_taken_forwards_and_backwards(bench):
    seen = []
    contenders = {name: lambda seconds, name=name: seen.append((name, seconds)) or len(seen) for name in "ab"}
    rates = bench.rounds.take_turns(contenders, 5.0)
    assert "".join(name for name, _ in seen) == "abbaabbaab"
    assert {seconds for _, seconds in seen} == {5.0 / bench.rounds.ROUNDS}
    assert rates == {"a": [1, 4, 5, 8, 9], "b": [2, 3, 6, 7, 10]}


def test_the_ratio_is_the_median_of_the_rounds(bench):
    assert bench.rounds.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0


def test_the_first_step_of_a_round_is_not_counted(bench, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(bench.rounds.time, "perf_counter", lambda: next(clock))
    steps = []
    assert bench.rounds.repeated(lambda: steps.append(0) or 10)(3.0) == pytest.approx(20 / 3)  # two steps seen in three ticks
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


def test_the_life_shape_is_the_recipes_default(bench):
    default, shape = pretrain.Config(Path()), bench.train.SHAPES["life"]
    fields = asdict(shape.config)
    assert {k: fields[k] for k in asdict(default.shape)} == asdict(default.shape)
    assert (shape.length, shape.tokens) == (default.context, default.batch_tokens)


def test_no_time_is_an_error(bench, capsys):
    assert bench.train.main(["--seconds", "0"]) == 1
    assert "--seconds (0) must be above 0: 5 is usual" in capsys.readouterr().err


def test_a_missing_peer_is_named(bench, capsys, monkeypatch):
    monkeypatch.setattr(bench.train.importlib.util, "find_spec", lambda name: None if name == "accelerate" else object())
    assert bench.train.main([]) == 1
    assert "accelerate not installed, to compare with: pip install 'athanor-lm[dev]'" in capsys.readouterr().err
