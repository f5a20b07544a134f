"""Predicted memory against measured: bytes of live tensors of the real step, counted by the same rule, and resident memory."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from athanor.core.errors import ConfigError
from athanor.models import io as models
from athanor.models import llama
from athanor.nn import sdpa
from athanor.objectives import next_token
from athanor.optim.build import OptimConfig, build
from athanor.train.budget_memory import NF4, PARTS, Setup, attach, linears, objective_of, predict
from athanor.train.budget_trace import Live, rehearsing, shadow
from athanor.train.checkpointing import checkpoint
from athanor.train.parallel.layout import parse
from athanor.train.step import train_step
from athanor.types import Batch

SHAPE = llama.Config(512, 64, 3, 4, 2, 96, 256)
SCRIPT = Path(__file__).parents[2] / "bench" / "memory.py"
_SETUP = Setup(batch_tokens=512, context=64, precision="fp32", optimizer="adamw")


def skeleton(config=SHAPE, family="llama"):
    return models.build(family, config)


def need(**changes):
    return predict(skeleton(), dataclasses.replace(_SETUP, **changes))


def measured(setup, family="llama", config=SHAPE):
    """The peak of live tensors of the third real step."""
    with Live() as live:
        model = models.build(family, config, seed=0)
        if setup.precision == "bf16-pure":
            model.bfloat16()
        if setup.tune != "full":
            attach(model, setup.rank, setup.targets)
        if setup.checkpointing != "none":
            checkpoint(model, setup.checkpointing)
        model.train()
        optimizers = build(model, OptimConfig(name=setup.optimizer), bf16=setup.precision != "fp32")
        ids = torch.randint(0, config.vocab_size, (setup.rows * setup.context,), generator=torch.Generator().manual_seed(0))
        batch = Batch(ids, ids, torch.full((setup.rows,), setup.context), origin="random")
        precision = "bf16" if setup.precision == "bf16" else "fp32"
        for _ in range(3):
            live.restart()
            train_step(
                model, objective_of(model), [batch] * setup.micro, optimizers, lr_factor=1.0, clip=1.0, precision=precision
            )  # fmt: skip
        return live.peak


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16"},
        {"precision": "bf16-pure"},
        {"accumulate": 4},
        {"checkpointing": "full", "precision": "bf16"},
        {"checkpointing": "selective", "precision": "bf16"},
        {"optimizer": "muon", "precision": "bf16"},
        {"optimizer": "sgd"},
        {"optimizer": "adafactor"},
        {"tune": "lora", "precision": "bf16", "rank": 4},
    ],
    ids=str,
)
def test_the_rehearsed_step_takes_what_the_real_one_takes(changes):
    setup = dataclasses.replace(_SETUP, **changes)
    assert predict(skeleton(), setup).peak == pytest.approx(measured(setup), rel=0.02)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "mixtral", "deepseek_v3", "bert", "t5", "bart", "switch"])
def test_any_family(family):
    config = next(iter(models.architecture(family).PRESETS.values()))
    setup = dataclasses.replace(_SETUP, batch_tokens=256, context=32)
    # What experts are chosen is data: their rows are filled up in the real step.
    assert predict(skeleton(config, family), setup).peak == pytest.approx(measured(setup, family, config), rel=0.05)


def test_parts_are_what_they_are_called():
    n = skeleton().n_parameters()
    found = need()
    assert tuple(found.parts) == PARTS and sum(found.parts.values()) == found.peak < found.resident
    assert found.parts["weights"] == pytest.approx(4 * n, rel=0.001) and found.trainable == n
    assert found.parts["optimizer"] == pytest.approx(8 * n, rel=0.001) and found.parts["casts"] == 0
    assert need(accumulate=4).parts["gradients"] == pytest.approx(4 * n, rel=0.001)  # of the micro-batches before
    # Of all weights the output alone is cast for longer than one product.
    assert need(precision="bf16").parts["casts"] == 2 * SHAPE.vocab_size * SHAPE.d_model
    half = need(precision="bf16-pure").parts
    assert half["weights"] == pytest.approx(2 * n, rel=0.001) and half["optimizer"] == pytest.approx(12 * n, rel=0.001)
    assert need(optimizer="sgd").parts["optimizer"] == pytest.approx(4 * n, rel=0.001)
    assert need(optimizer="adafactor").parts["optimizer"] < n
    matrices = sum(m.weight.numel() for m in linears(skeleton()).values())
    assert need(optimizer="muon").parts["optimizer"] == pytest.approx(8 * n - 4 * matrices, rel=0.001)
    assert found.peer_logits == 512 * SHAPE.vocab_size * 8


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing():
    one, two = need(), need(batch_tokens=1024)
    assert two.parts["activations"] == pytest.approx(2 * one.parts["activations"], rel=0.03)
    kept = [need(checkpointing=how).parts["activations"] for how in ("none", "selective", "full")]
    assert kept[0] > 1.3 * kept[1] > 1.3 * kept[2]


def test_fused_attention_keeps_no_scores():
    scores = 3 * 8 * SHAPE.n_heads * 64 * 64 * 4  # layers, rows
    # What it gives is kept instead, and less.
    assert 0.5 * scores < need().parts["activations"] - need(fused=True).parts["activations"] < scores
    assert sdpa._EXPLICIT_MAX == 512 * 512


def test_adapters_are_small_and_frozen_layers_can_be():
    lora, qlora = need(precision="bf16", tune="lora"), need(precision="bf16", tune="qlora")
    weights = [m.weight for m in linears(skeleton()).values()]
    assert lora.trainable == qlora.trainable == sum(16 * sum(w.shape) for w in weights)
    assert need(tune="lora", rank=4).trainable * 4 == lora.trainable
    assert need(tune="lora", targets=("qkv",)).trainable == 3 * 16 * (64 + 128)
    assert lora.parts["optimizer"] == pytest.approx(8 * lora.trainable, rel=0.01)
    few = [need(precision="bf16", tune=how, batch_tokens=64, context=64).peak for how in ("full", "lora", "qlora")]
    assert few == sorted(few, reverse=True)  # of many tokens activations outweigh all that, and adapters have some of their own
    matrices, largest = sum(w.numel() for w in weights), max(w.numel() for w in weights)
    whole = 2 * (skeleton().n_parameters()) + 4 * lora.trainable
    assert qlora.parts["weights"] == pytest.approx(whole - matrices * (2 - NF4) + 2 * largest, rel=0.001)


@pytest.mark.parametrize(
    ("layout", "share"), [("fsdp=2", 2), ("fsdp=4", 4), ("hsdp=2x2", 2), ("ddp=2", 1), ("pp=3", 2.1), ("tp=2", 1.6)]
)
def test_layouts_divide(layout, share):
    alone, found = need(batch_tokens=2048), need(batch_tokens=2048, layout=parse(layout))
    assert found.parts["optimizer"] == pytest.approx(alone.parts["optimizer"] / share, rel=0.1)
    assert found.parts["activations"] < alone.parts["activations"]


def test_zero_2_keeps_gathered_weights():
    three, two = need(layout=parse("fsdp=2")), need(layout=parse("fsdp=2,zero=2"))
    assert two.parts["working"] - three.parts["working"] == pytest.approx(4 * sum(
        p.numel() for p in skeleton().blocks[0].parameters()
    ))  # fmt: skip  # three blocks instead of two


def test_a_rehearsal_leaves_nothing_behind():
    model = skeleton()
    names = {name: p.device.type for name, p in model.named_parameters()}
    predict(model, _SETUP)
    assert {name: p.device.type for name, p in model.named_parameters()} == names
    assert sdpa._keep.cache_info().currsize == 0
    real = models.build("llama", SHAPE, seed=0)
    before = real(torch.arange(8)[None])
    with rehearsing() as live:
        twin = shadow(real, live)
        twin(torch.arange(8)[None])
    assert torch.equal(real(torch.arange(8)[None]), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "bf61"}, "precision ('bf61') must be one of fp32, bf16, bf16-pure; did you mean 'bf16'?"),
        ({"checkpointing": "ful"}, "checkpointing ('ful') must be one of none, selective, full; did you mean 'full'?"),
        ({"optimizer": "adam"}, "optimizer ('adam') must be one of"),
        ({"tune": "qlor"}, "did you mean 'qlora'?"),
        ({"rank": 4}, "rank (4) and targets (*) are of lora and qlora: give tune too"),
        ({"accumulate": 0}, "accumulate (0) must be at least 1"),
        ({"accumulate": 16}, "is 32 tokens, less than a row of context (64): raise batch_tokens, or lower accumulate or context"),
        ({"context": 512, "batch_tokens": 512}, "context (512) must be at most 256, the longest this model takes"),
        ({"tune": "lora", "targets": ("q_proj",)}, "targets (q_proj) name no linear layer: use some of down, gate_up, out, qkv"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        need(**changes)
    assert message in str(error.value)


def test_a_tagger_is_refused():
    config = models.architecture("bilstm_crf").PRESETS["tiny"]
    with pytest.raises(ConfigError, match="a bilstm_crf is a tagger, and memory is planned for language models"):
        predict(skeleton(config, "bilstm_crf"), dataclasses.replace(_SETUP, context=16))


def test_a_recurrent_model_is_refused():
    config = next(iter(models.architecture("rnn_lm").PRESETS.values()))
    with pytest.raises(ConfigError, match="a rnn_lm is recurrent, and what its kernels keep is not known without running them"):
        predict(skeleton(config, "rnn_lm"), _SETUP)


def test_an_objective_whose_shapes_hang_on_values_is_refused():
    def picky(model, batch):
        hidden = model.hidden(batch.ids[None], importlib.import_module("athanor.nn.context").Causal(1, len(batch.ids)))
        return hidden[hidden > 0].unique().sum(), 1, {}

    with pytest.raises(ConfigError, match="what a llama keeps depends on its data"):
        predict(skeleton(), dataclasses.replace(_SETUP, batch_tokens=64), picky)
    assert next_token.loss is objective_of(skeleton())


def _bench(tmp_path, *arguments):
    out = tmp_path / "memory.json"
    command = [sys.executable, str(SCRIPT), *arguments, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["results"], done.stdout


@pytest.mark.slow
def test_two_configurations_in_processes_of_their_own(tmp_path):
    found, printed = _bench(tmp_path, "--shapes", "tiny", "--only", "fp32", "bf16, accumulate 4")
    assert [r["configuration"] for r in found] == ["fp32", "bf16, accumulate 4"]
    for r in found:
        assert r["ratio"]["tensors"] == pytest.approx(1, abs=0.1) and r["configuration"] in printed
        assert r["measured"]["resident"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["9m", "41m"])
def test_all_six_within_a_tenth(tmp_path, shape):
    found, _ = _bench(tmp_path, "--shapes", shape)
    assert len(found) == 6
    for r in found:
        assert r["ratio"]["resident"] == pytest.approx(1, abs=0.1), r
