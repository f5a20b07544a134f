"""Sampling: the right distribution, the right truncation, the same numbers for the same seed."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from athanor.infer.sampling import Row, change, sample, top_logprobs, truncate, uniform
from athanor.types import SamplingParams


def draws(logits, n, seed=0, **params):
    """`n` tokens, each of another seed, as counts."""
    settings = [SamplingParams(seed=seed + i, **params) for i in range(n)]
    tokens, _ = sample(logits.expand(n, -1), [Row(p, ids=range(i % 7)) for i, p in enumerate(settings)])
    return torch.bincount(tokens, minlength=len(logits)).double()


def fits(counts, probs):
    """Pearson's chi-square within five standard deviations of its mean: a wrong sampler fails by hundreds."""
    assert not counts[probs == 0].any()
    possible = probs > 0
    expected = counts.sum() * probs[possible]
    assert expected.min() >= 5
    freedom = int(possible.sum()) - 1
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    return abs(statistic - freedom) <= 5 * math.sqrt(2 * freedom) if freedom else True


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_have_the_probability_of_the_softmax(temperature):
    logits = torch.linspace(-1.5, 1.5, 12).roll(5)
    probs = torch.softmax(logits.double() / temperature, -1)
    assert fits(draws(logits, 20_000, temperature=temperature), probs)
    assert not fits(draws(logits, 20_000, temperature=temperature * 1.1), probs)


def test_truncated_tokens_have_the_renormalised_probability():
    logits = torch.linspace(-1.5, 1.5, 12).roll(5)
    kept = truncate(torch.log_softmax(logits, -1)[None], torch.tensor([0.7]), torch.tensor([12]))[0].double()
    probs = torch.softmax(kept, -1)
    assert 1 < int((probs > 0).sum()) < 12
    assert fits(draws(logits, 20_000, top_p=0.7), probs)
    assert not fits(draws(logits, 20_000, top_p=0.7), torch.softmax(kept * 1.1, -1))


def test_numbers_are_uniform_and_those_of_neighbours_independent():
    n = 4000
    streams = {
        "seeds": uniform(range(n), [0] * n),
        "indices": uniform([3] * n, range(n)),
        "large seeds": uniform([2**63 + i for i in range(n)], [5] * n),
        "negative seeds": uniform([-i for i in range(1, n + 1)], [1] * n),
    }
    for name, numbers in streams.items():
        assert numbers.dtype == torch.float64 and numbers.min() >= 0 and numbers.max() < 1, name
        assert len(numbers.unique()) == n, name
        assert fits(torch.histc(numbers.float(), 20, 0, 1).double(), torch.full((20,), 0.05, dtype=torch.float64)), name
        pairs = torch.histc((numbers[1:] * 5).floor() * 5 + (numbers[:-1] * 5).floor(), 25, 0, 25).double()
        assert fits(pairs, torch.full((25,), 0.04, dtype=torch.float64)), name


def test_a_number_depends_on_its_seed_and_index_alone():
    seeds, indices = [5, 9, 5, 2**64 + 5], [0, 0, 1, 0]
    numbers = uniform(seeds, indices)
    assert [float(uniform([s], [i])) for s, i in zip(seeds, indices, strict=True)] == numbers.tolist()
    assert numbers[0] == numbers[3]  # 64 bits of a seed count
    assert len(set(numbers.tolist())) == 3


@given(
    logits=st.lists(st.integers(-40, 40), min_size=2, max_size=30, unique=True).map(lambda x: torch.tensor(x) / 7),
    top_p=st.floats(0.01, 1.0),
    top_k=st.integers(0, 35),
)
def test_truncation_is_that_of_transformers(logits, top_p, top_k):
    logprobs = torch.log_softmax(logits, -1)[None]
    kept = truncate(logprobs, torch.tensor([top_p]), torch.tensor([top_k or len(logits)]))
    expected = logprobs
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
        remaining = torch.softmax(expected, -1).sort(descending=True)[0]
        before = TopKLogitsWarper(top_k)(None, logprobs) if top_k else logprobs
        edges = torch.softmax(before, -1).sort(descending=True)[0].cumsum(-1)
        if (edges - top_p).abs().min() < 1e-6:
            return  # on the very edge rounding decides
        assert remaining[0, 0] > 0
    assert torch.equal(kept.isinf(), expected.isinf())
    assert torch.equal(kept[~kept.isinf()], logprobs[~kept.isinf()])


def test_each_row_is_truncated_by_its_own_settings():
    logprobs = torch.log_softmax(torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(4, 1), -1)
    kept = truncate(logprobs, torch.tensor([1.0, 0.6, 1.0, 1e-9]), torch.tensor([4, 4, 2, 4]))
    assert (~kept.isinf()).sum(1).tolist() == [4, 1, 2, 1]
    assert torch.equal(kept[0], logprobs[0])


def test_rows_do_not_disturb_each_other():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 40, generator=generator)
    params = [
        SamplingParams(temperature=0.9, seed=1),
        SamplingParams(temperature=0.0, seed=2),
        SamplingParams(temperature=1.3, top_p=0.4, seed=3),
        SamplingParams(temperature=0.7, top_k=2, seed=4),
        SamplingParams(temperature=1e-9, seed=5),
        SamplingParams(temperature=1.0, seed=6),
        SamplingParams(temperature=1.0, seed=7, min_p=0.5),
        SamplingParams(temperature=1.0, seed=8, frequency_penalty=2.0),
    ]
    rows = [Row(p, ids=range(i)) for i, p in enumerate(params)]
    tokens, logprobs = sample(logits, rows)
    for i in range(len(params)):
        token, logprob = sample(logits[i : i + 1], rows[i : i + 1])
        assert (int(token), float(logprob)) == (int(tokens[i]), float(logprobs[i]))


