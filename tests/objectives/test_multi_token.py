"""The loss of DeepSeek-V3's section 2.2, written out sequence by sequence."""

import re
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from athanor.core.errors import ConfigError, NoTargetsError
from athanor.nn.context import Causal
from athanor.objectives import next_token
from athanor.objectives._pretraining import choose
from athanor.objectives.multi_token import Config, build
from athanor.types import IGNORE, Batch


def ragged(lengths, masked=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(3, 320, (2, sum(lengths)), generator=generator)
    first = 0
    for n in lengths:
        labels[first : first + n - 1] = ids[first + 1 : first + n]
        first += n
    labels[torch.rand(sum(lengths), generator=generator) < masked] = IGNORE
    return Batch(ids, labels, torch.tensor(lengths), origin="random")


def written_out(model, batch, weight):
    """Equations 21 to 25: h'_i^k of h_i^(k-1) and of the embedding of t_(i+k), whose logits are of t_(i+k+1).

    Every sequence is run alone, cut short for each head, so nothing of another can come in.
    """
    sizes, depth = batch.lengths.tolist(), len(model.ahead)
    total, ahead = 0.0, 0.0
    for ids, labels in zip(batch.ids.split(sizes), batch.labels.split(sizes), strict=True):
        hidden = model.hidden(ids[None], Causal(1, len(ids)))
        total = total + cross_entropy(model.logits(hidden)[0], labels, ignore_index=IGNORE, reduction="sum")
        for k, head in enumerate(model.ahead, 1):
            n = len(ids) - k
            if n < 1:
                break
            ctx = Causal(1, n)
            turn = model.rotary.at(ctx.positions, ctx.extent)
            hidden = head(model.embedding(ids[None, k:]), hidden[:, :n], ctx, model.config.n_layers + k - 1, turn)
            ahead = ahead + cross_entropy(model.logits(hidden)[0], labels[k:], ignore_index=IGNORE, reduction="sum")
    return total + weight / depth * ahead, ahead / depth


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("masked", [0.0, 0.4])
def test_it_is_the_formula(heads, masked, model_of):
    model = model_of("deepseek_v3", "tiny-ahead", n_ahead=heads)
    batch = ragged((7, 12, 1, 2, 9), masked)
    expected, ahead = written_out(model, batch, 0.3)
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total, count, metrics = build(Config())(model, batch)
    total.backward()
    plain, number, others = next_token.loss(model, batch)
    assert count == number == int((batch.labels != IGNORE).sum())
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert float(metrics["ahead"]) == pytest.approx(float(ahead.detach()), rel=1e-5)
    assert metrics["correct"] == others["correct"]
    assert total.item() == pytest.approx(plain.item() + 0.3 * float(metrics["ahead"]), rel=1e-5)
    assert any(name.startswith("ahead.") for name in grads)
    for name, p in model.named_parameters():
        if name in grads:
            assert (p.grad - grads[name]).abs().max() <= 1e-4 * max(float(grads[name].abs().max()), 1e-2), name


def test_the_weight_counts(model_of):
    model, batch = model_of("deepseek_v3", "tiny-ahead"), ragged((9, 8))
    first, second = (float(build(Config(weight))(model, batch)[0].detach()) for weight in (0.1, 0.3))
    assert second - first == pytest.approx(0.2 * float(build(Config())(model, batch)[2]["ahead"]), rel=1e-3)


def test_how_often_heads_are_right(model_of):
    """A model that says the token it reads is right about texts that repeat one."""
    model, batch = model_of("deepseek_v3", "tiny-ahead"), ragged((9, 8))
    metrics = build(Config())(model, batch)[2]
    sizes, right = batch.lengths.tolist(), 0
    for ids, labels in zip(batch.ids.split(sizes), batch.labels.split(sizes), strict=True):
        ctx = Causal(1, len(ids))
        (state,) = model.mtp_hidden(ids[None], model.hidden(ids[None], ctx), ctx)
        right += int((model.logits(state)[0, :-1].argmax(-1) == labels[1:]).sum())
    assert int(metrics["ahead_correct"]) == right


def test_models_without_heads_are_refused(model_of, noisy):
    message = (
        "multi_token needs heads for the tokens after the next and this deepseek_v3 has none: build it with n_ahead above 0, or"
        " use next_token"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        choose("multi_token", model_of("deepseek_v3"), {}, noisy, 48)


def test_nothing_to_learn(model_of):
    batch = ragged((5,))
    empty = replace(batch, labels=torch.full_like(batch.labels, IGNORE))
    with pytest.raises(NoTargetsError, match="there is nothing to learn from it; give texts of two tokens or more"):
        build(Config())(model_of("deepseek_v3", "tiny-ahead"), empty)


def test_a_weight_of_nothing():
    with pytest.raises(ConfigError, match=re.escape("weight (0.0) must be above 0: 0.3 is usual, and next_token is without")):
        Config(0.0)
