"""Adafactor (Shazeer and Stern 2018): the second moments of a matrix are kept as those of its rows and of its columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from athanor.optim.sharded import gradient, local, mean_square, part, whole

_EPS_SQUARE = 1e-30  # added to squared gradients
_EPS_WEIGHT = 1e-3  # the least root mean square that a weight counts as having, where steps are relative to it


class Adafactor(torch.optim.Optimizer):
    """Rows and columns instead of a second moment for each weight; no first moment.

    With b = 1 - t^decay in step t, of a matrix (rows m, columns n; of each matrix in a parameter of more dimensions):

        r <- b r + (1 - b) mean over columns of g^2;  c <- b c + (1 - b) mean over rows of g^2;  v = r c^T / mean(r)

    and of a vector v <- b v + (1 - b) g^2. Then u = g / sqrt(v), u <- u / max(1, RMS(u) / clip), w <- w (1 - lr decay) - a u,
    with a = lr, or, where steps are relative, a = min(lr, 1/sqrt(t)) max(0.001, RMS(w)) (algorithm 4 of the paper;
    torch.optim.Adafactor has only these).

    The state of a matrix is `step`, `row` (m, 1) and `column` (1, n), that of a vector `step` and `variance`; of parameters that
    are spread over processes (DTensor) all processes keep it whole.

    Args:
        parameters: what is trained.
        lr: learning rate.
        decay: exponent of t; negative.
        clip: largest root mean square of an update before it is multiplied by the rate.
        weight_decay: decoupled decay.
        relative: whether steps are relative to the size of the weights.
    """

    whole_state = ("row", "column", "variance")  # of the whole parameter, on every process: for those who write checkpoints

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        decay: float = -0.8,
        clip: float = 1.0,
        weight_decay: float = 0.0,
        relative: bool = False,
    ) -> None:
        defaults = {"lr": lr, "decay": decay, "clip": clip, "weight_decay": weight_decay, "relative": relative}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # no overloads needed
        """One update of all parameters that have a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        grad = whole(local(gradient(p)), p).float()
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())
            if grad.ndim > 1:
                state["row"] = grad.new_zeros(*grad.shape[:-1], 1)
                state["column"] = grad.new_zeros(*grad.shape[:-2], 1, grad.shape[-1])
            else:
                state["variance"] = torch.zeros_like(grad)
        state["step"] += 1
        t = float(state["step"])
        weight = t ** group["decay"]
        square = grad.square().add_(_EPS_SQUARE)
        if grad.ndim > 1:
            row = state["row"].lerp_(square.mean(-1, keepdim=True), weight)
            column = state["column"].lerp_(square.mean(-2, keepdim=True), weight)
            update = grad * (row / row.mean(-2, keepdim=True)).rsqrt() * column.rsqrt()
        else:
            update = grad * state["variance"].lerp_(square, weight).rsqrt()
        rate = group["lr"]
        if group["relative"]:
            size = float(mean_square(whole(local(p), p).float())) ** 0.5
            rate = min(rate, t**-0.5) * max(_EPS_WEIGHT, size)
        update *= rate / max(1.0, float(mean_square(update)) ** 0.5 / group["clip"])
        weights = local(p)
        weights.mul_(1 - group["lr"] * group["weight_decay"]).sub_(part(update, p))
