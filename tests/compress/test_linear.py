"""The quantised layer is nn.Linear with the dequantised weights, whatever the number of rows and whatever computes it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from athanor.compress.linear import QuantLinear

# Widths that torch's kernels take, and some that they would crash on or refuse.
LAYERS = [
    pytest.param(bits, group, columns, rows, id=f"int{bits}, group {group}, {rows} x {columns}")
    for bits, group, columns, rows in (
        (8, None, 64, 48),
        (8, None, 50, 17),
        (8, None, 3, 5),
        (8, 32, 64, 48),
        (4, 32, 64, 48),
        (4, 64, 192, 17),
        (4, 128, 256, 160),
    )
]
layers = pytest.mark.parametrize(("bits", "group", "columns", "rows"), LAYERS)


def layer(bits, group, columns, rows, bias=True):
    torch.manual_seed(bits + columns)
    plain = nn.Linear(columns, rows, bias=bias)
    nn.init.normal_(plain.weight, std=columns**-0.5)
    return plain, QuantLinear.of(plain, bits, group)


def exact(quantised, x):
    bias = quantised.bias.double() if quantised.bias is not None else None
    return F.linear(x.double(), quantised.dequantised().double(), bias)


@layers
@torch.no_grad()
def test_float32_is_computed_in_float32(bits, group, columns, rows):
    _, quantised = layer(bits, group, columns, rows)
    for n in (1, 2, 16, 17, 64, 65, 300):
        x = torch.randn(n, columns)
        y = quantised(x)
        assert y.dtype == torch.float32
        assert (y - exact(quantised, x)).abs().max() <= 1e-5
        alone = torch.cat([quantised(row) for row in x.split(1)])
        assert (y - alone).abs().max() <= 1e-5


@layers
@torch.no_grad()
def test_bfloat16_is_as_near_as_a_plain_layer_of_these_weights(bits, group, columns, rows):
    _, quantised = layer(bits, group, columns, rows)
    for n in (1, 2, 16, 17, 64, 65, 300):
        x = torch.randn(n, columns)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                y = quantised(x)
            assert y.dtype == torch.bfloat16
            assert (y - exact(quantised, x.bfloat16())).abs().max() <= 0.03
        assert torch.equal(quantised(x.bfloat16()), y)


@torch.no_grad()
def test_float16_does_not_overflow():
    plain = nn.Linear(64, 8, bias=False)
    nn.init.constant_(plain.weight, 1.0)
    quantised = QuantLinear.of(plain, 8, None)
    x = torch.full((2, 64), 100.0, dtype=torch.float16)
    assert quantised(x).float().sub(6400).abs().max() <= 64


@layers
def test_any_leading_dimensions(bits, group, columns, rows):
    _, quantised = layer(bits, group, columns, rows)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, columns, 2, 3).to(dtype).permute(2, 3, 0, 1)  # not contiguous
        with torch.no_grad():
            y = quantised(x)
            flat = quantised(x.reshape(30, columns))
            assert y.shape == (2, 3, 5, rows)
            assert (y - flat.view(y.shape)).abs().max() <= (1e-5 if dtype == torch.float32 else 0.03)
            assert quantised(x[:0]).shape == (0, 3, 5, rows)


@layers
def test_gradients_reach_x_as_through_a_plain_layer(bits, group, columns, rows):
    plain, quantised = layer(bits, group, columns, rows)
    with torch.no_grad():
        plain.weight.copy_(quantised.dequantised())
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        grads = []
        for module in (plain, quantised):
            x = torch.randn(3, columns, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                module(x).float().square().sum().backward()
            grads.append(x.grad)
        scale = float(grads[0].abs().max())
        assert (grads[0] - grads[1]).abs().max() <= tolerance * scale


def test_a_layer_without_a_bias_has_none():
    plain, quantised = layer(8, None, 64, 48, bias=False)
    assert quantised.bias is None
    assert torch.equal(quantised(torch.zeros(1, 64)), torch.zeros(1, 48))
    assert list(quantised.state_dict()) == ["weight_int8", "weight_scale"]
    assert plain.weight.dtype == torch.float32


def test_what_was_reordered_for_a_kernel_follows_the_weights():
    x = torch.randn(1, 64).bfloat16()
    (_, a), (_, b) = layer(4, 32, 64, 48), layer(4, 32, 64, 48)
    with torch.inference_mode():
        first = a(x)
        twin = copy.deepcopy(a)
        assert torch.equal(twin(x), first)
    b.weight_int4 ^= 0xFF
    a.load_state_dict(b.state_dict())
    with torch.no_grad():
        assert torch.equal(a(x), b(x))
        assert not torch.equal(a(x), first)
        assert torch.equal(twin(x), first)


def test_it_says_what_it_is():
    assert repr(layer(4, 32, 64, 48)[1]) == "QuantLinear(64, 48, bits=4, group=32, bias=True)"
