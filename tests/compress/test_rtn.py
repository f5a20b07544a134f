"""Rounding to nearest: the formula, its bound, and what cannot be rounded."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from athanor.compress import rtn
from athanor.core.errors import ConfigError

KINDS = [(8, None), (8, 32), (8, 128), (4, 32), (4, 64)]
kinds = pytest.mark.parametrize(("bits", "group"), KINDS)


def weights(rows=7, columns=128, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def whole(codes, columns):
    """The integers in `codes`, one at a time in plain Python."""
    if codes.dtype == torch.int8:
        return np.array(codes.tolist())
    return np.array([[(row[k // 2] >> 4 * (k % 2) & 15) - 8 for k in range(columns)] for row in codes.tolist()])


@kinds
def test_scale_and_integers_are_those_of_the_formula_in_float64(bits, group):
    w = weights()
    codes, scale = rtn.quantise(w, bits, group)
    runs = w.double().numpy().reshape(7, -1, group or 128)
    exact = np.abs(runs).max(-1) / (2 ** (bits - 1) - 0.5)
    s = scale.double().numpy()
    step = 2.0 ** (np.floor(np.log2(exact)) - 7)  # of bfloat16: 8 significant bits
    assert np.array_equal(s, np.ceil(exact / step) * step)
    nearest = np.minimum(np.rint(runs / s[..., None]), 2 ** (bits - 1) - 1).reshape(7, 128)
    assert np.array_equal(whole(codes, 128), nearest)
    assert np.array_equal(rtn.integers(codes).numpy(), nearest)
    # The product of 8 and 8 significant bits is exact in float32.
    exactly = (nearest.reshape(runs.shape) * s[..., None]).reshape(7, 128)
    assert np.array_equal(rtn.dequantise(codes, scale).double().numpy(), exactly)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(rtn.dequantise(codes, scale, dtype), torch.from_numpy(exactly).to(dtype))


@kinds
def test_compressed_tensors_rounds_to_the_same_integers(bits, group):
    args = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs(
        num_bits=bits, symmetric=True, strategy="group" if group else "channel", group_size=group
    )
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    w = weights(64, 256)
    codes, scale = rtn.quantise(w, bits, group)
    zero = torch.zeros_like(scale)
    theirs = forward.quantize(w, scale, zero, args, dtype=torch.int8)
    assert torch.equal(rtn.integers(codes), theirs)
    assert torch.equal(rtn.dequantise(codes, scale), forward.dequantize(theirs, scale, zero, args))


@given(
    st.sampled_from(KINDS),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(-120, 120),
    st.integers(0, 2**32 - 1),
)
def test_no_weight_is_off_by_more_than_half_a_scale(kind, rows, runs, exponent, seed):
    bits, group = kind
    columns = runs * (group or 17)
    w = weights(rows, columns, seed) * 2.0**exponent
    codes, scale = rtn.quantise(w, bits, group)
    assert scale.shape == (rows, runs if group else 1)
    assert torch.equal(scale.bfloat16().float(), scale)
    error = (w.double() - rtn.dequantise(codes, scale).double()).abs().view(*scale.shape, -1)
    assert (error <= scale.double().unsqueeze(-1) / 2 * (1 + 1e-6)).all()


@kinds
def test_zeros_stay_zeros(bits, group):
    w = weights()
    w[2] = 0
    codes, scale = rtn.quantise(w, bits, group)
    assert torch.equal(rtn.dequantise(codes, scale)[2], torch.zeros(128))
    assert torch.isfinite(scale).all() and (scale > 0).all()


def test_the_smallest_numbers_there_are_do_no_harm():
    w = torch.full((1, 32), 1e-45)
    codes, scale = rtn.quantise(w, 4, 32)
    assert (w - rtn.dequantise(codes, scale)).abs().max() <= scale / 2


def test_weights_of_other_dtypes_are_quantised_as_the_numbers_they_are():
    w = weights().bfloat16()
    for a, b in zip(rtn.quantise(w, 4, 32), rtn.quantise(w.float(), 4, 32), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value):
    w = weights()
    w[3, 5] = value
    with pytest.raises(ConfigError, match="the weights hold inf or nan: take a checkpoint from before training diverged"):
        rtn.quantise(w, 8, None)


@pytest.mark.parametrize("bits", [3, 16, 0, 2])
def test_other_bits_are_refused(bits):
    with pytest.raises(ConfigError, match=f"bits is {bits} but must be 8 or 4: 8 changes next to nothing"):
        rtn.check(bits, None)


@pytest.mark.parametrize("group", [0, 16, 48, -1])
def test_other_groups_are_refused(group):
    with pytest.raises(ConfigError, match=f"group is {group} but must be 32, 64 or 128 columns"):
        rtn.check(4, group)


def test_groups_that_are_meant_when_none_is_given():
    assert rtn.check(8, None) is None
    assert rtn.check(4, None) == 32
    assert rtn.check(8, 64) == rtn.check(4, 64) == 64


def test_a_group_that_does_not_divide_names_the_largest_that_does():
    rtn.check_width("blocks.0.out", 192, 4, 64)
    rtn.check_width("blocks.0.out", 50, 8, None)
    with pytest.raises(ConfigError, match=r"group \(128\) must divide the 192 columns of blocks\.0\.out: use group 64"):
        rtn.check_width("blocks.0.out", 192, 4, 128)
    with pytest.raises(ConfigError, match=r"group \(32\) must divide the 50 columns of x: none of 32, 64, 128 does: use bits 8"):
        rtn.check_width("x", 50, 4, 32)
