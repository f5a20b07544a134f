"""SwiGLU against its formula."""

import torch

from athanor.nn.feedforward import SwiGLU


def test_it_is_its_formula():
    torch.manual_seed(0)
    block = SwiGLU(8, 12)
    x = torch.randn(2, 3, 8)
    gate, up = block.gate_up.weight[:12], block.gate_up.weight[12:]
    a = x @ gate.T
    expected = (a * torch.sigmoid(a) * (x @ up.T)) @ block.down.weight.T
    torch.testing.assert_close(block(x), expected)
