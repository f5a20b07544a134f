"""RMSNorm against PyTorch's own."""

import pytest
import torch
from torch import nn

from athanor.nn.norms import RMSNorm, compute_dtype


def pair(dim=24, eps=1e-5):
    ours, theirs = RMSNorm(dim, eps), nn.RMSNorm(dim, eps)
    with torch.no_grad():
        weight = torch.randn(dim, generator=torch.Generator().manual_seed(0))
        ours.weight.copy_(weight)
        theirs.weight.copy_(weight)
    return ours, theirs


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_forward_and_gradients(scale):
    results = []
    for norm in pair():
        x = (torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)) * scale).requires_grad_()
        y = norm(x)
        (y * torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2))).sum().backward()
        results.append((y.detach(), x.grad * scale, norm.weight.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_row_of_zeros_is_finite():
    norm, _ = pair()
    x = torch.zeros(1, 24, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(1, 24))
    assert torch.isfinite(x.grad).all()


def test_statistics_of_bfloat16_are_computed_in_float32():
    ours, theirs = pair()
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    y = ours(x)
    assert y.dtype == torch.bfloat16
    exact = theirs(x.float())
    assert ((y.float() - exact).abs() <= 0.005 * exact.abs()).all()  # one rounding to 8 bits, no more


def test_under_autocast_the_result_has_the_dtype_of_the_product_that_follows():
    ours, _ = pair()
    x = torch.randn(3, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute_dtype(x) == ours(x).dtype == torch.bfloat16
    assert compute_dtype(x) == ours(x).dtype == torch.float32


def test_a_single_vector_has_gradients():
    grads = []
    for norm in pair():
        x = torch.linspace(-1, 2, 24).requires_grad_()
        norm(x).square().sum().backward()
        grads.append((x.grad, norm.weight.grad))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_leaves_float64_alone():
    """As it does before PyTorch's own products."""
    norm, x = RMSNorm(24).double(), torch.randn(3, 24, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute_dtype(x) == norm(x).dtype == torch.nn.functional.linear(x, x).dtype == torch.float64
