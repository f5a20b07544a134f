"""The experts in C++ beside those in PyTorch, beside float64, and beside transformers' own module."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from athanor.nn import experts as experts_
from athanor.nn import native
from athanor.nn.moe import Experts, MixtureOfExperts, SoftmaxRouter
from tests.nn.test_moe import distance

HAS = {dtype: native._function(dtype) is not None for dtype in (torch.float32, torch.bfloat16)}
needs_fp32 = pytest.mark.skipif(not HAS[torch.float32], reason="no C++ of our own here")
DTYPES = [
    pytest.param(
        dtype, marks=pytest.mark.skipif(not has, reason=f"no C++ of our own for {dtype} on this machine"), id=str(dtype)[6:]
    )
    for dtype, has in HAS.items()
]
# Of the greatest value: rounding of sums in float32, and of what is rounded to bfloat16 on the way.
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


@contextlib.contextmanager
def counting(patch):
    """A list with an entry for every call of the C++."""
    calls, real = [], native.experts
    patch.setattr(native, "experts", lambda *args: calls.append(1) or real(*args))
    yield calls


@contextlib.contextmanager
def by(monkeypatch, ours):
    """Whether C++ computes, and that it does."""
    with monkeypatch.context() as patch, counting(patch) as calls:
        if not ours:
            patch.setattr(native, "computes", lambda *_: False)
        yield
    assert bool(calls) == ours


def case(n, n_experts, k, width, hidden, gated, dtype, none=0.2):
    g = torch.Generator().manual_seed(n)
    shapes = ((n, width), (n_experts, hidden * (2 if gated else 1), width), (n_experts, width, hidden), (n, k))
    x, up, down, weights = (torch.randn(s, generator=g).mul_(0.4).to(dtype).requires_grad_() for s in shapes)
    chosen = torch.rand(n, n_experts, generator=g).topk(k).indices
    chosen[torch.rand(n, k, generator=g) < none] = n_experts
    return (x, up, down, weights), chosen


def computed(parts, chosen, activation):
    """The output without gradients, and with them."""
    x, up, down, weights = parts
    out = experts_._Mixture.apply(x, up, down, chosen, weights, activation, False, x.dtype)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    given = [p.detach() for p in parts]
    alone = experts_._mixture(*given[:3], chosen, given[3], activation, False, keep=False).out
    return [alone, out.detach(), *torch.autograd.grad(out, parts, direction)]


# Experts of one tile of 16 rows, of two, three, four and more; of none; widths that no block of 64 columns divides.
SIZES = [
    (1, 4, 2, 32, 16),
    (5, 4, 2, 32, 16),
    (40, 5, 2, 64, 48),
    (100, 2, 1, 96, 80),
    (130, 2, 1, 160, 144),
    (300, 7, 3, 64, 32),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_outputs_and_gradients_are_those_of_pytorch(dtype, gated, activation, sizes, monkeypatch):
    parts, chosen = case(*sizes, gated, dtype)
    with by(monkeypatch, True):
        found = computed(parts, chosen, activation)
    with by(monkeypatch, False):
        wanted = computed(parts, chosen, activation)
    assert torch.equal(found[0], found[1])
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        assert distance(a, b) <= CLOSE[dtype]


@needs_fp32
@given(st.lists(st.integers(0, 70), min_size=1, max_size=6), st.integers(0, 5), st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_row_is_computed_by_its_expert(counts, more, keep):
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(counts) + more, 32, generator=g)
    up, down = torch.randn(len(counts), 32, 32, generator=g), torch.randn(len(counts), 32, 16, generator=g)
    ends = torch.tensor(counts).cumsum(0).int()
    inner, y = native.experts(rows, ends, up, down, "silu", keep)
    start = 0
    for e, end in enumerate(ends.tolist()):
        first = rows[start:end].double() @ up[e].double().T
        expected = (F.silu(first[:, :16]) * first[:, 16:]) @ down[e].double().T
        torch.testing.assert_close(y[start:end].double(), expected, atol=1e-3, rtol=1e-5)
        if keep:
            torch.testing.assert_close(inner[start:end].double(), first, atol=1e-4, rtol=1e-5)
        start = end
    assert (inner is not None) == keep
    assert y.shape == rows.shape


@needs_fp32
def test_silu_is_exact_to_a_few_units_in_the_last_place():
    x = torch.cat((torch.linspace(-80, 80, 4001), torch.tensor([0.0, 1e-30, -1e-30, 1e-4, 300.0, -300.0])))
    rows = torch.zeros(len(x), 32)
    rows[:, 0], rows[:, 1] = x, 1
    up, down = torch.zeros(1, 32, 32), torch.zeros(1, 32, 16)
    up[0, 0, 0] = up[0, 16, 1] = down[0, 0, 0] = 1  # silu(x) times 1
    y = native.experts(rows, torch.tensor([len(x)], dtype=torch.int32), up, down, "silu", False)[1][:, 0]
    torch.testing.assert_close(y.double(), F.silu(x.double()), rtol=5e-7, atol=1e-30)


@needs_fp32
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_of_what_is_far_below_zero_is_zero(dtype):
    x = torch.tensor([-100.0, -1e3, -1e30, -1e36, -1e38, -3e38, 3e38]).to(dtype)
    rows = torch.zeros(len(x), 32, dtype=dtype)
    rows[:, 0], rows[:, 1] = x, 1
    up, down = torch.zeros(1, 32, 32, dtype=dtype), torch.zeros(1, 32, 16, dtype=dtype)
    up[0, 0, 0] = up[0, 16, 1] = down[0, 0, 0] = 1
    y = native.experts(rows, torch.tensor([len(x)], dtype=torch.int32), up, down, "silu", False)[1][:, 0]
    assert y[:6].abs().max() < 1e-30 and y[6] == rows[6, 0]


@needs_fp32
@pytest.mark.parametrize(
    ("width", "up", "down", "ends"),
    [
        (32, (4, 32, 64), (4, 64, 16), (4, torch.int32)),
        (128, (4, 32, 64), (4, 64, 16), (4, torch.int32)),
        (64, (2, 32, 64), (4, 64, 16), (4, torch.int32)),
        (64, (4, 48, 64), (4, 64, 16), (4, torch.int32)),
        (64, (4, 32, 64), (4, 64, 16), (3, torch.int32)),
        (64, (4, 32, 64), (4, 64, 16), (4, torch.int64)),
    ],
)
def test_what_does_not_go_together_is_refused_before_memory_is_touched(width, up, down, ends):
    bounds = torch.full((ends[0],), 10, dtype=ends[1])
    with pytest.raises(ValueError, match=r"rows \(10, .* do not go together: they must be \(S, D\), \(E,\) int32"):
        native.experts(torch.zeros(10, width), bounds, torch.zeros(up), torch.zeros(down), "silu", False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_lost_and_stays_in_its_row(dtype, activation, value):
    (x, up, down, _), _ = case(20, 2, 1, 32, 16, True, dtype)
    with torch.no_grad():
        x[3, 5] = value
        y = native.experts(x, torch.tensor([12, 20], dtype=torch.int32), up, down, activation, False)[1]
    assert not y[3].isfinite().any()
    assert y[[i for i in range(20) if i != 3]].isfinite().all()


@needs_fp32
def test_a_block_is_that_of_transformers(monkeypatch):
    config = Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=48, num_experts=6, num_experts_per_tok=3, norm_topk_prob=True)
    theirs = Qwen3MoeSparseMoeBlock(config)
    ours = MixtureOfExperts(SoftmaxRouter(64, 6, 3, normalise=True), Experts(6, 64, 48))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.2)
        ours.router.weight.copy_(theirs.gate.weight)
        ours.experts.gate_up.weight.copy_(theirs.experts.gate_up_proj)
        ours.experts.down.weight.copy_(theirs.experts.down_proj)
    x = torch.randn(2, 50, 64)
    with by(monkeypatch, True):
        out = ours(x)
        with torch.no_grad():
            alone = ours(x)
    expected = theirs(x)
    assert torch.equal(out.detach(), alone)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    direction = torch.randn_like(out)
    out.backward(direction)
    expected.backward(direction)
    torch.testing.assert_close(ours.experts.gate_up.weight.grad, theirs.experts.gate_up_proj.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.experts.down.weight.grad, theirs.experts.down_proj.grad, atol=1e-5, rtol=1e-4)


@needs_fp32
@pytest.mark.parametrize(
    ("sizes", "activation", "ours"),
    [
        ((4, 2, 1, 32, 16), "silu", True),
        ((4, 2, 1, 16, 16), "silu", False),
        ((4, 2, 1, 32, 8), "silu", False),
        ((4, 2, 1, 32, 16), "gelu", False),
    ],
    ids=["what it is made for", "width", "hidden", "activation"],
)
def test_what_it_is_not_made_for_goes_to_pytorch(sizes, activation, ours, monkeypatch):
    parts, chosen = case(*sizes, True, torch.float32)
    with counting(monkeypatch) as calls:
        out = computed(parts, chosen, activation)[0]
    assert bool(calls) == ours
    assert out.isfinite().all()


@needs_fp32
def test_threads_change_nothing():
    parts, chosen = case(100, 5, 2, 64, 48, True, torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(computed(parts, chosen, "silu")[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_in_bfloat16_are_left_to_a_matrix_unit(dtype, monkeypatch):
    (x, up, down, _), _ = case(4, 2, 1, 32, 16, True, dtype)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    x = x.detach()
    assert native.computes(x, up, down, 64, "silu")
    assert native.computes(x, up, down, 65, "silu") == (dtype == torch.float32)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert native.computes(x, up, down, 65, "silu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_bits_in_any_company(dtype):
    """Law L2 to the last bit: alone, and among enough others for one, two, three and more tiles."""
    (rows, up, down, _), _ = case(70, 1, 1, 64, 48, True, dtype)
    rows, up, down = rows.detach(), up.detach(), down.detach()
    whole = native.experts(rows, torch.tensor([70], dtype=torch.int32), up, down, "silu", False)[1]
    for n in (1, 16, 17, 40, 64):
        for start in (0, 6):
            some = rows[start : start + n]
            found = native.experts(some, torch.tensor([n], dtype=torch.int32), up, down, "silu", False)[1]
            assert torch.equal(found, whole[start : start + n])


@needs_fp32
@pytest.mark.parametrize("keep", [False, True])
def test_it_is_an_operation_whose_shapes_are_known_without_running_it(keep):
    (rows, up, down, _), _ = case(20, 2, 1, 32, 16, True, torch.float32)
    args = (rows.detach(), torch.tensor([12, 20], dtype=torch.int32), up.detach(), down.detach(), False, keep)
    torch.library.opcheck(torch.ops.athanor.experts.default, args, test_utils=("test_schema", "test_faketensor"))
