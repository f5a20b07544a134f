"""Feed-forward blocks against plain operations under autograd, and what they keep for it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from athanor.nn.feedforward import ACTIVATIONS, FeedForward, GatedFeedForward
from athanor.nn.linear import Linear

BLOCKS = [(GatedFeedForward, False), (GatedFeedForward, True), (FeedForward, False), (FeedForward, True)]


def plainly(block, x):
    """The block by operations of PyTorch alone."""
    first = block.gate_up if isinstance(block, GatedFeedForward) else block.up
    inner = F.linear(x, first.weight, first.bias)
    function = ACTIVATIONS[block.activation]
    if isinstance(block, GatedFeedForward):
        gate, up = inner.chunk(2, dim=-1)
        inner = function(gate) * up
    else:
        inner = function(inner)
    return F.linear(inner, block.down.weight, block.down.bias)


def gradients(out, block, x, direction):
    return torch.autograd.grad(out, [x, *block.parameters()], direction)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize(("kind", "bias"), BLOCKS)
def test_values_and_gradients_are_those_of_plain_operations(kind, bias, activation):
    torch.manual_seed(0)
    block = kind(6, 10, activation, bias).double()
    x, direction = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 6, dtype=torch.float64)
    out, expected = block(x), plainly(block, x)
    assert torch.allclose(out, expected, rtol=0, atol=1e-14)
    for mine, theirs in zip(gradients(out, block, x, direction), gradients(expected, block, x, direction), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("kind", "bias"), BLOCKS)
def test_under_autocast_they_are_those_of_autocast(kind, bias):
    torch.manual_seed(0)
    block = kind(64, 96, "gelu", bias)
    x, direction = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = block(x), plainly(block, x)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    for mine, theirs in zip(
        gradients(out, block, x, direction.bfloat16()), gradients(expected, block, x, direction.bfloat16()), strict=True
    ):
        assert mine.dtype == torch.float32
        assert torch.allclose(mine, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))


def kept(call, *known):
    """Bytes that a call keeps for the backward pass, beside tensors that are there anyway."""
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16):
        out = call()
    for tensor in known:
        found.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(found.values()), out


def test_no_more_is_kept_than_the_input_and_what_is_between():
    """In bfloat16: the input, and gate and up; no copy of a weight, no activation."""
    block = GatedFeedForward(64, 96)
    x = torch.randn(128, 64, requires_grad=True)
    found, _ = kept(lambda: block(x), x, *block.parameters())
    assert found == 2 * 128 * (64 + 2 * 96)


def test_of_weights_that_do_not_learn_no_input_is_kept():
    layer = Linear(64, 96)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    x = torch.randn(128, 64, requires_grad=True)
    assert kept(lambda: layer(x), x, *layer.parameters())[0] == 0


class Doubled(nn.Module):
    """Stands in for what adaptation makes of a layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def test_a_last_layer_that_was_replaced_or_is_watched_is_called():
    block = GatedFeedForward(8, 16)
    x, seen = torch.randn(3, 8), []
    plain = block(x)
    block.down.register_forward_hook(lambda *given: seen.append(given))
    assert torch.equal(block(x), plain) and len(seen) == 1
    block.down = Doubled(block.down)
    assert torch.equal(block(x), 2 * plain) and len(seen) == 2


def test_a_graph_that_is_kept_is_right_the_second_time_too():
    block = GatedFeedForward(8, 16)
    x = torch.randn(3, 8, requires_grad=True)
    out = block(x).sum()
    first = torch.autograd.grad(out, list(block.parameters()), retain_graph=True)
    second = torch.autograd.grad(out, list(block.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
