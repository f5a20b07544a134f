"""Sampling: the right distribution, the right truncation, the same numbers for the same seed."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper

from athanor.infer.sampling import sample, truncate, uniform
from athanor.types import SamplingParams


def draws(logits, n, seed=0, **params):
    """`n` tokens, each of another seed, as counts."""
    settings = [SamplingParams(seed=seed + i, **params) for i in range(n)]
    tokens, _ = sample(logits.expand(n, -1), settings, [i % 7 for i in range(n)])
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
    logits = torch.randn(6, 40, generator=generator)
    params = [
        SamplingParams(temperature=0.9, seed=1),
        SamplingParams(temperature=0.0, seed=2),
        SamplingParams(temperature=1.3, top_p=0.4, seed=3),
        SamplingParams(temperature=0.7, top_k=2, seed=4),
        SamplingParams(temperature=1e-9, seed=5),
        SamplingParams(temperature=1.0, seed=6),
    ]
    tokens, logprobs = sample(logits, params, [0, 1, 2, 3, 4, 5])
    for i in range(6):
        token, logprob = sample(logits[i : i + 1], params[i : i + 1], [i])
        assert (int(token), float(logprob)) == (int(tokens[i]), float(logprobs[i]))


def test_log_probabilities_are_of_the_temperature_and_of_temperature_1_when_greedy():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    params = [SamplingParams(temperature=t, top_k=1) for t in (0.5, 2.0, 0.0)]
    tokens, logprobs = sample(logits, params, [0, 0, 0])
    assert torch.equal(tokens, logits.argmax(-1))
    expected = torch.log_softmax(logits / torch.tensor([[0.5], [2.0], [1.0]]), -1).max(-1)[0]
    torch.testing.assert_close(logprobs, expected)


def test_impossible_tokens_never_come():
    logits = torch.full((64, 50), -torch.inf)
    logits[:, 17] = 0.0
    logits[:, 31] = -1.0
    tokens, _ = sample(logits, [SamplingParams(seed=i) for i in range(64)], [0] * 64)
    assert set(tokens.tolist()) == {17, 31}
