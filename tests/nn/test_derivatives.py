"""Second derivatives: right where there are any, refused where a backward pass is written by hand."""

import importlib
import inspect
import pkgutil

import pytest
import torch
from torch.autograd import Function, gradgradcheck

import athanor.nn
import athanor.train.parallel
from athanor.nn.context import _Gather, _Ungather
from athanor.nn.crf import CRF
from athanor.nn.feedforward import FeedForward, GatedFeedForward
from athanor.nn.linear import Linear
from athanor.nn.loss import linear_cross_entropy, token_logprobs
from athanor.nn.moe import Experts
from athanor.nn.norms import RMSNorm
from athanor.nn.positions import _Rotate
from athanor.nn.sdpa import attention

LINEAR = {_Gather, _Ungather, _Rotate}  # whose backward passes are made of what PyTorch differentiates


def functions():
    for room in (athanor.nn, athanor.train.parallel):
        for found in pkgutil.iter_modules(room.__path__, room.__name__ + "."):
            module = importlib.import_module(found.name)
            for _, kind in inspect.getmembers(module, inspect.isclass):
                if issubclass(kind, Function) and kind.__module__ == module.__name__:
                    yield kind


def test_every_function_of_our_own_refuses_or_is_linear():
    found = set(functions())
    assert len(found) > 10 and found >= LINEAR
    assert {kind for kind in found if not hasattr(kind.backward, "__wrapped__")} == LINEAR


def rows(n=64, width=128):
    return torch.randn(n, width, requires_grad=True)


def attended(t):
    q = torch.randn(1, t, 2, 4, requires_grad=True)
    return attention(q, torch.randn(1, t, 2, 4), torch.randn(1, t, 2, 4), causal=True), q


def of(module, x=None):
    x = rows() if x is None else x
    return module(x), x


def mixture():
    x = rows(16, 32)
    return Experts(2, 32, 16)(x, torch.randint(2, (16, 1)), torch.ones(16, 1)), x


def cross_entropy():
    x = rows()
    return linear_cross_entropy(x, torch.randn(50, 128), torch.randint(50, (64,)))[0], x


def log_probabilities():
    x = rows()
    return token_logprobs(x, torch.randn(50, 128), torch.randint(50, (64,)), torch.ones(64))[0], x


def log_partition():
    x = torch.randn(2, 5, 3, requires_grad=True)
    return CRF(3).log_partition(x, torch.tensor([5, 4])), x


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("RMSNorm", lambda: of(RMSNorm(128))),
        ("Product", lambda: of(Linear(128, 64))),
        ("Second", lambda: of(GatedFeedForward(128, 64))),
        ("Second", lambda: of(FeedForward(128, 64))),
        ("Attention", lambda: attended(8)),
        ("CausalAttention", lambda: attended(200)),
        ("Mixture", mixture),
        ("LinearCrossEntropy", cross_entropy),
        ("TokenLogProbs", log_probabilities),
        ("LogPartition", log_partition),
    ],
)
def test_a_graph_of_the_gradients_is_refused(name, make):
    """Not even where what comes in is a constant, as for the gradient of a sum."""
    torch.manual_seed(0)
    out, x = make()
    with pytest.raises(RuntimeError, match=rf"{name} gives first derivatives only.*take finite differences"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
    out, x = make()
    (first,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    (again,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(first, again)


def test_a_whole_model_refuses_it_too(tiny):
    model = tiny()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(model(torch.arange(8)[None]).sum(), list(model.parameters()), create_graph=True, allow_unused=True)


def test_linear_ones_have_second_derivatives():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    order = torch.tensor([2, 0, 3, 1])
    assert gradgradcheck(lambda x: _Gather.apply(x, order, order.argsort()).pow(3), x)
    assert gradgradcheck(lambda x: _Ungather.apply(x, order).pow(3), x)
    turned = torch.randn(1, 3, 2, 4, requires_grad=True)
    angle = torch.randn(3, 1, 4)
    (first,) = torch.autograd.grad(_Rotate.apply(turned, angle.cos(), angle.sin()).pow(3).sum(), turned, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), turned)
    assert second.abs().sum() > 0
