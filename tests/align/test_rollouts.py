"""Law L6: what the engine says of its tokens is what the trainer says, and the batch teaches exactly the answers."""

import pytest
import torch

from athanor.align.rollouts import Group, roll_out, to_batch
from athanor.core.errors import ConfigError
from athanor.infer.engine import Engine
from athanor.nn.context import Packed
from athanor.nn.loss import token_logprobs
from athanor.objectives.policy_gradient import PolicyConfig, build
from athanor.tokenizer.chat import render
from athanor.types import IGNORE, Rollout, SamplingParams

PARAMS = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=24, seed=11)


@pytest.fixture(scope="module")
def model(tiny):
    return tiny()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    questions = ("What is 12 + 30?", "heat", "one steady heat through every stage of the work?")
    return [render(tokenizer, [{"role": "user", "content": q}], generation_prompt=True).ids for q in questions]


def by_length(p, completion):
    """A reward in which answers differ, but for the second prompt."""
    reward = 1.0 if p == 1 else float(sum(completion.ids) % 5)
    return Rollout(completion, reward, {"sum": reward}, {"prompt": p})


@pytest.fixture(scope="module")
def groups(model, tokenizer, prompts):
    # A stop text cuts some answers short, so lengths are ragged.
    params = SamplingParams(**{f: getattr(PARAMS, f) for f in ("temperature", "top_p", "max_tokens", "seed")}, stop=("e",))
    return roll_out(Engine(model, tokenizer, max_batch=5), prompts, 4, params, by_length)


def test_every_prompt_has_its_group_in_order(groups, prompts):
    assert [len(g.rollouts) for g in groups] == [4, 4, 4]
    for p, group in enumerate(groups):
        assert all(r.completion.prompt_ids == prompts[p] and r.meta["prompt"] == p for r in group.rollouts)
        assert group.rewards == [r.reward for r in group.rollouts]
    assert len({r.completion.ids for g in groups for r in g.rollouts}) == 12
    assert len({len(r.completion.ids) for g in groups for r in g.rollouts}) > 2


def test_the_same_seed_gives_the_same_rollouts_and_another_others(model, tokenizer, prompts):
    def ids(seed, max_batch=64):
        params = SamplingParams(temperature=1.0, max_tokens=8, seed=seed)
        groups = roll_out(Engine(model, tokenizer, max_batch=max_batch), prompts, 3, params, by_length)
        return [r.completion.ids for g in groups for r in g.rollouts]

    assert ids(1) == ids(1, max_batch=2)
    assert not set(ids(1)) & set(ids(2))


def test_the_engines_log_probabilities_are_the_trainers(model, groups):
    """Temperature 0.7 and top_p 0.9: the two places where trainers and engines usually part."""
    batch, _ = to_batch(groups, 0.7, "std", "step 0")
    at = batch.labels != IGNORE
    with torch.no_grad():
        hidden = model.hidden(batch.ids[None], Packed(batch.lengths))[0]
        logprobs, _ = token_logprobs(hidden[at], model.output_weight, batch.labels[at], batch.extras["temperature"][at])
    assert (logprobs - batch.extras["old_logprobs"][at]).abs().max() <= 1e-5
    total, count, metrics = build(PolicyConfig())(model, batch)
    assert metrics["ratio_gap"].item() / count <= 1e-5 and metrics["clipped"].item() == 0
    assert total.item() == pytest.approx(-batch.extras["advantages"][at].sum().item(), abs=1e-4)


def test_what_is_learned_is_exactly_the_answers(groups, tokenizer):
    batch, _ = to_batch(groups, 0.7, "none", "x")
    rollouts = [r for i in (0, 2) for r in groups[i].rollouts]
    assert len(batch.lengths) == len(rollouts)
    n = len(batch.ids)
    assert n == len(batch.labels) == int(batch.lengths.sum()) and all(len(v) == n for v in batch.extras.values())
    sizes = batch.lengths.tolist()
    parts = (batch.ids, batch.labels, batch.extras["old_logprobs"], batch.extras["advantages"])
    for rollout, ids, labels, old, advantages in zip(rollouts, *(x.split(sizes) for x in parts), strict=True):
        c = rollout.completion
        assert ids.tolist() == [*c.prompt_ids, *c.ids][:-1]
        at = labels != IGNORE
        assert labels[at].tolist() == list(c.ids)
        assert tokenizer.decode(labels[at].tolist()) == tokenizer.decode(c.ids)
        # each label is what follows in the sequence itself
        following = [*c.prompt_ids, *c.ids][1:]
        assert all(label in (IGNORE, token) for label, token in zip(labels.tolist(), following, strict=True))
        assert old[at].tolist() == pytest.approx(list(c.logprobs), abs=1e-6)
        assert len(set(advantages.tolist())) == 1


def test_dead_groups_are_left_out_and_counted(groups):
    batch, lifeless = to_batch(groups, 0.7, "std", "x")
    assert lifeless == 1
    alone, none = to_batch([groups[0], groups[2]], 0.7, "std", "x")
    assert none == 0
    assert torch.equal(batch.ids, alone.ids) and torch.equal(batch.extras["advantages"], alone.extras["advantages"])


def test_when_all_are_dead_the_gradient_is_zero(model, groups):
    batch, lifeless = to_batch([groups[1], groups[1]], 0.7, "std", "x")
    assert lifeless == 2 and len(batch.lengths) == 8
    model.zero_grad()
    total, _, _ = build(PolicyConfig())(model, batch)
    total.backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_greedy_rollouts_are_refused(groups):
    with pytest.raises(ConfigError, match=r"temperature \(0.0\) must be positive to learn from rollouts: use 0.7 or 1"):
        to_batch(groups, 0.0, "std", "x")


def test_a_group_knows_its_rewards():
    assert Group(()).rewards == []
