"""What records of training hold: held to norms, differences and FLOPs that are computed another way."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from athanor.core import plugins
from athanor.core.errors import ConfigError, NoTargetsError
from athanor.models import io as models
from athanor.nn import linear
from athanor.objectives import next_token
from athanor.optim.build import OptimConfig, build
from athanor.train import monitor as monitors
from athanor.train.monitor import Monitor, heldout, measured_peak, part, quality
from athanor.train.parallel.base import Alone
from athanor.train.step import apply, gradients
from athanor.types import IGNORE, Batch, Source

PARTS = ("embedding", "block 0", "block 1", "norms", "head")


@pytest.fixture
def watched(tiny, ragged):
    """`watched(steps, **options)`: records of a plain loop over a tiny model, with what else a test wants to see of each step."""

    def run(steps=3, model=None, strategy=None, **options):
        model = model or tiny()
        optimizers = build(model, OptimConfig(name="adamw", lr=0.01))
        monitor = Monitor(model, **{"context": 17, "peak": 1e9} | options)
        if strategy:
            monitor.begin(model, strategy)
        records = []
        for step in range(1, steps + 1):
            micro = [ragged(5, 9, 3, seed=step), ragged(11, 2, seed=100 + step)]
            result = gradients(model, next_token.loss, micro, optimizers, precision="fp32")
            grads = {n: p.grad.clone() for n, p in model.named_parameters()}
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            monitor.before_update(step)
            apply(optimizers, grad_norm=result.grad_norm, clip=1.0, lr_factor=1.0)
            monitor.after_update(step)
            record = monitor.record(result.loss, micro, seconds=0.5, waited=0.125)
            after = {n: p.detach().clone() for n, p in model.named_parameters()}
            records.append((record, result, grads, before, after))
        return records

    return run


def norm(tensors, name):
    return torch.cat([t.flatten().double() for n, t in tensors.items() if part(n) == name]).norm().item()


def test_gradients_and_updates_by_part(watched):
    for record, result, grads, before, after in watched(every=1):
        assert tuple(record["grad_norm_by_part"]) == tuple(record["update_ratio_by_part"]) == PARTS
        moved = {n: after[n] - before[n] for n in after}
        for name in PARTS:
            assert record["grad_norm_by_part"][name] == pytest.approx(norm(grads, name), rel=1e-5)
            assert record["update_ratio_by_part"][name] == pytest.approx(norm(moved, name) / norm(before, name), rel=1e-5)
        assert math.hypot(*record["grad_norm_by_part"].values()) == pytest.approx(result.grad_norm, rel=1e-5)
        assert all(value > 0 for value in record["update_ratio_by_part"].values())


def test_what_is_dear_comes_every_so_often_and_at_the_first_step(watched):
    records = [record for record, *_ in watched(7, every=3)]
    assert ["grad_norm_by_part" in r for r in records] == [True, False, False, True, False, False, True]
    assert ["update_ratio_by_part" in r for r in records] == ["grad_norm_by_part" in r for r in records]


def test_a_step_without_an_update_has_no_ratio_and_leaves_none_to_the_next(tiny, ragged):
    model, micro = tiny(), [ragged(9)]
    monitor = Monitor(model, context=9, every=2, peak=1e9)
    gradients(model, next_token.loss, micro, build(model, OptimConfig()), precision="fp32")
    monitor.before_update(1)
    record = monitor.record(1.0, micro, seconds=1.0, waited=0.0)
    assert "grad_norm_by_part" in record and "update_ratio_by_part" not in record
    monitor.before_update(2)
    monitor.after_update(2)
    assert not monitor.record(1.0, micro, seconds=1.0, waited=0.0).keys() & {"grad_norm_by_part", "update_ratio_by_part"}


def test_frozen_parameters_are_no_part(tiny):
    model = tiny()
    model.embedding.requires_grad_(False)
    monitor = Monitor(model, context=9, peak=1e9)
    monitor.before_update(1)
    monitor.after_update(1)
    record = monitor.record(1.0, [], seconds=1.0, waited=0.0)
    assert set(record["grad_norm_by_part"]) == set(PARTS) - {"embedding"}
    assert set(record["grad_norm_by_part"].values()) == {0.0}  # nothing went back yet


@pytest.mark.parametrize("name", plugins.names("models"))
def test_every_parameter_has_a_part_that_its_name_tells(name):
    presets = plugins.load("models", name).PRESETS
    with torch.device("meta"):
        model = models.build(name, next(preset for key, preset in presets.items() if key.startswith("tiny")))
    parts = {part(n) for n, _ in model.named_parameters()}
    layers = {p for p in parts if " " in p}
    assert parts - layers <= {"embedding", "norms", "head"} and "embedding" in parts
    sides = ("encoder ", "decoder ") if model.kind == "encoder_decoder" else ("",)
    assert layers == {f"{side}block {i}" for side in sides for i in range(model.config.n_layers)}


def test_names_of_parts():
    names = ("blocks.11.attention_norm.weight", "encoder.blocks.0.x", "decoder.norm.weight", "norm.bias", "embedding_norm.weight")
    assert [part(n) for n in names] == ["block 11", "encoder block 0", "norms", "norms", "norms"]
    names = ("encoder.positions.weight", "segments.weight", "head.weight", "masked.norm.bias", "crf.start", "layers.1.w")
    assert [part(n) for n in names] == ["embedding", "embedding", "head", "head", "head", "block 1"]


def test_quality_in_other_units(watched):
    record, result, *_ = watched(1, bytes_per_token=3.5)[0]
    assert record["perplexity"] == pytest.approx(math.exp(result.loss))
    assert record["bits_per_byte"] == pytest.approx(result.loss * math.log2(math.e) / 3.5)
    assert "bits_per_byte" not in watched(1)[0][0]
    assert not watched(1, bytes_per_token=3.5, likelihood=False)[0][0].keys() & {"perplexity", "bits_per_byte"}
    assert quality(1e5) == {"perplexity": math.inf}


def test_shares_of_a_steps_seconds(watched):
    class Talking(Alone):
        @property
        def seconds(self):
            self.said = getattr(self, "said", 0.0) + 0.0625
            return self.said

    record = watched(1)[0][0]
    assert (record["step_seconds"], record["data_share"], record["communication_share"]) == (0.5, 0.25, 0.0)
    for record, *_ in watched(3, strategy=Talking()):
        assert 0 < record["communication_share"] <= 0.25
    assert record["peak_memory"] > 10_000_000
    assert set(record) - {"perplexity", "grad_norm_by_part", "update_ratio_by_part"} <= monitors.TIMED


def counted(model, batch):
    """FLOPs of forward and backward as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        loss, *_ = next_token.loss(model, batch)
        loss.backward()
    return counter.get_total_flops()


