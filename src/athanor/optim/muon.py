"""Muon (Jordan et al. 2024): momentum whose matrix is orthogonalised before it is applied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from athanor.optim.sharded import gradient, local, part, whole

# Quintic whose iteration drives every singular value into [0.7, 1.2] (Jordan et al. 2024).
_A, _B, _C = 3.4445, -4.7750, 2.0315


_ROUNDS = (2, 3)  # iterations between two looks at X itself: more, and bfloat16 drifts
_LONG = 1.5  # how much longer one side must be than the other for products of Gram matrices to be the cheaper ones


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearly the orthogonal polar factor of each matrix: (N, rows, cols) -> the same, by five Newton-Schulz iterations.

    X <- p(X X^T) X with p(G) = a + b G + c G^2, from X = G / |G|.

    Where one side is much the longer, iterations go over G = X X^T, whose sides are the shorter one, by G <- p(G) G p(G), and
    X is multiplied once by the product of the p(G): the same polynomial in fewer operations, 28 m^3 + 8 m^2 n instead of
    10 m^3 + 20 m^2 n for sides m < n.
    """
    x = matrices.to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)  # the products are of the smaller side
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    if x.shape[2] < _LONG * x.shape[1]:
        for _ in range(sum(_ROUNDS)):
            gram = torch.bmm(x, x.transpose(1, 2))
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    else:
        for steps in _ROUNDS:
            x = torch.bmm(_product(torch.bmm(x, x.transpose(1, 2)), steps), x)
    return (x.transpose(1, 2) if tall else x).to(matrices.dtype)


def _product(gram: Tensor, steps: int) -> Tensor:
    """The product of the polynomials of so many iterations, from the Gram matrix that they begin with."""
    product = None
    for step in range(steps):
        poly = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        poly.diagonal(dim1=1, dim2=2).add_(_A)
        product = poly if product is None else torch.bmm(poly, product)
        if step + 1 < steps:
            gram = torch.bmm(torch.bmm(poly, gram), poly)
    assert product is not None
    return product


class Muon(torch.optim.Optimizer):
    """For matrices of hidden layers; embeddings, norms and outputs belong to AdamW.

    m <- momentum m + g;  u = orthogonalise(g + momentum m);  w <- w (1 - lr decay) - lr 0.2 sqrt(max(rows, cols)) u.

    The factor gives updates the root mean square of AdamW's (Liu et al. 2025), so that both take one learning rate.
    Matrices of one shape are orthogonalised together, which is what makes it cheap for small models. A parameter of more than two
    dimensions (the experts of a mixture) is a batch of matrices.

    Of a parameter that is spread over processes (DTensor) each process keeps its part of the momentum; the matrix is gathered,
    orthogonalised by every process, and each applies its part. All processes must hold the same parameters in the same order.

    Args:
        parameters: matrices.
        lr: learning rate.
        momentum: Nesterov momentum.
        weight_decay: decoupled decay.
        dtype: precision of the orthogonalisation.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # no overloads needed
        """One update of all parameters that have a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            by_shape: dict[Any, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                self._update(params, shape, group)
        return loss

    def _update(self, params: list[Tensor], shape: torch.Size, group: dict[str, Any]) -> None:
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads = [local(gradient(p)) for p in params]
        buffers = [local(self.state[p]["momentum"]) for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, grads)
        nesterov = torch._foreach_add(grads, buffers, alpha=group["momentum"])
        matrices = torch.stack([whole(x, p) for x, p in zip(nesterov, params, strict=True)])
        updates = orthogonalise(matrices.view(-1, *shape[-2:]), self.dtype).view_as(matrices).unbind(0)
        weights = [local(p) for p in params]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        applied = [part(u, p) for u, p in zip(updates, params, strict=True)]
        torch._foreach_add_(weights, applied, alpha=-group["lr"] * 0.2 * max(shape[-2:]) ** 0.5)
