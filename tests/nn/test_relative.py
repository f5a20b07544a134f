"""Relative positions of T5 against transformers' buckets and a plain look-up."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.t5.modeling_t5 import T5Attention

from athanor.nn.relative import RelativeBias, buckets


@given(st.integers(1, 16).map(lambda n: 4 * n), st.integers(1, 200), st.booleans())
def test_buckets_are_those_of_transformers(n_buckets, beyond, both_sides):
    largest = n_buckets // 2 + beyond
    distance = torch.arange(-400, 401)
    expected = T5Attention._relative_position_bucket(distance, both_sides, n_buckets, largest)
    assert torch.equal(buckets(distance, n_buckets, largest, both_sides), expected)


@pytest.mark.parametrize("both_sides", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_values_and_gradients_are_those_of_a_look_up(both_sides, batched):
    torch.manual_seed(0)
    bias = RelativeBias(8, 3, 20, both_sides)
    with torch.no_grad():
        bias.weight.normal_()
    queries, keys = torch.arange(5), torch.arange(7)
    if batched:
        queries, keys = torch.stack((queries, queries + 30)), torch.stack((keys, keys * 3))
    made = bias.for_call()
    found = made(queries, keys)
    assert made(queries, keys) is found  # once for all layers
    distance = keys.unsqueeze(-2) - queries.unsqueeze(-1)
    plain = bias.weight.detach().clone().requires_grad_()
    expected = plain[buckets(distance, 8, 20, both_sides)].movedim(-1, -3)
    assert torch.equal(found, expected)
    upstream = torch.randn_like(expected)
    found.backward(upstream)
    expected.backward(upstream)
    assert torch.allclose(bias.weight.grad, plain.grad, atol=1e-6)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 60), st.integers(0, 60), st.booleans())
def test_steps_may_begin_anywhere(t, s, first, other, both_sides):
    """By diagonals, as steps of one are computed, or entry by entry: the same."""
    bias = RelativeBias(8, 3, 20, both_sides)
    torch.nn.init.normal_(bias.weight, generator=torch.Generator().manual_seed(0))
    queries, keys = torch.arange(first, first + t), torch.arange(other, other + s)
    expected = bias.weight[buckets(keys[None, :] - queries[:, None], 8, 20, both_sides)].permute(2, 0, 1)
    assert torch.equal(bias(queries, keys), expected)
