"""The policy gradient against the formula of GRPO and DAPO written out in plain torch on padded tensors, as TRL computes it."""

import re

import pytest
import torch

from athanor.core.errors import ConfigError, DataError, NoTargetsError
from athanor.nn.context import Causal
from athanor.objectives.policy_gradient import PolicyConfig, build
from athanor.types import IGNORE, Batch

PROMPTS, ANSWERS = (3, 5, 2, 4, 1), (6, 1, 9, 4, 7)  # tokens of each sequence


@pytest.fixture(scope="module")
def model(tiny):
    return tiny()


@pytest.fixture(scope="module")
def batch(model):
    """Ragged sequences with masked holes; log-probabilities of the sampler are off by a few tenths, so clipping bites."""
    generator = torch.Generator().manual_seed(0)
    parts = {"ids": [], "labels": [], "old_logprobs": [], "advantages": [], "ref_logprobs": []}
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        tokens = torch.randint(20, 320, (prompt + answer,), generator=generator)
        labels = tokens[1:].clone()
        labels[: prompt - 1] = IGNORE
        if answer > 5:
            labels[prompt + 1] = IGNORE
        exact = exact_logprobs(model, tokens, 0.7)
        parts["ids"].append(tokens[:-1])
        parts["labels"].append(labels)
        noise = torch.randn(2, len(labels), generator=generator)
        parts["old_logprobs"].append(exact + 0.3 * noise[0])
        parts["ref_logprobs"].append(exact + 0.3 * noise[1])
        parts["advantages"].append(torch.randn(1, generator=generator).expand(len(labels)))
    lengths = torch.tensor([len(x) for x in parts["ids"]])
    joined = {name: torch.cat(values) for name, values in parts.items()}
    ids, labels = joined.pop("ids"), joined.pop("labels")
    return Batch(ids, labels, lengths, joined | {"temperature": torch.full((len(ids),), 0.7)}, "rollouts")


def exact_logprobs(model, tokens, temperature):
    """log p(tokens[i + 1]) by a plain forward pass."""
    with torch.no_grad():
        logits = model.logits(model.hidden(tokens[None, :-1], Causal(1, len(tokens) - 1)))[0]
    return torch.log_softmax(logits / temperature, -1).gather(1, tokens[1:, None])[:, 0]


def reference(model, batch, *, low, high, kl, normalise):
    """(loss, metrics, gradient of the embedding): padded (S, T) tensors and masked means, each sequence run on its own."""
    width, sizes = int(batch.lengths.max()), batch.lengths.tolist()

    def padded(values, fill=0.0):
        rows = [torch.cat((v, v.new_full((width - len(v),), fill))) for v in values.split(sizes)]
        return torch.stack(rows)

    ids, labels = padded(batch.ids, 0), padded(batch.labels, IGNORE)
    extras = {name: padded(values) for name, values in batch.extras.items()}
    mask = (labels != IGNORE).double()
    logits = model(ids).double() / 0.7
    everything = torch.log_softmax(logits, -1)
    logprobs = everything.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    entropy = -(everything.exp() * everything).sum(-1)
    ratio = torch.exp(logprobs - extras["old_logprobs"].double())
    surrogate = torch.min(ratio * extras["advantages"], torch.clamp(ratio, 1 - low, 1 + high) * extras["advantages"])
    gap = extras["ref_logprobs"].double() - logprobs
    k3 = gap.exp() - gap - 1
    per_token = -surrogate + kl * k3

    def mean(values):
        if normalise == "sequence":
            return ((values * mask).sum(1) / mask.sum(1)).mean()
        return (values * mask).sum() / mask.sum()

    advantages = extras["advantages"]
    outside = ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
    metrics = {
        "ratio_gap": mean((logprobs - extras["old_logprobs"]).abs()),
        "clipped": mean(outside.double()),
        "entropy": mean(entropy),
        "kl": mean(k3) if kl else torch.zeros(()),
    }
    loss = mean(per_token)
    (grad,) = torch.autograd.grad(loss, model.embedding.weight)
    return loss.item(), {name: value.item() for name, value in metrics.items()}, grad


