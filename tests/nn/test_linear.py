"""Products of matrices against PyTorch's, where oneDNN is asked and where it is not."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from athanor.nn import linear as module
from athanor.nn.feedforward import GatedFeedForward
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


@pytest.fixture
def halved(monkeypatch):
    """As where MKL computes with half of the vectors."""
    monkeypatch.setattr(module, "_HALVED", True)


@pytest.fixture
def whole(monkeypatch):
    """As where MKL computes with all of them."""
    monkeypatch.setattr(module, "_HALVED", False)


@given(
    shape=st.sampled_from([(64,), (128,), (2, 32), (1, 64), (4, 48), (63,), (65,), (1,), (2, 3, 64), (5, 5), (300,), (0,)]),
    inner=st.integers(1, 40),
    outer=st.integers(1, 40),
    bias=st.booleans(),
    twisted=st.booleans(),
    halves=st.booleans(),
    work=st.sampled_from([0, module._WORK]),
)
def test_values_and_gradients_are_pytorchs(shape, inner, outer, bias, twisted, halves, work):
    torch.manual_seed(inner * 41 + outer)
    x = torch.randn(*shape, inner)
    if twisted:  # not contiguous
        x = torch.randn(inner, *shape).movedim(0, -1)
    given_ = [x, torch.randn(outer, inner), torch.randn(outer) if bias else None]
    mine, theirs = ([None if t is None else t.clone().requires_grad_() for t in given_] for _ in range(2))
    with mock.patch.object(module, "_HALVED", halves), mock.patch.object(module, "_WORK", work):
        out, expected = linear(*mine), F.linear(*theirs)
        upstream = torch.randn_like(expected)
        assert out.shape == expected.shape
        assert torch.allclose(out, expected, atol=1e-4, rtol=1e-5)
        out.mul_(2.0)  # whoever gets it may change it
        out.backward(upstream)
        expected.mul(2.0).backward(upstream)
    for a, b in zip(mine, theirs, strict=True):
        assert a is None or torch.allclose(a.grad, b.grad, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("make", [Linear, lambda i, o, bias: GatedFeedForward(i, o, bias=bias)])
def test_what_comes_out_may_be_changed_in_place(make, precision, bias):
    layer, x = make(128, 64, bias=bias), torch.randn(2, 32, 128)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        plain, changed = layer(x) * 2.0, layer(x).mul_(2.0)
    assert torch.equal(plain, changed)
    changed.sum().backward()


@given(st.integers(1, 1 << 14))
def test_rows_are_filled_up_by_few(n):
    filled = module._coarse(n)
    assert n <= filled <= n + max(15, n // 8) and module._coarse(filled) == filled
    assert filled == n or n > 16


def test_few_numbers_of_rows_have_code():
    assert len({module._coarse(n) for n in range(1, 4097)}) < 64


@here
def test_who_is_asked(asked, whole, monkeypatch):
    layer = Linear(8, 4)
    layer(torch.randn(64, 8))
    assert not asked  # too little work
    monkeypatch.setattr(module, "_WORK", 8 * 4)
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
@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize(("rows", "given_"), [(1, 1), (7, 7), (17, 32), (100, 112), (64, 64), (448, 448), (513, 576)])
def test_ragged_rows_are_filled_up_where_mkl_is_halved(rows, given_, graded, halved, monkeypatch):
    seen = []
    true = module._POINTWISE
    monkeypatch.setattr(module, "_POINTWISE", lambda x, *a: seen.append(x.shape) or true(x, *a))
    x, layer = torch.randn(rows, 1024, requires_grad=graded), Linear(1024, 640)
    with torch.set_grad_enabled(graded):
        out = layer(x)
    assert seen == [(given_, 1024)]
    assert out.shape == (rows, 640) and out.is_contiguous() and not out._is_view()
    torch.testing.assert_close(out, F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)


@here
@pytest.mark.parametrize(("rows", "calls"), [(512, 3), (100, 2)])
def test_all_three_products_where_mkl_is_halved(rows, calls, halved, asked):
    """That of the gradient of W has N in the middle, where nothing is filled up."""
    x, layer = torch.randn(rows, 96, requires_grad=True), Linear(96, 160)
    layer(x).square().sum().backward()
    assert len([a for a in asked if len(a[0]) in (rows, 160)]) == calls


@here
@pytest.mark.parametrize(("rows", "calls"), [(512, 1), (500, 0)])
def test_outer_products(rows, calls, halved, asked):
    left, right = torch.randn(rows, 96), torch.randn(rows, 160)
    made = module.outer(left, right)
    assert len(asked) == calls and made.is_contiguous()
    torch.testing.assert_close(made.double(), left.double().t() @ right.double(), atol=1e-3, rtol=1e-4)
    assert module.outer(left.bfloat16(), right.bfloat16()).dtype == torch.bfloat16 and len(asked) == calls


@here
def test_only_what_needs_a_gradient_is_computed(asked, whole):
    weight = torch.randn(64, 128)
    x = torch.randn(64, 128, requires_grad=True)
    linear(x, weight).sum().backward()
    assert len(asked) == 2 and x.grad is not None  # forward, and the gradient of x
    asked.clear()
    linear(x.detach(), weight.requires_grad_()).sum().backward()
    assert len(asked) == 1 and weight.grad is not None


@here
def test_a_second_derivative_is_refused_and_never_wrong():
    x, weight = torch.randn(64, 128, requires_grad=True), torch.randn(64, 128, requires_grad=True)
    with pytest.raises(RuntimeError, match="Product gives first derivatives only"):
        torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)


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


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("changed", ["what it gives", "what it is given"])
def test_what_was_changed_in_place_is_kept_and_not_made_again(changed, frozen):
    torch.manual_seed(0)
    norm, layer, x = RMSNorm(32), Linear(32, 48), torch.randn(64, 32)
    norm.requires_grad_(not frozen)
    y = norm(x)
    (y if changed == "what it gives" else x).mul_(2.0).add_(1.0)
    if changed == "what it is given" and not frozen:  # the norm's own gradient needs it as it was, and PyTorch says so
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            layer(y).sum().backward()
        return
    layer(y).square().sum().backward()
    weight = layer.weight.detach().clone().requires_grad_()
    F.linear(y.detach(), weight, layer.bias).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad)


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
