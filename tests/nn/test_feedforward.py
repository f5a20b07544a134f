"""Feed-forward blocks against their formulas."""

import torch

from athanor.nn.feedforward import FeedForward, GatedFeedForward


def test_swiglu_is_its_formula():
    torch.manual_seed(0)
    block = GatedFeedForward(8, 12)
    x = torch.randn(2, 3, 8)
    gate, up = block.gate_up.weight[:12], block.gate_up.weight[12:]
    a = x @ gate.T
    expected = (a * torch.sigmoid(a) * (x @ up.T)) @ block.down.weight.T
    torch.testing.assert_close(block(x), expected)


def test_two_matrices_and_an_activation_are_their_formula():
    torch.manual_seed(0)
    block = FeedForward(8, 12, "relu")
    x = torch.randn(2, 3, 8)
    expected = (x @ block.up.weight.T + block.up.bias).clamp(min=0) @ block.down.weight.T + block.down.bias
    torch.testing.assert_close(block(x), expected)
