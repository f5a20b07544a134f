"""Products of matrices against PyTorch's, where oneDNN is asked and where it is not."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from athanor.nn import linear as module
from athanor.nn.linear import Linear, linear
from athanor.nn.norms import RMSNorm

here = pytest.mark.skipif(module._POINTWISE is None, reason="this PyTorch has no oneDNN, or this is no x86")


@pytest.fixture
def asked(monkeypatch):
    """How many products oneDNN was asked for."""
    calls = []
    true = module._multiply
    monkeypatch.setattr(module, "_multiply", lambda *a: calls.append(a) or true(*a))
    return calls


@given(
    shape=st.sampled_from([(64,), (128,), (2, 32), (1, 64), (4, 48), (63,), (65,), (1,), (2, 3, 64), (0,)]),
    inner=st.integers(1, 40),
    outer=st.integers(1, 40),
    bias=st.booleans(),
    twisted=st.booleans(),
)
def test_values_and_gradients_are_pytorchs(shape, inner, outer, bias, twisted):
    torch.manual_seed(inner * 41 + outer)
    x = torch.randn(*shape, inner)
    if twisted:  # not contiguous
        x = torch.randn(inner, *shape).movedim(0, -1)
    given_ = [x, torch.randn(outer, inner), torch.randn(outer) if bias else None]
    mine, theirs = ([None if t is None else t.clone().requires_grad_() for t in given_] for _ in range(2))
    out, expected = linear(*mine), F.linear(*theirs)
    upstream = torch.randn_like(expected)
    assert out.shape == expected.shape
    assert torch.allclose(out, expected, atol=1e-4, rtol=1e-5)
    out.backward(upstream)
    expected.backward(upstream)
    for a, b in zip(mine, theirs, strict=True):
        assert a is None or torch.allclose(a.grad, b.grad, atol=1e-3, rtol=1e-5)


@here
def test_who_is_asked(asked):
    layer = Linear(8, 4)
    layer(torch.randn(64, 8))
    assert len(asked) == 1
    with torch.no_grad():
        layer(torch.randn(2, 64, 8))
    assert len(asked) == 2
    layer(torch.randn(63, 8))  # rows that come once
    layer.bfloat16()(torch.randn(64, 8).bfloat16())
    layer.double()(torch.randn(64, 8).double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.float()(torch.randn(64, 8)).dtype == torch.bfloat16
    assert len(asked) == 2


@here
def test_only_what_needs_a_gradient_is_computed(asked):
    weight = torch.randn(4, 8)
    x = torch.randn(64, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    assert len(asked) == 2 and x.grad is not None  # forward, and the gradient of x
    asked.clear()
    linear(x.detach(), weight.requires_grad_()).sum().backward()
    assert len(asked) == 1 and weight.grad is not None


@here
def test_a_second_derivative_is_refused_and_never_wrong():
    x, weight = torch.randn(64, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_without_onednn(monkeypatch):
    monkeypatch.setattr(module, "_POINTWISE", None)
    layer, x = Linear(8, 4), torch.randn(64, 8)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_it_is_found_or_not(monkeypatch):
    monkeypatch.setattr(module.platform, "machine", lambda: "aarch64")
    assert module._find() is None
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert module._find() is None


def test_weights_may_be_given_from_outside():
    layer, x = Linear(8, 4, bias=False), torch.randn(64, 8)
    other = torch.randn(4, 8)
    assert torch.allclose(functional_call(layer, {"weight": other}, x), x @ other.t(), atol=1e-5)


@here
def test_the_same_product_gives_the_same_bits():
    x, weight = torch.randn(256, 96), torch.randn(200, 96)
    assert all(torch.equal(linear(x, weight), linear(x, weight)) for _ in range(5))


def test_compiled_models_see_pytorchs_product(asked):
    layer = torch.compile(Linear(8, 4), backend="eager", fullgraph=True)
    layer(torch.randn(64, 8))
    assert not asked


def packs(layer):
    module.pack([layer.weight])
    return layer.weight in module._PACKED


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_weight_gives_the_products_of_autocast(dtype, bias, asked):
    layer = Linear(64, 48, bias=bias).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for rows in ((1,), (3, 5), (256,)):
            x = torch.randn(*rows, 64)
            module._PACKED.pop(layer.weight, None)
            plain, before = layer(x), len(asked)
            assert packs(layer)
            found = layer(x)
            assert len(asked) == before + 1 and found.dtype == torch.bfloat16
            torch.testing.assert_close(found, plain, atol=0.02, rtol=0.02)


@here
def test_a_packed_weight_is_read_only_where_it_is_right():
    layer = Linear(64, 48, bias=False)
    x = torch.randn(4, 64)
    with torch.no_grad():
        assert packs(layer)
        assert torch.equal(layer(x), F.linear(x, layer.weight))  # float32 stays float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module._packed(x, layer.weight) is not None
            assert module._packed(torch.randn(1025, 64), layer.weight) is None  # many rows
            layer.weight.mul_(2.0)
            assert module._packed(x, layer.weight) is None  # of other weights
            assert torch.equal(layer(x), F.linear(x, layer.weight))
            module.pack([layer.weight])
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight), atol=0.05, rtol=0.02)
            module._PACKED.pop(layer.weight, None)
            assert module._packed(x, layer.weight) is None
    before = len(module._PACKED)
    assert packs(layer) and len(module._PACKED) == before + 1
    del layer
    assert len(module._PACKED) == before  # nothing outlives its weight


@here
def test_gradients_never_go_through_packed_weights():
    layer = Linear(64, 48)
    assert packs(layer)
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_norm_gives_is_made_again_and_not_kept(precision, offset):
    """The same bits as where it is kept, and no memory of it."""
    torch.manual_seed(0)
    norm, layer, x = RMSNorm(32, offset=offset), Linear(32, 48), torch.randn(2, 64, 32, requires_grad=True)
    with torch.no_grad():
        norm.weight.normal_()
    target, kept = torch.randn(2, 64, 48), []

    def gradients(forget):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            normed = norm(x)
            given = normed.view_as(normed) if forget else normed  # a view knows nothing of how it was made
            with saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
                out = layer(given)
        assert (normed.data_ptr() in kept) == forget
        kept.clear()
        return torch.autograd.grad((out.float() * target).sum(), [x, *norm.parameters(), *layer.parameters()])

    for again, plain in zip(gradients(forget=False), gradients(forget=True), strict=True):
        assert torch.equal(again, plain)


def test_what_it_is_made_of_may_not_change_before_the_backward_pass():
    norm, layer = RMSNorm(32), Linear(32, 64)
    x = torch.randn(64, 32, requires_grad=True) * 1
    out = layer(norm(x))
    with torch.no_grad():
        norm.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@here
def test_weights_of_experts_are_kept_in_bfloat16_until_they_change():
    weight = torch.nn.Parameter(torch.randn(3, 8, 4))
    assert torch.equal(module.narrowed(weight, torch.bfloat16), weight.bfloat16())
    module.pack([weight])
    kept = module.narrowed(weight, torch.bfloat16)
    assert kept is module.narrowed(weight, torch.bfloat16)
    assert torch.equal(kept, weight.bfloat16())
    assert module.narrowed(weight, torch.float32).data_ptr() == weight.data_ptr()
    with torch.no_grad():
        weight.mul_(2.0)
    assert torch.equal(module.narrowed(weight, torch.bfloat16), weight.bfloat16())
    assert module.narrowed(weight, torch.bfloat16) is not kept
    before = len(module._PACKED)
    del weight
    assert len(module._PACKED) == before - 1
