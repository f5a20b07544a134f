"""Attention against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from athanor.nn import sdpa
from athanor.nn.sdpa import attention, decode_attention, mask_of


def causal_attention(query, key, value):
    return attention(query, key, value, causal=True)


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
@pytest.mark.parametrize("t", [1, 2, 17, 128, 129, 256, 300])  # one block of queries, two and three, whole and not
def test_forward_and_gradients(t, h, g):
    for ours, theirs in both(2, t, h, g, 16):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("t", [512, 513])  # the longest that keeps its probabilities, and the first that does not
def test_long_sequences(t):
    for ours, theirs in both(1, t, 2, 1, 8):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("t", [33, 384, 520])
def test_bfloat16_is_close(t):
    for ours, theirs in both(1, t, 4, 2, 16, torch.bfloat16):
        error = (ours - theirs).norm() / theirs.norm()
        assert error <= 0.01  # bfloat16 has 8 bits: 0.4 % each, rounding averages out


def test_no_scores_are_kept_of_keys_after_a_block():
    t, kept = 512, []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        causal_attention(*inputs(1, t, 1, 1, 2))
    assert sum(kept) == (128 + 256 + 384 + 512) * 128 + 3 * t * 2  # probabilities; queries, keys and values


@pytest.mark.parametrize("t", [23, 200])
def test_inference_first_does_not_spoil_training(t):
    with torch.inference_mode():
        causal_attention(*inputs(1, t, 2, 2, 8))
    tensors = inputs(1, t, 2, 2, 8)
    causal_attention(*tensors).sum().backward()
    assert all(x.grad is not None for x in tensors)


@pytest.mark.parametrize(("h", "g"), [(4, 4), (4, 2), (6, 1)])
def test_decoding_is_the_last_row_of_causal_attention(h, g):
    query, key, value = (x.detach() for x in inputs(3, 10, h, g, 8))
    lengths = torch.tensor([10, 4, 1])
    mask = torch.zeros(3, 10).masked_fill(torch.arange(10) >= lengths[:, None], -torch.inf)
    last = torch.stack([query[i, n - 1] for i, n in enumerate(lengths)]).unsqueeze(1)
    out = decode_attention(last, key.transpose(1, 2), value.transpose(1, 2), mask)
    for i, n in enumerate(lengths.tolist()):
        expected = reference(query[i : i + 1, :n], key[i : i + 1, :n], value[i : i + 1, :n])[0, -1]
        torch.testing.assert_close(out[i, 0].double(), expected, rtol=1e-5, atol=1e-6)


def full_reference(query, key, value, visible, bias, scale, softcap):
    """Float64, every step written out."""
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias.double()
    scores = scores if visible is None else scores.masked_fill(~visible.unsqueeze(1), -torch.inf)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("biases", [0, 1, 3])
@pytest.mark.parametrize("masks", [0, 1, 3])
@pytest.mark.parametrize(("t", "s", "h", "g"), [(7, 7, 4, 2), (5, 9, 3, 3), (6, 4, 4, 1), (520, 510, 2, 1)])
def test_masks_biases_caps_and_values_of_another_width(t, s, h, g, masks, biases, softcap):
    if t > 500 and (softcap is None) == (masks == 3):
        pytest.skip("long rows: a few of the cases do")
    generator = torch.Generator().manual_seed(t)
    query = torch.randn(3, t, h, 8, generator=generator)
    key, value = torch.randn(3, s, g, 8, generator=generator), torch.randn(3, s, g, 6, generator=generator)
    visible = None
    if masks:
        visible = torch.rand(masks, t, s, generator=generator) < 0.7
        visible[..., 0] = True
    bias = torch.randn(biases, h, t, s, generator=generator) if biases else None
    results = []
    for function in (attention, full_reference):
        tensors = [x.clone().requires_grad_() for x in (query, key, value, *([] if bias is None else [bias]))]
        b = tensors[3] if biases else None
        if function is attention:
            mask = None if visible is None else mask_of(visible, torch.float32)
            out = attention(*tensors[:3], mask=mask, bias=b, scale=0.5, softcap=softcap)
        else:
            out = full_reference(*tensors[:3], visible, b, 0.5, softcap)
        (out.double() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([out.detach().double(), *(x.grad.double() for x in tensors)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_bias_joins_a_causal_mask_at_any_length():
    for t in (9, 515):
        query, key, value = (x.detach() for x in inputs(1, t, 2, 1, 8))
        bias = torch.randn(1, 2, t, t, generator=torch.Generator().manual_seed(0))
        visible = torch.ones(1, t, t).tril().bool()
        out = attention(query, key, value, causal=True, bias=bias)
        expected = full_reference(query, key, value, visible, bias, 8**-0.5, None)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_row_that_sees_nothing_is_not_nan():
    query, key, value = inputs(1, 4, 2, 2, 8)
    out = attention(query, key, value, mask=mask_of(torch.zeros(1, 4, 4, dtype=torch.bool), torch.float32))
    out.sum().backward()
    assert out.isfinite().all() and query.grad.isfinite().all()


def test_large_masks_are_not_kept_beside_each_other():
    sdpa.forget_masks()
    for t in (40, 41, 600, 601, 602):
        attention(*inputs(1, t, 2, 2, 4), causal=True, softcap=5.0)
    assert (sdpa._keep.cache_info().currsize, sdpa._keep_large.cache_info().currsize) == (2, 1)
    attention(*inputs(1, 602, 2, 2, 4), causal=True, softcap=5.0)
    assert sdpa._keep_large.cache_info().hits == 1  # the other layers of a model
    sdpa.forget_masks()
    assert sdpa._keep.cache_info().currsize == sdpa._keep_large.cache_info().currsize == 0


@pytest.mark.parametrize("t", [5, 200, 600])
def test_no_sequences_are_attended_to(t):
    out = attention(*(x.requires_grad_() for x in inputs(0, t, 2, 2, 4)), causal=True)
    assert out.shape == (0, t, 2, 4)
    out.sum().backward()
