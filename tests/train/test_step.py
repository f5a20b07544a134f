"""Law L3 in the update: accumulated = whole, clipping, and steps that must not happen."""

import copy
import math

import pytest
import torch

from athanor.core.errors import NonFiniteLossError, NoTargetsError
from athanor.data.pack import join
from athanor.objectives import next_token
from athanor.objectives.policy_gradient import PolicyConfig
from athanor.objectives.policy_gradient import build as policy_gradient
from athanor.train.step import train_step
from athanor.types import IGNORE


class Still(torch.optim.Optimizer):
    """Changes nothing, so gradients can be looked at."""

    def __init__(self, params):
        super().__init__(params, {})
        self.param_groups[0]["base_lr"] = 1.0
        self.steps = 0

    def step(self, closure=None):
        self.steps += 1


def gradients(model, batches, clip=1e9, objective=next_token.loss):
    still = Still(model.parameters())
    result = train_step(model, objective, batches, [still], lr_factor=1.0, clip=clip, precision="fp32")
    assert still.steps == 1
    return result, {name: p.grad.clone() for name, p in model.named_parameters()}


def split(batch):
    """The sequences of a batch, one batch each."""
    sizes = batch.lengths.tolist()
    extras = {name: values.split(sizes) for name, values in batch.extras.items()}
    for i, (ids, labels) in enumerate(zip(batch.ids.split(sizes), batch.labels.split(sizes), strict=True)):
        own = {name: values[i] for name, values in extras.items()}
        yield type(batch)(ids, labels, torch.tensor([len(ids)]), own, f"{batch.origin}[{i}]")


@pytest.fixture
def batch(ragged):
    batch = ragged(3, 17, 6, 11)
    batch.labels[[3, 20, 26]] = 9  # every sequence has a target
    return batch


def close(a, b):
    for name in b:
        assert (a[name] - b[name]).abs().max() <= 1e-5 * b[name].abs().max() + 1e-8, name


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1), (1, 2, 1)])
def test_four_are_four_times_one(tiny, batch, sizes):
    """Lengths are ragged and targets masked, so a mean of means would be far off; the last window may be a partial one."""
    whole, expected = gradients(tiny(), [batch])
    singles = list(split(batch))
    windows, start = [], 0
    for size in sizes:
        windows.append(join(singles[start : start + size]))
        start += size
    parts, grads = gradients(tiny(), windows)
    close(grads, expected)
    assert (parts.count, parts.loss) == (whole.count, pytest.approx(whole.loss, rel=1e-6))
    assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
    assert parts.metrics == pytest.approx(whole.metrics)
    # What averaging the windows' means would give is something else.
    naive = [gradients(tiny(), [window])[1] for window in windows]
    mean = {name: sum(g[name] for g in naive) / len(naive) for name in expected}
    assert max(float((mean[n] - expected[n]).norm() / expected[n].norm()) for n in expected) > 0.05


@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_policy_gradients_accumulate_too(tiny, batch, normalise):
    generator = torch.Generator().manual_seed(4)
    n = len(batch.ids)
    batch.extras = {
        "old_logprobs": -6 + torch.randn(n, generator=generator),
        "advantages": torch.randn(n, generator=generator),
        "temperature": torch.full((n,), 0.8),
    }
    objective = policy_gradient(PolicyConfig(normalise=normalise))
    whole, expected = gradients(tiny(), [batch], objective=objective)
    parts, grads = gradients(tiny(), list(split(batch)), objective=objective)
    close(grads, expected)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-4)


def test_the_loss_is_the_mean_over_all_targets(tiny, batch):
    result, _ = gradients(tiny(), list(split(batch)))
    total, count, _ = next_token.loss(tiny(), batch)
    assert result.count == count == int((batch.labels != IGNORE).sum())
    assert result.loss == pytest.approx(total.item() / count, rel=1e-6)


def test_clipping_bounds_the_global_norm_and_keeps_the_direction(tiny, batch):
    free, expected = gradients(tiny(), [batch])
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
    assert free.grad_norm == pytest.approx(norm, rel=1e-5)
    clipped, grads = gradients(tiny(), [batch], clip=norm / 4)
    assert clipped.grad_norm == pytest.approx(norm, rel=1e-5)  # before clipping
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad / 4, rtol=1e-4, atol=1e-9)


def test_the_rate_is_the_base_rate_times_the_factor(tiny, batch):
    model = tiny()
    still = Still(model.parameters())
    still.param_groups[0]["base_lr"] = 0.4
    train_step(model, next_token.loss, [batch], [still], lr_factor=0.25, clip=1.0, precision="fp32")
    assert still.param_groups[0]["lr"] == pytest.approx(0.1)


def broken(part):
    """Objectives whose loss, or only whose gradient, is not finite."""

    def loss(model, batch):
        total, count, metrics = next_token.loss(model, batch)
        if part == "loss":
            return total * math.nan, count, metrics
        x = model.norm.weight[0] * 0
        return total + torch.sqrt(x) * 0, count, metrics  # 0 * inf in the backward pass

    return loss


@pytest.mark.parametrize(
    ("part", "message"),
    [("loss", r"the loss of batch 'ragged 0' is nan"), ("gradient", r"the gradient norm is nan over batches")],
)
def test_nothing_is_changed_by_a_loss_or_gradient_that_is_not_finite(tiny, batch, part, message):
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["base_lr"] = 0.1
    with pytest.raises(NonFiniteLossError, match=message):
        train_step(model, broken(part), [batch], [optimizer], lr_factor=1.0, clip=1.0, precision="fp32")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not optimizer.state
    # and the next good step is what it would have been without the bad one
    train_step(model, next_token.loss, [batch], [optimizer], lr_factor=1.0, clip=1.0, precision="fp32")
    fresh = tiny()
    other = torch.optim.AdamW(fresh.parameters(), lr=0.1)
    other.param_groups[0]["base_lr"] = 0.1
    train_step(fresh, next_token.loss, [batch], [other], lr_factor=1.0, clip=1.0, precision="fp32")
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_step_without_targets_is_an_error(tiny, batch):
    batch.labels.fill_(IGNORE)
    with pytest.raises(NoTargetsError, match=r"batch 'ragged 0': all 37 labels are masked"):
        gradients(tiny(), [batch])
    empty = lambda model, batch: (model.norm.weight.sum() * 0, 0, {})  # noqa: E731  # an objective that forgot to check
    with pytest.raises(NoTargetsError, match=r"no supervised target in the whole step \(batches: ragged 0, ragged 0\)"):
        gradients(tiny(), [batch, batch], objective=empty)


def test_bfloat16_products_leave_weights_and_gradients_in_float32(tiny, batch):
    model = tiny()
    _, expected = gradients(tiny(), [batch])
    still = Still(model.parameters())
    train_step(model, next_token.loss, [batch], [still], lr_factor=1.0, clip=1e9, precision="bf16")
    for name, p in model.named_parameters():
        assert p.dtype == p.grad.dtype == torch.float32
        assert (p.grad - expected[name]).norm() <= 0.1 * expected[name].norm() + 1e-6, name
