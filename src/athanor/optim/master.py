"""Weights of 16 bits that are trained through float32 copies of them (Micikevicius et al. 2018, section 3.1).

bfloat16 has 8 bits of mantissa: adding an update smaller than 1/512 of a weight changes nothing, and with small rates most are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from athanor.optim.sharded import local


class Masters(torch.optim.Optimizer):
    """An optimiser of float32 copies ("masters") of parameters of 16 bits.

    A step copies gradients up, updates the masters, and rounds them into the weights. The state of a parameter is that of the
    inner optimiser and `master`, so that a checkpoint holds it. A parameter whose state is gone begins anew from its weights.

    Args:
        groups: parameter groups, as optimisers take them.
        make: from groups to the optimiser that updates the masters.
    """

    def __init__(self, groups: list[dict[str, Any]], make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> None:
        self.inner = make([{**g, "params": [nn.Parameter(p.detach().float()) for p in g["params"]]} for g in groups])
        super().__init__(groups, self.inner.defaults)
        for p, master in self._pairs():
            self.state[p] = {"master": master.detach()}
        self.whole_state = getattr(self.inner, "whole_state", ())

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        groups = zip(self.param_groups, self.inner.param_groups, strict=True)
        return [pair for outer, inner in groups for pair in zip(outer["params"], inner["params"], strict=True)]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # no overloads needed
        """One update of all parameters that have a gradient."""
        loss = None if closure is None else closure()
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner |= {name: value for name, value in outer.items() if name != "params"}
        pairs = self._pairs()
        for p, master in pairs:
            held = self.state[p]
            stored = held.get("master", p)
            if local(stored).data_ptr() != local(master).data_ptr():  # of a checkpoint
                local(master).copy_(local(stored))
            self.inner.state[master] = {name: value for name, value in held.items() if name != "master"}
            master.grad = None if p.grad is None else p.grad.float()
        self.inner.step()
        for p, master in pairs:
            self.state[p] = {**self.inner.state[master], "master": master.detach()}
            if p.grad is not None:
                local(p).copy_(local(master))
            master.grad = None
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which rounds a state to the dtype of its parameter: the masters and the moments are kept as they are."""
        super().load_state_dict(state_dict)
        order = [i for group in state_dict["param_groups"] for i in group["params"]]
        for (p, _), i in zip(self._pairs(), order, strict=True):
            self.state[p] = {name: _copied(value, p) for name, value in state_dict["state"].get(i, {}).items()}


def _copied(value: Any, p: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone() if value.ndim == 0 else value.detach().to(p.device, copy=True)
