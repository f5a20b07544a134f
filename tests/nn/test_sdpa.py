"""Attention against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from athanor.nn.sdpa import causal_attention, decode_attention


def inputs(b, t, h, g, k, dtype=torch.float32):
    generator = torch.Generator().manual_seed(t)
    query = torch.randn(b, t, h, k, generator=generator)
    key, value = torch.randn(2, b, t, g, k, generator=generator)
    return [x.to(dtype).requires_grad_() for x in (query, key, value)]


def reference(query, key, value):
    """Float64, keys repeated by hand, the mask written out."""
    t, repeats = query.shape[1], query.shape[2] // key.shape[2]
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(t, t).tril().bool()).transpose(1, 2)


def both(b, t, h, g, k, dtype=torch.float32):
    """Outputs and gradients of ours and of the reference."""
    results = []
    weights = torch.randn(b, t, h, k, generator=torch.Generator().manual_seed(0))
    for function in (causal_attention, reference):
        tensors = inputs(b, t, h, g, k, dtype)
        out = function(*tensors)
        assert out.shape == (b, t, h, k)
        (out.float() * weights).sum().backward()
        results.append([out.detach().float()] + [x.grad.float() for x in tensors])
    return zip(*results, strict=True)


@pytest.mark.parametrize(("h", "g"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("t", [1, 2, 17, 64])
def test_forward_and_gradients(t, h, g):
    for ours, theirs in both(2, t, h, g, 16):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("t", [512, 513])  # the longest that keeps its probabilities, and the first that does not
def test_long_sequences(t):
    for ours, theirs in both(1, t, 2, 1, 8):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("t", [33, 520])
def test_bfloat16_is_close(t):
    for ours, theirs in both(1, t, 4, 2, 16, torch.bfloat16):
        error = (ours - theirs).norm() / theirs.norm()
        assert error <= 0.01  # bfloat16 has 8 bits: 0.4 % each, rounding averages out


def test_inference_first_does_not_spoil_training():
    with torch.inference_mode():
        causal_attention(*inputs(1, 23, 2, 2, 8))
    tensors = inputs(1, 23, 2, 2, 8)
    causal_attention(*tensors).sum().backward()
    assert all(x.grad is not None for x in tensors)


@pytest.mark.parametrize(("h", "g"), [(4, 4), (4, 2), (6, 1)])
def test_decoding_is_the_last_row_of_causal_attention(h, g):
    query, key, value = (x.detach() for x in inputs(3, 10, h, g, 8))
    lengths = torch.tensor([10, 4, 1])
    mask = torch.zeros(3, 10).masked_fill(torch.arange(10) >= lengths[:, None], -torch.inf)[:, None, None, :]
    last = torch.stack([query[i, n - 1] for i, n in enumerate(lengths)]).unsqueeze(1)
    out = decode_attention(last, key.transpose(1, 2), value.transpose(1, 2), mask)
    for i, n in enumerate(lengths.tolist()):
        expected = reference(query[i : i + 1, :n], key[i : i + 1, :n], value[i : i + 1, :n])[0, -1]
        torch.testing.assert_close(out[i, 0].double(), expected, rtol=1e-5, atol=1e-6)
