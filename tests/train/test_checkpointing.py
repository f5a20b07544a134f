"""Activation checkpointing: the same numbers, bit by bit, for less memory."""

import json
import re
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from athanor.core.device import autocast
from athanor.core.errors import ConfigError
from athanor.train.checkpointing import checkpoint, stacks
from athanor.train.regularise import dropout
from tests.train.every_model import cases, gradients, hidden, random_model


@pytest.mark.parametrize("how", ["full", "selective"])
@pytest.mark.parametrize("case", cases(), ids="-".join)
def test_losses_gradients_and_counts_are_the_same_bit_by_bit(case, how):
    plain, lean = random_model(case), random_model(case)
    checkpoint(lean, how)
    dropout(plain, 0.1)
    dropout(lean, 0.1)
    expected, found = gradients(plain), gradients(lean)
    assert expected.keys() == found.keys()
    # Longformer's weights of global tokens are idle in texts without such tokens.
    assert all(name in found for name, _ in lean.named_parameters() if "blocks." in name and "_global" not in name)
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("how", ["full", "selective"])
def test_the_same_in_bf16(how):
    plain, lean = random_model(("llama", "tiny")), random_model(("llama", "tiny"))
    checkpoint(lean, how)
    with autocast(torch.device("cpu"), "bf16"):
        expected, found = gradients(plain), gradients(lean)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def products(how):
    """Floating-point operations of products with weights, and of batched ones, in a forward and a backward pass."""
    model = random_model(("llama", "tiny"))
    if how:
        checkpoint(model, how)
    with FlopCounterMode(display=False) as counter:
        hidden(model).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return counts[torch.ops.aten.mm], counts[torch.ops.aten.bmm]


def test_what_is_computed_again():
    (plain, batched), (kept, batched_again), (full, all_again) = products(None), products("selective"), products("full")
    assert kept == plain
    assert batched < batched_again == all_again
    # Backward costs twice the forward pass, which `full` repeats but for each block's last product: nothing needs what it gives.
    assert plain < full < plain * 4 / 3


def test_without_gradients_blocks_run_as_they_are():
    model = random_model(("llama", "tiny"))
    seen = []
    model.blocks[0].register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    checkpoint(model, "full")
    with torch.no_grad():
        expected = hidden(random_model(("llama", "tiny")))
        assert torch.equal(hidden(model), expected)
    assert seen == [False]


def test_both_stacks_are_found():
    model = random_model(("t5", "tiny"))
    assert stacks(model) == [model.encoder.blocks, model.decoder.blocks]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: checkpoint(m, "ful"), "checkpointing ('ful') must be full or selective; did you mean 'full'?"),
        (lambda m: checkpoint(torch.nn.Linear(2, 2), "full"), "torch.nn.modules.linear has no blocks"),
        (
            lambda m: (checkpoint(m, "full"), checkpoint(m, "full")),
            "the blocks of this model are checkpointed already: do it once",
        ),
    ],
)
def test_what_does_not_fit_is_refused(act, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        act(random_model(("llama", "tiny")))


PEAK = """
import sys, torch
from athanor.core.device import peak_memory, tune_allocator
from athanor.models import llama
from athanor.objectives import next_token
from athanor.train.checkpointing import checkpoint
from athanor.types import Batch
model = llama.Model(llama.Config(512, 256, 8, 4, 4, 704))
model.initialise(torch.Generator().manual_seed(0))
model.train()
if sys.argv[1] != "none":
    checkpoint(model, sys.argv[1])
ids = torch.randint(0, 512, (8192,), generator=torch.Generator().manual_seed(0))
before = peak_memory()
loss, _, _ = next_token.loss(model, Batch(ids, ids, torch.full((32,), 256)))
loss.backward()
print(peak_memory() - before)
"""


@pytest.mark.slow
def test_it_saves_memory():
    peak = {}
    for how in ("none", "selective", "full"):
        done = subprocess.run([sys.executable, "-c", PEAK, how], capture_output=True, text=True, check=True)
        peak[how] = int(done.stdout)
    print(json.dumps({how: f"{value / 2**20:.0f} MiB" for how, value in peak.items()}))
    assert peak["full"] < 0.5 * peak["none"]
    assert peak["selective"] < 0.8 * peak["none"]
    assert peak["full"] < peak["selective"]