def test_log_probabilities_are_of_the_temperature_and_of_temperature_1_when_greedy():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    params = [SamplingParams(temperature=t, top_k=1) for t in (0.5, 2.0, 0.0)]
    tokens, logprobs = sample(logits, [Row(p) for p in params])
    assert torch.equal(tokens, logits.argmax(-1))
    expected = torch.log_softmax(logits / torch.tensor([[0.5], [2.0], [1.0]]), -1).max(-1)[0]
    torch.testing.assert_close(logprobs, expected)


def test_impossible_tokens_never_come():
    logits = torch.full((64, 50), -torch.inf)
    logits[:, 17] = 0.0
    logits[:, 31] = -1.0
    tokens, _ = sample(logits, [Row(SamplingParams(seed=i)) for i in range(64)])
    assert set(tokens.tolist()) == {17, 31}


LOGITS = st.lists(st.integers(-40, 40), min_size=6, max_size=30, unique=True).map(lambda x: torch.tensor(x) / 7)


@given(logits=LOGITS, min_p=st.floats(0.001, 1.0))
def test_min_p_is_that_of_transformers(logits, min_p):
    kept = MinPLogitsWarper(min_p)(None, logits[None])[0]
    edges = torch.softmax(logits, -1) / torch.softmax(logits, -1).max()
    if (edges - min_p).abs().min() < 1e-6:
        return  # on the very edge rounding decides
    tokens, _ = sample(logits.expand(200, -1), [Row(SamplingParams(seed=i, min_p=min_p)) for i in range(200)])
    assert not kept[tokens].isinf().any()
    probs = torch.softmax(kept.double(), -1)
    assert all(token in tokens for token in range(len(logits)) if probs[token] > 0.2)


@given(logits=LOGITS, penalty=st.floats(0.5, 3), prompt=st.lists(st.integers(0, 5)), ids=st.lists(st.integers(0, 5)))
def test_the_repetition_penalty_is_that_of_transformers(logits, penalty, prompt, ids):
    row = Row(SamplingParams(repetition_penalty=penalty), prompt=prompt, ids=ids)
    expected = logits
    if prompt or ids:
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([[*prompt, *ids]]), logits[None])[0]
    torch.testing.assert_close(change(logits, row), expected)


def test_presence_and_frequency_penalties():
    """mu[j] - c[j] frequency - (c[j] > 0) presence, c counting the answer alone (OpenAI's documentation)."""
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    changed = change(torch.zeros(4), Row(params, prompt=[3, 3], ids=[1, 1, 2]))
    assert changed.tolist() == [0.0, -1.0, -0.75, 0.0]
    assert torch.equal(change(torch.ones(4), Row(params, prompt=[3])), torch.ones(4))


def test_biases_are_those_of_transformers():
    logits, bias = torch.linspace(-1, 1, 8), {(2,): 1.5, (5,): -2.0}
    expected = SequenceBiasLogitsProcessor(bias)(torch.tensor([[0]]), logits[None])[0]
    changed = change(logits, Row(SamplingParams(logit_bias=tuple((i, b) for (i,), b in bias.items()))))
    torch.testing.assert_close(changed, expected)


def test_what_may_not_come_does_not_and_what_alone_may_is_all():
    logits = torch.zeros(6)
    expected = NoBadWordsLogitsProcessor([[4]], eos_token_id=0)(torch.tensor([[1]]), logits[None])[0]
    assert torch.equal(change(logits, Row(SamplingParams(), banned=[4])), expected)
    assert change(logits, Row(SamplingParams(allowed_ids=(1, 3)))).isfinite().tolist() == [i in (1, 3) for i in range(6)]
    mask = torch.tensor([True, False, False, True, False, True])
    assert change(logits, Row(SamplingParams(), allowed=mask)).isfinite().tolist() == mask.tolist()
    rows = [Row(SamplingParams(seed=i, allowed_ids=(1, 3, 4)), banned=[3]) for i in range(100)]
    assert set(sample(logits.expand(100, -1), rows)[0].tolist()) == {1, 4}


def test_changes_choose_the_token_and_leave_its_log_probability():
    """Law L6: log-probabilities are those of the trainer, who knows nothing of penalties."""
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    row = Row(SamplingParams(temperature=0.5, top_k=1, frequency_penalty=2.0), ids=[0])
    token, logprob = sample(logits, [row])
    assert int(token) == 1
    torch.testing.assert_close(logprob, torch.log_softmax(logits[0] / 0.5, -1)[1:2])


def test_most_probable_tokens_are_told():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    expected = torch.log_softmax(logits, -1)
    found = top_logprobs(logits, [0, 1], [2, 0])
    assert [(f.id, f.logprob) for f in found] == [(0, float(expected[0, 0])), (1, float(expected[1, 1]))]
    assert found[0].top == ((1, float(expected[0, 1])), (2, float(expected[0, 2]))) and found[1].top == ()
