"""Muon: what it makes of singular values, and that batching by shape changes nothing."""

import copy

import pytest
import torch

from athanor.optim.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48), (1, 8), (96, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_are_near_1_and_directions_stay(shape, dtype):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(shape[0]))
    # Well conditioned: five steps lift a singular value by 3.4445^5 = 485 at most.
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    x = u @ torch.diag_embed(0.1 + s / s.max()) @ v
    y = orthogonalise(x * 37.0, dtype)
    assert y.shape == x.shape and y.dtype == x.dtype
    values = torch.linalg.svdvals(y)
    assert values.min() >= 0.6 and values.max() <= 1.3
    turned = u.transpose(1, 2) @ y @ v.transpose(1, 2)  # diagonal where the singular vectors are kept
    off = turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))
    assert off.abs().max() <= (1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("shape", [(192, 512), (320, 192), (64, 64)])
def test_it_is_the_plain_iteration(shape, dtype, tolerance):
    rows, cols = shape
    generator = torch.Generator().manual_seed(5)
    # Singular values over three orders of magnitude, as those of gradients are.
    x = torch.randn(2, rows, cols, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, cols, dtype=torch.float64)
    y = x / torch.linalg.matrix_norm(x, keepdim=True)
    for _ in range(5):
        gram = y @ y.mT
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    found = orthogonalise(x.float(), dtype).double()
    assert float((found - y).square().mean().sqrt() / y.square().mean().sqrt()) <= tolerance


def test_many_at_once_are_one_by_one():
    x = torch.randn(5, 24, 8, generator=torch.Generator().manual_seed(0))
    together = orthogonalise(x, torch.float32)
    for i in range(5):
        torch.testing.assert_close(together[i : i + 1], orthogonalise(x[i : i + 1], torch.float32), rtol=1e-4, atol=1e-5)


def test_a_gradient_of_zero_moves_nothing():
    assert torch.equal(orthogonalise(torch.zeros(2, 4, 6), torch.float32), torch.zeros(2, 4, 6))


def parameters(n=3):
    generator = torch.Generator().manual_seed(7)
    shapes = [(12, 8), (8, 12), (12, 8), (8, 8)][: n + 1]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def step(optimizer, params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def test_it_is_its_formula_matrix_by_matrix():
    params, expected = parameters(), [p.detach().clone() for p in parameters()]
    momenta = [torch.zeros_like(p) for p in expected]
    lr, momentum, decay = 0.03, 0.9, 0.2
    muon = Muon(params, lr, momentum=momentum, weight_decay=decay)
    for seed in range(3):
        step(muon, params, seed)
        for p, w, m in zip(params, expected, momenta, strict=True):
            m.mul_(momentum).add_(p.grad)
            update = orthogonalise((p.grad + momentum * m)[None], torch.float32)[0]
            w.mul_(1 - lr * decay).sub_(update * lr * 0.2 * max(w.shape) ** 0.5)
        for p, w in zip(params, expected, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-5, atol=1e-6)


def test_experts_are_a_batch_of_matrices():
    generator = torch.Generator().manual_seed(3)
    together = torch.nn.Parameter(torch.randn(3, 12, 8, generator=generator))
    apart = [torch.nn.Parameter(x.clone()) for x in together.detach()]
    batch, single = Muon([together], 0.1, weight_decay=0.1), Muon(apart, 0.1, weight_decay=0.1)
    for seed in range(2):
        together.grad = torch.randn(3, 12, 8, generator=generator.manual_seed(seed))
        for p, g in zip(apart, together.grad, strict=True):
            p.grad = g.clone()
        batch.step()
        single.step()
    torch.testing.assert_close(together.detach(), torch.stack([p.detach() for p in apart]), rtol=1e-5, atol=1e-6)


def test_the_size_of_an_update_is_that_of_adamw():
    p = torch.nn.Parameter(torch.zeros(64, 32))
    muon = Muon([p], 0.01)
    step(muon, [p], 0)
    assert float(p.detach().square().mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.2)


def test_parameters_without_a_gradient_are_left_alone():
    params = parameters()
    muon = Muon(params, 0.1)
    params[0].grad = torch.ones_like(params[0])
    before = [p.detach().clone() for p in params]
    muon.step()
    assert not torch.equal(params[0], before[0])
    assert all(torch.equal(p, b) for p, b in zip(params[1:], before[1:], strict=True))
    assert list(muon.state) == [params[0]]


def test_its_state_can_be_saved_and_loaded():
    a, b = parameters(), parameters()
    first, second = Muon(a, 0.1), Muon(b, 0.1)
    step(first, a, 0)
    state = copy.deepcopy(first.state_dict())
    with torch.no_grad():
        for p, q in zip(a, b, strict=True):
            q.copy_(p)
    second.load_state_dict(state)
    step(first, a, 1)
    step(second, b, 1)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
