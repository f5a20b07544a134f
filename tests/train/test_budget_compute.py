"""Laws of scaling against the papers' own figures; operations, time and money against arithmetic; devices."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from athanor.core.errors import ConfigError
from athanor.models import io as models
from athanor.models import llama
from athanor.train import devices
from athanor.train.budget_compute import BESIROGLU, HOFFMANN, cost, largest, optima, quantity, shape
from athanor.train.devices import CATALOGUE

H100 = CATALOGUE["h100"]


@given(st.floats(1e15, 1e27))
def test_the_parametric_optimum_is_one(flops):
    for fit in (HOFFMANN, BESIROGLU):
        n, d = fit.optimum(flops)
        assert 6 * n * d == pytest.approx(flops)
        best = fit.loss(n, d)
        for factor in (0.9, 1.1):
            assert fit.loss(n * factor, d / factor) > best


def test_published_optima():
    gopher = 5.76e23  # the budget of Gopher, at which Chinchilla is 67 to 70 billion parameters on 1.4 to 1.5 trillion tokens
    chinchilla, hoffmann, refitted, _ = optima(gopher)
    assert chinchilla.parameters == pytest.approx(70e9, rel=0.05) and chinchilla.tokens == pytest.approx(1.4e12, rel=0.05)
    assert 25e9 < hoffmann.parameters < 45e9  # approach 3: 40 billion with constants not rounded
    assert refitted.tokens / refitted.parameters == pytest.approx(20, rel=0.15)  # Besiroglu et al.: consistent with 20
    a_day = optima(1e15 * 86_400)[3]  # Kaplan et al., table 6
    assert a_day.parameters == pytest.approx(1.3e9) and a_day.loss is None
    assert optima(1e15 * 86_400 * 10)[3].parameters / a_day.parameters == pytest.approx(10**0.73)


def test_cost_is_arithmetic():
    model = models.build("llama", llama.PRESETS["llama-3-8b"])
    found = cost(model, tokens=1e9, context=8192, device=H100, devices=8, mfu=0.5)
    blocks = 8_030_261_248 - 2 * 128_256 * 4096 - 65 * 4096  # without embeddings and norms
    attention = 32 * 4 * 4096 * (8193 / 2)  # layers, FLOPs of a pair, keys seen on average
    assert found.flops_per_token == pytest.approx(3 * (2 * (blocks + 128_256 * 4096) + attention))
    assert found.rule == pytest.approx(6 * (8_030_261_248 - 128_256 * 4096), rel=1e-4)
    assert found.seconds == pytest.approx(1e9 * found.flops_per_token / (8 * 989.4e12 * 0.5))
    assert found.dollars == pytest.approx(found.seconds / 3600 * 8 * H100.price)
    assert found.tokens_per_second * found.seconds == pytest.approx(1e9)
    again = cost(model, tokens=1e9, context=8192, device=H100, devices=8, mfu=0.5, checkpointing="full")
    assert again.seconds == pytest.approx(found.seconds * 4 / 3) and again.recomputed == pytest.approx(found.flops_per_token / 3)
    tuned = cost(model, tokens=1e9, context=8192, device=H100, tune="lora")
    assert tuned.flops_per_token == pytest.approx(found.flops_per_token * 2 / 3)
    slow = cost(model, tokens=1e9, context=8192, device=H100, precision="fp32")
    assert slow.seconds / tuned.seconds == pytest.approx(989.4 / 67 * 1.5)


def test_a_tied_output_counts_in_the_rule():
    model = models.build("llama", llama.PRESETS["tiny"])
    found = cost(model, tokens=1.0, context=16, device=H100)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert found.rule == pytest.approx(6 * model.n_parameters(), rel=6 * norms / found.rule)


@pytest.mark.parametrize("limit", [200_000, 1_000_000, 30_000_000])
def test_the_largest_fits_and_the_next_does_not(limit):
    found = largest(lambda m: m.n_parameters() <= limit, 512, 128)
    wider = shape(found.config.d_model + 64, 512, 128)
    assert found.n_parameters() <= limit < wider.n_parameters()
    assert found.config.n_layers == max(2, found.config.d_model // 64)


def test_nothing_fits():
    with pytest.raises(ConfigError, match="not even a model 64 wide with 2 layers and a vocabulary of 512 fits"):
        largest(lambda m: False, 512, 128)


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("memory", "80GB", 80e9),
        ("memory", "512 MiB", 2**29),
        ("memory", "24000000", 24e6),
        ("tokens", "300M", 3e8),
        ("tokens", "1.4T", 1.4e12),
        ("tokens", "20_000", 2e4),
        ("flops", "1e21", 1e21),
        ("flops", "5.76E+23", 5.76e23),
    ],
)
def test_quantities(field, text, value):
    assert quantity(field, text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        (
            "memory",
            "3GBx",
            "memory ('3GBx') must be a number and a unit (b, kb, mb, gb, tb, kib, mib, gib, tib), as",
        ),
        ("memory", "lots", "memory ('lots') must be a number and a unit"),
        ("memory", "-3GB", "memory ('-3GB') must be a number"),
        ("tokens", "0", "tokens (0) must be above 0, as 300M or 20B"),
        ("tokens", "3GB", "tokens ('3GB') must be a number and a unit (k, m, b, t)"),
        ("flops", "1e999", "flops (inf) must be above 0"),
    ],
)
def test_bad_quantities(field, text, message):
    with pytest.raises(ConfigError) as error:
        quantity(field, text)
    assert message in str(error.value)


def test_no_operations_and_no_tokens():
    with pytest.raises(ConfigError, match=r"flops \(0\) must be above 0"):
        optima(0.0)
    with pytest.raises(ConfigError, match=r"tokens \(0\) must be above 0"):
        cost(shape(64, 512, 128), tokens=0.0, context=16, device=H100)


def test_the_catalogue():
    assert devices.get("h100") is H100
    for device in CATALOGUE.values():
        assert device.peak("fp32") < device.peak("bf16") and device.kind == "cuda" and device.price > 0
        assert device.memory > 30e9 and device.bandwidth > 8e11
    with pytest.raises(ConfigError, match="device \\('h10'\\) is none that is known; did you mean 'h100'\\? Known: this, v100"):
        devices.get("h10")


def test_this_machine_is_measured():
    found = devices.this(seconds=0.01)
    assert 0 < found.bandwidth < math.inf and found.fp32 > 0 and found.half > 0
    assert found.price == 0 and found.memory > 1e9 and found.name
