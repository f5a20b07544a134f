"""Mixtures of experts against transformers' modules, plain loops and laws."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig, SwitchTransformersConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP, router_z_loss_func

from athanor.core.errors import ConfigError
from athanor.nn import experts as experts_
from athanor.nn import moe
from athanor.nn.feedforward import ACTIVATIONS, GatedFeedForward
from athanor.nn.moe import Experts, MixtureOfExperts, SigmoidRouter, SoftmaxRouter

D, WIDTH, E = 16, 12, 6


def randomise(module, std=0.3):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in (*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())):
            p.normal_(std=std)
    return module


def tokens(*shape, seed=1):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def distance(a, b):
    """Greatest difference, as a part of the greatest of b."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).abs().max() / b.abs().max())


def same_as(ours, theirs, pairs, x):
    """Outputs and gradients, where `pairs` are (our parameter, their parameters that it is made of)."""
    with torch.no_grad():
        for mine, yours in pairs:
            mine.copy_(yours())
    y = x.detach().clone().requires_grad_()
    out, expected = ours(x), theirs(y)
    assert expected.std() > 0.01
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    direction = torch.randn_like(out)
    out.backward(direction)
    expected.backward(direction)
    torch.testing.assert_close(x.grad, y.grad, atol=1e-6, rtol=1e-4)
    for p in theirs.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    for mine, yours in pairs:
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, yours(), atol=1e-6, rtol=1e-4)


def stacked(ours, theirs):
    return [
        (ours.experts.gate_up.weight, lambda: theirs.experts.gate_up_proj),
        (ours.experts.down.weight, lambda: theirs.experts.down_proj),
        (ours.router.weight, lambda: theirs.gate.weight),
    ]


@pytest.mark.parametrize("k", [1, 2, 6])
def test_mixtral_block_is_theirs(k):
    config = MixtralConfig(hidden_size=D, intermediate_size=WIDTH, num_local_experts=E, num_experts_per_tok=k)
    theirs = randomise(MixtralSparseMoeBlock(config))
    ours = MixtureOfExperts(SoftmaxRouter(D, E, k, normalise=True), Experts(E, D, WIDTH))
    same_as(ours, theirs, stacked(ours, theirs), tokens(3, 7))


@pytest.mark.parametrize("normalise", [False, True])
def test_qwen_block_is_theirs(normalise):
    config = Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=WIDTH, num_experts=E, num_experts_per_tok=3, norm_topk_prob=normalise
    )
    theirs = randomise(Qwen3MoeSparseMoeBlock(config))
    ours = MixtureOfExperts(SoftmaxRouter(D, E, 3, normalise=normalise), Experts(E, D, WIDTH))
    same_as(ours, theirs, stacked(ours, theirs), tokens(3, 7))


@pytest.mark.parametrize(("groups", "top", "normalise"), [(1, 1, True), (4, 2, True), (3, 1, False), (4, 4, False)])
def test_deepseek_block_is_theirs(groups, top, normalise):
    config = DeepseekV3Config(
        hidden_size=D, moe_intermediate_size=WIDTH, n_routed_experts=12, num_experts_per_tok=3, n_shared_experts=2,
        n_group=groups, topk_group=top, norm_topk_prob=normalise, routed_scaling_factor=1.5,
    )  # fmt: skip
    theirs = randomise(DeepseekV3MoE(config))
    router = SigmoidRouter(D, 12, 3, n_groups=groups, top_groups=top, normalise=normalise, scale=1.5)
    ours = MixtureOfExperts(router, Experts(12, D, WIDTH), GatedFeedForward(D, 2 * WIDTH))
    shared = theirs.shared_experts
    assert theirs.gate.e_score_correction_bias.std() > 0.1
    pairs = [
        *stacked(ours, theirs),
        (ours.shared.gate_up.weight, lambda: torch.cat((shared.gate_proj.weight, shared.up_proj.weight))),
        (ours.shared.down.weight, lambda: shared.down_proj.weight),
        (ours.router.e_score_correction_bias, lambda: theirs.gate.e_score_correction_bias),
    ]
    same_as(ours, theirs, pairs, tokens(3, 7))