def test_mfu_is_what_torch_counts_over_time_and_peak(tiny, monkeypatch):
    """Attention apart: torch counts the masked half of the scores too, and of so short a text it is little."""
    monkeypatch.setattr(linear, "_POINTWISE", None)  # whose products torch does not count
    model = tiny(d_model=64, d_ff=256, n_layers=3)
    ids = torch.arange(16)
    batch = Batch(ids, ids, torch.tensor([16]))
    monitor = Monitor(model, context=16, peak=1e9)
    record = monitor.record(1.0, [batch, batch], seconds=2.0, waited=0.0)
    assert record["mfu"] == pytest.approx(2 * counted(model, batch) / 2.0 / 1e9, rel=0.05)
    half = Monitor(model, context=16, peak=2e9).record(1.0, [batch, batch], seconds=2.0, waited=0.0)
    assert half["mfu"] == pytest.approx(record["mfu"] / 2)
    longer = Monitor(model, context=128, peak=1e9).record(1.0, [batch, batch], seconds=2.0, waited=0.0)
    assert longer["mfu"] > record["mfu"]


def test_an_encoder_counts_the_source_and_a_decoder_the_answer():
    model = models.build("t5", plugins.load("models", "t5").PRESETS["tiny"])
    monitor = Monitor(model, context=8, peak=1e9)

    def mfu(source, answer):
        ids = torch.zeros(source + answer, dtype=torch.long)
        batch = Batch(ids[:answer], ids[:answer], torch.tensor([answer]), source=Source(ids[answer:], torch.tensor([source])))
        return monitor.record(1.0, [batch], seconds=1.0, waited=0.0)["mfu"]

    assert mfu(20, 5) > mfu(10, 5) < mfu(10, 9)
    assert mfu(20, 5) - mfu(10, 5) == pytest.approx(mfu(20, 9) - mfu(10, 9))
    assert mfu(10, 10) - mfu(10, 5) == pytest.approx(mfu(10, 15) - mfu(10, 10))


def test_the_peak_is_measured_once_and_in_the_runs_precision(monkeypatch):
    cpu = torch.device("cpu")
    monitors.measured_peak.cache_clear()
    dtypes = []
    real = torch.full
    monkeypatch.setattr(torch, "full", lambda *a, **k: dtypes.append(k["dtype"]) or real((64, 64), *a[1:], **k))
    peaks = [measured_peak(cpu, precision, 1) for precision in ("fp32", "bf16", "fp32")]
    monitors.measured_peak.cache_clear()
    assert peaks[0] == peaks[2] and min(peaks) > 0
    assert set(dtypes[:2]) == {torch.float32} and set(dtypes[2:]) == {torch.bfloat16} and len(dtypes) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every (0) must be at least 1 step: 1 shows gradients and updates by part at each step"),
        ({"bytes_per_token": 0.0}, "bytes_per_token (0.0) must be above 0: bytes of the text / its tokens"),
    ],
)
def test_refused(tiny, options, message):
    with pytest.raises(ConfigError) as caught:
        Monitor(tiny(), context=9, peak=1e9, **options)
    assert message in str(caught.value)