@pytest.mark.parametrize("normalise", ["token", "sequence"])
@pytest.mark.parametrize("kl", [0.0, 0.15])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.28), (0.05, 0.4), (0.4, 0.05)])
def test_it_is_the_formula(model, batch, normalise, kl, low, high):
    loss, metrics, grad = reference(model, batch, low=low, high=high, kl=kl, normalise=normalise)
    model.zero_grad()
    total, count, sums = build(PolicyConfig(low, high, kl, normalise))(model, batch)
    (total / count).backward()
    assert count == (len(ANSWERS) if normalise == "sequence" else int((batch.labels != IGNORE).sum()))
    assert total.item() / count == pytest.approx(loss, rel=1e-5, abs=1e-7)
    assert {name: value.item() / count for name, value in sums.items()} == pytest.approx(metrics, rel=1e-4, abs=1e-7)
    assert (model.embedding.weight.grad - grad).abs().max() <= 1e-5 * grad.abs().max()
    assert metrics["clipped"] > 0.02  # the test would see a wrong clip


def test_each_constant_changes_the_loss(model, batch):
    settings = [PolicyConfig(), PolicyConfig(clip_low=0.1), PolicyConfig(clip_high=0.1), PolicyConfig(kl=0.1)]
    settings.append(PolicyConfig(normalise="sequence"))
    values = set()
    for config in settings:
        total, count, _ = build(config)(model, batch)
        values.add(round(total.item() / count, 7))
    assert len(values) == len(settings)


def test_on_policy_the_ratio_is_1_and_the_gradient_that_of_reinforce(model, batch):
    on_policy = Batch(batch.ids, batch.labels, batch.lengths, dict(batch.extras), "on policy")
    with torch.no_grad():
        from athanor.nn.context import Packed
        from athanor.nn.loss import token_logprobs

        hidden = model.hidden(batch.ids[None], Packed(batch.lengths))[0]
        on_policy.extras["old_logprobs"] = token_logprobs(
            hidden, model.output_weight, batch.labels.clamp(min=0), batch.extras["temperature"]
        )[0]
    model.zero_grad()
    total, _, metrics = build(PolicyConfig())(model, on_policy)
    total.backward()
    at = batch.labels != IGNORE
    assert float(metrics["ratio_gap"]) <= 1e-5 and float(metrics["clipped"]) == 0
    assert total.item() == pytest.approx(-batch.extras["advantages"][at].sum().item(), rel=1e-5)
    grad = model.embedding.weight.grad.clone()
    model.zero_grad()
    sizes = batch.lengths.tolist()
    for ids, labels, advantages in zip(
        *(x.split(sizes) for x in (batch.ids, batch.labels, batch.extras["advantages"])), strict=True
    ):
        logprobs = torch.log_softmax(model(ids[None])[0] / 0.7, -1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        (-(logprobs * advantages)[labels != IGNORE].sum()).backward()
    assert (grad - model.embedding.weight.grad).abs().max() <= 1e-5 * grad.abs().max()


def test_rollouts_without_an_answer_are_an_error(model, batch):
    empty = Batch(batch.ids, torch.full_like(batch.labels, IGNORE), batch.lengths, batch.extras, "rollouts")
    with pytest.raises(NoTargetsError, match="batch 'rollouts': no answer token to learn from; the rollouts are empty"):
        build(PolicyConfig())(model, empty)


def test_a_batch_that_lacks_something_is_refused_by_name(model, batch):
    bare = Batch(batch.ids, batch.labels, batch.lengths, {"old_logprobs": batch.extras["old_logprobs"]}, "bare")
    message = "batch 'bare' lacks extras advantages, temperature, ref_logprobs, which are read when kl is 0.1: add them"
    with pytest.raises(DataError, match=re.escape(message)):
        build(PolicyConfig(kl=0.1))(model, bare)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clip_low": 0.0}, "clip_low (0.0) must lie in (0, 1) and clip_high (0.28) above 0"),
        ({"clip_low": 1.0}, "clip_low (1.0) must lie in (0, 1)"),
        ({"clip_high": 0.0}, "clip_high (0.0) above 0"),
        ({"kl": -0.1}, "kl (-0.1) must not be negative"),
        ({"kl": float("nan")}, "kl (nan) must not be negative"),
        ({"normalise": "mean"}, "normalise ('mean') must be 'token' or 'sequence'"),
    ],
)
def test_constants_out_of_range_are_refused(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        PolicyConfig(**fields)