@pytest.mark.parametrize("capacity", [1, 2, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_switch_block_is_theirs(capacity, bias):
    config = SwitchTransformersConfig(
        d_model=D, d_ff=WIDTH, num_experts=3, expert_capacity=capacity, router_bias=bias, router_jitter_noise=0.3
    )
    theirs = randomise(SwitchTransformersSparseMLP(config)).eval()
    router = SoftmaxRouter(D, 3, 1, exact=True, jitter=0.3, bias=bias)
    ours = MixtureOfExperts(router, Experts(3, D, WIDTH, "relu", gated=False), capacity=capacity).eval()
    parts = list(theirs.experts.values())
    pairs = [
        (ours.experts.up.weight, lambda: torch.stack([p.wi.weight for p in parts])),
        (ours.experts.down.weight, lambda: torch.stack([p.wo.weight for p in parts])),
        (ours.router.weight, lambda: theirs.router.classifier.weight),
    ]
    if bias:
        pairs.append((ours.router.bias, lambda: theirs.router.classifier.bias))
    same_as(ours, theirs, pairs, tokens(3, 7))


def naive(x, up, down, experts, weights, activation):
    """A loop over tokens and their choices."""
    act, width = ACTIVATIONS[activation], down.shape[2]
    rows = []
    for t in range(len(x)):
        row = torch.zeros_like(x[t])
        for e, weight in zip(experts[t].tolist(), weights[t], strict=True):
            if e < len(up):
                inner = up[e] @ x[t]
                inner = act(inner[:width]) * inner[width:] if len(inner) > width else act(inner)
                row = row + weight * (down[e] @ inner)
        rows.append(row)
    return torch.stack(rows)


def case(n, n_experts, k, gated, dtype=torch.float64, none=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((n, D), (n_experts, WIDTH * (2 if gated else 1), D), (n_experts, D, WIDTH), (n, k))
    x, up, down, weights = (torch.randn(s, generator=g, dtype=torch.float64).mul_(0.5).to(dtype) for s in shapes)
    experts = torch.rand(n, n_experts, generator=g).topk(k).indices
    if none:
        experts[torch.rand(n, k, generator=g) < 0.5] = n_experts
    return [p.requires_grad_() for p in (x, up, down, weights)], experts


def ours_of(parts, experts, activation, whole):
    x, up, down, weights = parts
    return experts_._Mixture.apply(x, up, down, experts, weights, activation, whole, x.dtype)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("none", [False, True])
def test_outputs_and_gradients_are_those_of_a_loop_in_float64(activation, gated, none):
    parts, experts = case(9, 4, 2, gated, none=none)
    narrow = [p.detach().float().requires_grad_() for p in parts]
    expected = naive(*parts[:3], experts, parts[3], activation)
    double, single = ours_of(parts, experts, activation, not none), ours_of(narrow, experts, activation, not none)
    torch.testing.assert_close(double, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(single.double(), expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn(9, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    wanted = torch.autograd.grad(expected, parts, direction)
    for found, want in zip(torch.autograd.grad(double, parts, direction), wanted, strict=True):
        torch.testing.assert_close(found, want, atol=1e-12, rtol=1e-12)
    for found, want in zip(torch.autograd.grad(single, narrow, direction.float()), wanted, strict=True):
        torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("width", [16, 12])  # slices of 12 are not aligned
def test_half_precision_whose_slices_are_filled_up_is_the_same_within_rounding(width):
    parts, experts = case(40, 5, 2, True, none=True)
    parts[1], parts[2] = torch.cat((parts[1], parts[1]), 1)[:, : 2 * width], torch.cat((parts[2], parts[2]), 2)[..., :width]
    half = [p.detach().bfloat16().requires_grad_() for p in parts]
    assert len(experts_._places(experts, 5, experts_._GRAIN, False).token) > experts.numel()
    wide = [p.detach().double().requires_grad_() for p in half]
    out, expected = ours_of(half, experts, "silu", False), naive(*wide[:3], experts, wide[3], "silu")
    direction = torch.randn(40, D, generator=torch.Generator().manual_seed(3)).bfloat16()
    found = [out, *torch.autograd.grad(out, half, direction)]
    wanted = [expected, *torch.autograd.grad(expected, wide, direction.double())]
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.bfloat16
        assert distance(a, b) <= 0.02


@given(st.data())
@settings(max_examples=60)
def test_every_choice_has_a_row_of_its_own_within_the_slice_of_its_expert(data):
    n_experts, k = data.draw(st.integers(1, 6)), 2
    grain = data.draw(st.sampled_from([1, 4, 16]))
    chosen = data.draw(st.lists(st.tuples(*[st.integers(0, n_experts)] * k), min_size=1, max_size=30))
    experts = torch.tensor(chosen)
    slot, token, ends, used = experts_._places(experts, n_experts, grain, whole=False)
    starts = [0, *ends.tolist()]
    assert used == starts[-1]
    assert len(set(slot.flatten().tolist())) == experts.numel()
    for t, row in enumerate(chosen):
        for j, e in enumerate(row):
            at = int(slot[t, j])
            assert token[at] == t
            assert starts[e] <= at < (starts[e + 1] if e < n_experts else len(token))
    for e, (a, b) in enumerate(pairwise(starts)):
        count = sum(row.count(e) for row in chosen)
        assert b - a == -(-count // grain) * grain


@given(st.data())
@settings(max_examples=60)
def test_capacity_keeps_the_first_tokens_of_each_sequence_and_expert(data):
    n_experts, capacity = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    chosen = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, n_experts - 1)), min_size=1, max_size=40))
    owner, experts = torch.tensor(chosen).unbind(1)
    kept = moe.within_capacity(experts.unsqueeze(1), owner, capacity, n_experts)
    seen = {}
    for i, pair in enumerate(chosen):
        assert bool(kept[i, 0]) == (seen.get(pair, 0) < capacity)
        seen[pair] = seen.get(pair, 0) + 1


@given(st.integers(1, 12), st.integers(1, E), st.booleans(), st.integers(0, 9))
@settings(max_examples=40)
def test_weights_of_a_token_sum_to_what_they_must_and_no_expert_comes_twice(n, k, soft, seed):
    router = SoftmaxRouter(D, E, k, normalise=True) if soft else SigmoidRouter(D, E, k, scale=2.5)
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    experts, weights, logits = router(x)
    torch.testing.assert_close(weights.sum(1), torch.full((n,), 1.0 if soft else 2.5))
    assert all(len(set(row)) == k for row in experts.tolist())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(router.probabilities(logits).sum(1), torch.ones(n))


@torch.no_grad()
def test_groups_limit_the_choice_and_a_bias_moves_it_but_not_the_weights():
    router = randomise(SigmoidRouter(D, 12, 4, n_groups=4, top_groups=2, normalise=False))
    x = tokens(50).detach()
    experts, weights, _ = router(x)
    scores = torch.sigmoid(x @ router.weight.T)
    biased = scores + router.e_score_correction_bias
    for t in range(50):
        strength = biased[t].view(4, 3).topk(2).values.sum(1)
        groups = set(strength.topk(2).indices.tolist())
        allowed = sorted((e for e in range(12) if e // 3 in groups), key=lambda e: -float(biased[t, e]))
        assert set(experts[t].tolist()) == set(allowed[:4])
    torch.testing.assert_close(weights, scores.gather(1, experts))


def test_one_token_and_experts_that_have_none():
    ours = MixtureOfExperts(SoftmaxRouter(D, E, 2, normalise=True), Experts(E, D, WIDTH))
    randomise(ours)
    x = tokens(1, 1)
    out = ours(x)
    up, down = ours.experts.gate_up.weight, ours.experts.down.weight
    expected = naive(x[0], up, down, ours.last.experts, ours.last.weights, "silu")
    torch.testing.assert_close(out[0], expected)
    out.sum().backward()
    idle = [e for e in range(E) if e not in ours.last.experts]
    assert len(idle) == E - 2
    assert not up.grad[idle].any()
    assert not down.grad[idle].any()
    assert up.grad[ours.last.experts[0]].flatten(1).any(1).all()


def test_frozen_weights_get_no_gradient_and_the_rest_the_same():
    experts = randomise(Experts(E, D, WIDTH))
    choice, weights = torch.rand(8, E).topk(2).indices, torch.rand(8, 2, requires_grad=True)
    found = []
    for frozen in (False, True):
        experts.requires_grad_(not frozen)
        x = tokens(8)
        experts(x, choice, weights).square().sum().backward()
        found.append((x.grad, weights.grad))
        weights.grad = None
        assert (experts.down.weight.grad is None) == frozen
        experts.zero_grad()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_what_is_over_capacity_adds_nothing_and_is_counted():
    ours = randomise(MixtureOfExperts(SoftmaxRouter(D, 3, 1), Experts(3, D, WIDTH), capacity=2))
    x = tokens(2, 10)
    out = ours(x)
    kept = moe.within_capacity(ours.last.experts, torch.arange(2).repeat_interleave(10), 2, 3)[:, 0].view(2, 10)
    assert 0 < int(kept.sum()) < 20
    assert not out[~kept].any()
    assert out[kept].flatten(1).any(1).all()
    assert int(ours.dropped) == int((~kept).sum())
    alone = torch.cat([ours(x[:1]), ours(x[1:])])
    torch.testing.assert_close(out, alone)
    # Laid end to end with their sequences named, the same.
    owner = torch.arange(2).repeat_interleave(10).unsqueeze(0)
    torch.testing.assert_close(ours(x.view(1, 20, D), owner).view(2, 10, D), out)


@torch.no_grad()
def test_jitter_is_for_training_only():
    router = randomise(SoftmaxRouter(D, E, 1, exact=True, jitter=0.1))
    x = tokens(30).detach()
    plain = x @ router.weight.T
    torch.testing.assert_close(router.eval()(x).logits, plain)
    torch.manual_seed(0)
    noisy = router.train()(x).logits
    assert 0 < float((noisy - plain).abs().max()) <= 0.1 * float((x.abs() @ router.weight.abs().T).max())


def test_autocast_computes_experts_in_its_dtype_and_exact_routers_in_float32():
    ours = randomise(MixtureOfExperts(SigmoidRouter(D, E, 2), Experts(E, D, WIDTH)))
    x = tokens(4, 5)
    plain = ours(x)
    logits = ours.last.logits
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(ours.last.logits, logits)
    assert distance(out, plain) <= 0.03
    out.sum().backward()
    assert ours.experts.down.weight.grad.dtype == torch.float32


def test_losses_are_those_of_transformers():
    torch.manual_seed(0)
    layers = [torch.randn(40, E, requires_grad=True) for _ in range(3)]
    chosen = [x.topk(2).indices for x in layers]
    ours = moe.load_balance_loss([x.softmax(-1) for x in layers], chosen)
    theirs = load_balancing_loss_func(tuple(layers), E, 2)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, layers), torch.autograd.grad(theirs, layers), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(moe.router_z_loss(layers), router_z_loss_func(torch.stack(layers)))


def test_load_balance_goes_from_k_to_the_number_of_experts():
    even = torch.arange(E).view(-1, 1)
    flat = torch.full((E, E), 1 / E)
    torch.testing.assert_close(moe.load_balance_loss([flat], [even]), torch.tensor(1.0))
    pair = torch.stack((torch.arange(E), (torch.arange(E) + 1) % E), 1)
    torch.testing.assert_close(moe.load_balance_loss([flat], [pair]), torch.tensor(2.0))
    one = torch.zeros(E, E)
    one[:, 2] = 1
    torch.testing.assert_close(moe.load_balance_loss([one], [torch.full((E, 1), 2)]), torch.tensor(float(E)))


def test_aux_losses_and_usage_read_what_layers_remember():
    mixture = MixtureOfExperts(SoftmaxRouter(D, E, 2), Experts(E, D, WIDTH))
    model = torch.nn.Sequential(mixture, randomise(MixtureOfExperts(SigmoidRouter(D, E, 2), Experts(E, D, WIDTH))))
    model(tokens(4, 5))
    found = moe.aux_losses(model)
    said = [m.last for m in model]
    scores = said[1].logits.sigmoid()
    probabilities = [said[0].logits.softmax(-1), scores / scores.sum(-1, keepdim=True)]
    torch.testing.assert_close(found["load_balance"], moe.load_balance_loss(probabilities, [x.experts for x in said]))
    torch.testing.assert_close(found["router_z"], moe.router_z_loss([x.logits for x in said]))
    sum(found.values()).backward()
    assert all(m.router.weight.grad.abs().sum() > 0 for m in model)
    model(tokens(4, 5))
    model.eval()(tokens(4, 5))
    load, dropped = moe.usage(model)
    expected = torch.stack([2 * torch.bincount(x.experts.flatten(), minlength=E) for x in said])
    assert torch.equal(load, expected)
    assert dropped.tolist() == [0, 0]
    assert not moe.usage(model).load.any()


def test_a_copy_forgets_the_last_pass_and_files_hold_no_counts():
    ours = MixtureOfExperts(SigmoidRouter(D, E, 2), Experts(E, D, WIDTH), capacity=1)
    ours(tokens(2, 5))
    twin = copy.deepcopy(ours)
    assert twin.last is None
    assert ours.last is not None
    assert torch.equal(twin.load, ours.load)
    names = {"router.weight", "router.e_score_correction_bias", "experts.gate_up.weight", "experts.down.weight"}
    assert ours.state_dict().keys() == names


def test_balancing_moves_biases_towards_even_loads_and_nothing_else():
    ours = randomise(MixtureOfExperts(SigmoidRouter(D, E, 2), Experts(E, D, WIDTH)))
    bias = ours.router.e_score_correction_bias.zero_()
    weights = {n: p.clone() for n, p in ours.named_parameters()}
    x = tokens(40, 5) + 0.5  # so that experts whose rows sum to most have most to do
    ours(x)
    first = ours.load.clone()
    assert torch.equal(moe.balance(ours, 0.05).load[0], first)
    torch.testing.assert_close(bias, 0.05 * torch.sign(first.float().mean() - first))
    for _ in range(40):
        ours(x)
        last = moe.balance(ours, 0.01).load[0]
    assert int(last.max() - last.min()) < 0.3 * int(first.max() - first.min())
    assert all(torch.equal(p, weights[n]) for n, p in ours.named_parameters())


def test_the_bias_that_balances_stays_float32():
    router = SigmoidRouter(D, E, 2).to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.e_score_correction_bias.dtype == torch.float32
    assert router(tokens(3).bfloat16()).weights.dtype == torch.bfloat16


@torch.no_grad()
def test_initial_experts_have_outputs_of_the_size_of_their_inputs():
    torch.manual_seed(0)
    block = MixtureOfExperts(SoftmaxRouter(256, 4, 2, normalise=True), Experts(4, 256, 512))
    out = block(torch.randn(1, 64, 256))
    assert 0.05 < float(out.std()) < 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftmaxRouter(D, 4, 5), "a token cannot have 5 of 4 experts: use 1 to 4"),
        (lambda: SoftmaxRouter(D, 4, 1, jitter=1.0), r"jitter \(1.0\) must lie in \[0, 1\): 0.01 is usual"),
        (lambda: SigmoidRouter(D, 12, 2, n_groups=5), r"n_groups \(5\) must split n_experts \(12\) .* use one of 1, 2, 3, 4, 6"),
        (lambda: SigmoidRouter(D, 4, 2, n_groups=4), r"n_groups \(4\) .* of at least two: use one of 1, 2"),
        (lambda: SigmoidRouter(D, 8, 3, n_groups=4, top_groups=5), r"top_groups \(5\) must be at most n_groups \(4\)"),
        (lambda: SigmoidRouter(D, 8, 3, n_groups=4), r"top_groups \(1\) .* its 3 experts, with 2 in a group: use 2 to 4"),
        (
            lambda: MixtureOfExperts(SoftmaxRouter(D, 2, 1), Experts(2, D, 4), capacity=0),
            r"the capacity of an expert \(0\) must be at least 1 token, or None for all",
        ),
        (lambda: moe.usage(torch.nn.Linear(2, 2)), "torch.nn.modules.linear has no mixture of experts"),
        (
            lambda: moe.aux_losses(MixtureOfExperts(SoftmaxRouter(D, 2, 1), Experts(2, D, 4))),
            "the router has not seen a token yet: ask for its losses after a forward pass",
        ),
        (lambda: moe.balance(torch.nn.Linear(2, 2), 0.0), r"the speed of balancing \(0.0\) must be positive: 0.001 is usual"),
        (
            lambda: moe.balance(MixtureOfExperts(SoftmaxRouter(D, 2, 1), Experts(2, D, 4))),
            "no router of this model has a bias that balances",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_same(dtype):
    ours = randomise(MixtureOfExperts(SoftmaxRouter(D, 3, 2), Experts(3, D, 16), capacity=4))
    x = tokens(2, 10)
    out = ours(x)
    out.square().sum().backward()
    other = copy.deepcopy(ours).to("cuda", dtype)
    y = x.detach().to("cuda", dtype).requires_grad_()
    again = other(y)
    again.square().sum().backward()
    limit = 1e-4 if dtype == torch.float32 else 0.05
    pairs = [
        (out, again),
        (x.grad, y.grad),
        *((p.grad, q.grad) for p, q in zip(ours.parameters(), other.parameters(), strict=True)),
    ]
    for a, b in pairs:
        assert distance(b, a) <= limit


@torch.no_grad()
@pytest.mark.parametrize(("exact", "jitter"), [(False, 0.01), (True, 0.01), (True, 0.001)])
def test_jitter_of_bfloat16_is_to_both_sides(exact, jitter):
    """A factor drawn in bfloat16 would be one of four numbers, none above 1, or 1 always."""
    torch.manual_seed(0)
    router = SoftmaxRouter(D, E, 1, exact=exact, jitter=jitter).train()
    seen = []
    router._logits = lambda x, exact: seen.append(x) or torch.zeros(len(x), E)
    x = torch.ones(4096, D, dtype=torch.bfloat16) * 1.5
    router(x)
    change = seen[0].float() / 1.5 - 1
    assert seen[0].dtype == (torch.float32 if exact else torch.bfloat16)
    assert abs(float(change.mean())) < 0.03 * jitter
    if exact:
        assert float(change.abs().max()) <= 1.001 * jitter
        assert float(change.std()) == pytest.approx(jitter / 3**0.5, rel=0.03)


def test_losses_of_no_token_are_zero():
    nothing, chosen = torch.zeros(0, E), torch.zeros(0, 2, dtype=torch.int64)
    assert float(moe.load_balance_loss([nothing], [chosen])) == float(moe.router_z_loss([nothing])) == 0