def test_watching_changes_nothing(watched, tiny, ragged):
    *_, after = watched(3, every=1)[-1]
    model = tiny()
    optimizers = build(model, OptimConfig(name="adamw", lr=0.01))
    for step in (1, 2, 3):
        micro = [ragged(5, 9, 3, seed=step), ragged(11, 2, seed=100 + step)]
        result = gradients(model, next_token.loss, micro, optimizers, precision="fp32")
        apply(optimizers, grad_norm=result.grad_norm, clip=1.0, lr_factor=1.0)
    assert all(torch.equal(p, after[n]) for n, p in model.named_parameters())


def test_held_out_loss_is_that_of_all_targets_together(tiny, ragged):
    model = tiny().train()
    batches = [ragged(5, 9, seed=1), ragged(3, seed=2)]
    with torch.no_grad():
        sums = [next_token.loss(model.eval(), b) for b in batches]
    mean = sum(s[0].item() for s in sums) / sum(s[1] for s in sums)
    model.train()
    found = heldout(model, next_token.loss, batches, bytes_per_token=2.0)(step := 5)
    assert step and found.keys() == {"heldout_loss", "heldout_perplexity", "heldout_bits_per_byte"}
    assert found["heldout_loss"] == pytest.approx(mean, rel=1e-6)
    assert found["heldout_perplexity"] == pytest.approx(math.exp(mean))
    assert found["heldout_bits_per_byte"] == pytest.approx(mean / math.log(2) / 2)
    assert model.training and all(p.grad is None for p in model.parameters())
    coarse = heldout(model, next_token.loss, batches, precision="bf16")(1)
    assert coarse.keys() == {"heldout_loss", "heldout_perplexity"} and coarse["heldout_loss"] != found["heldout_loss"]


def test_held_out_batches_without_a_target_are_an_error(tiny, ragged):
    def objective(model, batch):
        return torch.zeros(()), int((batch.labels != IGNORE).sum()), {}

    batch = ragged(4)
    batch.labels[:] = IGNORE
    with pytest.raises(NoTargetsError, match="no supervised target in the held-out batches: nothing can be measured on them"):
        heldout(tiny(), objective, [batch])(1)


SPREAD = """
import json, os, sys
import torch
import torch.distributed as td
from torch.distributed.fsdp import fully_shard
from athanor.models import io as models
from athanor.core import plugins
from athanor.train.monitor import Monitor
from athanor.train.parallel.base import Alone
from athanor.train.pieces import whole

rank, kind = int(sys.argv[1]), sys.argv[2]
td.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=2)
model = models.build("llama", plugins.load("models", "llama").PRESETS["tiny"], seed=3)

class Spread(Alone):
    def held(self, name, tensor):
        mine = rank == 0 if kind == "copies" else True
        return whole(tensor, mine)

monitor = Monitor(model, context=8, peak=1e9)
if kind == "shards":
    fully_shard(model)
if kind == "stages":  # a pipeline: the second process has the second layer alone, the first one all else
    for name, p in list(model.named_parameters()):
        if ("blocks.1." in name) != (rank == 1):
            p.requires_grad_(False)
monitor.begin(model, Spread())
for p in model.parameters():
    if p.requires_grad:
        p.grad = p.detach().clone()
monitor.before_update(1)
with torch.no_grad():
    for p in model.parameters():
        p.mul_(1.25)
monitor.after_update(1)
record = monitor.record(1.0, [], seconds=1.0, waited=0.0)
if rank == 0:
    print(json.dumps([record["grad_norm_by_part"], record["update_ratio_by_part"]]))
td.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["copies", "shards", "stages"])
def test_parts_are_those_of_all_processes_together(tmp_path, kind):
    command = [sys.executable, "-c", SPREAD]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([*command, str(rank), kind, str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True, env=env)
        for rank in (0, 1)
    ]
    out = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    norms, ratios = json.loads(out[0].splitlines()[-1])
    model = models.build("llama", plugins.load("models", "llama").PRESETS["tiny"], seed=3)
    whole = dict(model.named_parameters())
    assert set(norms) == {part(n) for n in whole}
    for name, value in norms.items():
        assert value == pytest.approx(norm({n: p.detach() for n, p in whole.items()}, name), rel=1e-5)
        assert ratios[name] == pytest.approx(0.25, rel=1e-5)
