"""The CRF against brute force over all sequences of tags."""

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from athanor.core.errors import ConfigError, DataError
from athanor.nn.crf import CRF, Allowed, iob2

NAMES = ("O", "B-X", "I-X", "B-Y", "I-Y")


def made(n_tags, seed=0, allowed=None, spread=1.0, whole=False):
    crf = CRF(n_tags, allowed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in crf.parameters():
            p.normal_(std=spread, generator=generator)
            if whole:
                p.round_()
    return crf


def drawn(*shape, seed=1, spread=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


def may(crf, path):
    """Whether the constraints allow a sequence of tags."""
    if crf.no_start is None:
        return True
    follows = all(not crf.no_transitions[a, b] for a, b in pairwise(path))
    return follows and not crf.no_start[path[0]] and not crf.no_end[path[-1]]


def every(crf, emissions):
    """All allowed sequences of tags of one sequence (T, K), and their scores, term by term."""
    paths = [path for path in product(range(crf.n_tags), repeat=len(emissions)) if may(crf, path)]
    scores = []
    for path in paths:
        score = crf.start[path[0]] + crf.end[path[-1]]
        score = score + sum(emissions[t, tag] for t, tag in enumerate(path))
        scores.append(score + sum(crf.transitions[a, b] for a, b in pairwise(path)))
    return paths, torch.stack(scores)


cases = given(
    n_tags=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    constrained=st.booleans(),
    seed=st.integers(0, 10_000),
)


def case(n_tags, lengths, constrained, seed, **more):
    allowed = None
    if constrained:  # the first tag may stand anywhere, so that there is always a way
        generator = torch.Generator().manual_seed(seed)
        allowed = Allowed(*(torch.rand(shape, generator=generator) < 0.5 for shape in ((n_tags, n_tags), (n_tags,), (n_tags,))))
        for x in (allowed.transitions[:, 0], allowed.transitions[0], allowed.start[:1], allowed.end[:1]):
            x.fill_(True)
    crf = made(n_tags, seed, allowed, **more)
    return crf, drawn(len(lengths), max(lengths) + 1, n_tags, seed=seed + 1), torch.tensor(lengths)


@settings(max_examples=60)
@cases
def test_log_partition_and_its_gradients_are_those_of_brute_force(n_tags, lengths, constrained, seed):
    crf, emissions, n = case(n_tags, lengths, constrained, seed)
    emissions.requires_grad_()
    weights = drawn(len(lengths), seed=seed + 2)
    inputs = (emissions, crf.transitions, crf.start, crf.end)
    found = crf.log_partition(emissions, n)
    expected = torch.stack([every(crf, emissions[i, :length])[1].logsumexp(0) for i, length in enumerate(lengths)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    mine, theirs = (
        torch.autograd.grad((x * weights).sum(), inputs, materialize_grads=True) for x in (found, expected)
    )  # fmt: skip
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@settings(max_examples=40)
@cases
def test_likelihoods_are_those_of_brute_force_and_sum_to_one(n_tags, lengths, constrained, seed):
    crf, emissions, n = case(n_tags, lengths, constrained, seed)
    emissions.requires_grad_()
    inputs = (emissions, crf.transitions, crf.start, crf.end)
    for i, length in enumerate(lengths):
        paths, scores = every(crf, emissions[i, :length])
        rows = emissions[i : i + 1].expand(len(paths), -1, -1)
        tags = torch.full((len(paths), emissions.shape[1]), 99)  # what stands after the end is not read
        tags[:, :length] = torch.tensor(paths)
        found = crf.log_likelihood(rows, tags, n[i].expand(len(paths)))
        torch.testing.assert_close(found, scores.log_softmax(0), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.exp().sum(), torch.ones((), dtype=torch.float64), rtol=1e-10, atol=0)
        mine, theirs = (torch.autograd.grad(x[0], inputs, materialize_grads=True) for x in (found, scores.log_softmax(0)))
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@settings(max_examples=60)
@cases
def test_viterbi_finds_the_best_of_all(n_tags, lengths, constrained, seed):
    crf, emissions, n = case(n_tags, lengths, constrained, seed)
    found, scores = crf.viterbi(emissions, n)
    for i, length in enumerate(lengths):
        paths, all_scores = every(crf, emissions[i, :length])
        assert tuple(found[i]) == paths[int(all_scores.argmax())]
        torch.testing.assert_close(scores[i], all_scores.max().detach(), rtol=1e-12, atol=1e-12)


@settings(max_examples=40)
@cases
def test_of_equal_sequences_viterbi_takes_that_whose_last_difference_is_smallest(n_tags, lengths, constrained, seed):
    crf, emissions, n = case(n_tags, lengths, constrained, seed, spread=0.8, whole=True)
    emissions = emissions.round()
    found, _ = crf.viterbi(emissions, n)
    for i, length in enumerate(lengths):
        paths, scores = every(crf, emissions[i, :length])
        scores = scores.detach()
        best = [path for path, score in zip(paths, scores.tolist(), strict=True) if score == float(scores.max())]
        assert tuple(found[i]) == min(best, key=lambda path: path[::-1])


@settings(max_examples=40)
@cases
def test_marginals_are_those_of_brute_force(n_tags, lengths, constrained, seed):
    crf, emissions, n = case(n_tags, lengths, constrained, seed)
    found = crf.marginals(emissions, n)
    assert not found.requires_grad
    for i, length in enumerate(lengths):
        paths, scores = every(crf, emissions[i, :length])
        p = scores.detach().softmax(0)
        for t in range(length):
            for tag in range(n_tags):
                expected = float(p[[path[t] == tag for path in paths]].sum())
                assert abs(float(found[i, t, tag]) - expected) <= 1e-12
        assert not found[i, length:].any()


def in_float32(exact):
    """The same CRF in float32, and `exact` with just its weights."""
    crf = CRF(exact.n_tags)
    crf.load_state_dict({name: p.float() for name, p in exact.state_dict().items()})
    exact.load_state_dict({name: p.double() for name, p in crf.state_dict().items()})
    return crf


def test_float32_keeps_its_digits_with_large_scores_and_long_sequences():
    exact = made(5, spread=300.0)
    crf = in_float32(exact)
    small = drawn(3, 400, 5, spread=300.0).float()
    lengths = torch.tensor([400, 1, 137])
    results = []
    for model, x in ((exact, small.double()), (crf, small)):
        x.requires_grad_()
        log_z = model.log_partition(x, lengths)
        (grad,) = torch.autograd.grad(log_z.sum(), x)
        results.append((log_z.detach().double(), grad.double(), model.marginals(x, lengths).double()))
    (wide, wide_grad, _), (log_z, grad, marginals) = results
    torch.testing.assert_close(log_z, wide, rtol=2e-7, atol=0)
    torch.testing.assert_close(grad, wide_grad, rtol=0, atol=2e-3)
    inside = torch.arange(400) < lengths[:, None]
    torch.testing.assert_close(marginals.sum(2), inside.double(), rtol=0, atol=1e-6)


def test_what_all_tags_of_a_step_have_in_common_costs_no_digits():
    exact = made(5)
    crf = in_float32(exact)
    common = 65536.0 * torch.arange(400)[:, None]
    emissions = drawn(2, 400, 5).float() + common
    tags, lengths = torch.randint(5, (2, 400), generator=torch.Generator().manual_seed(0)), torch.tensor([400, 90])
    wanted = exact.log_likelihood((emissions - common).double(), tags, lengths).detach()
    torch.testing.assert_close(crf.log_likelihood(emissions, tags, lengths).detach().double(), wanted, rtol=1e-6, atol=0)


def test_bfloat16_emissions_are_computed_with_in_float32():
    crf, emissions = made(3).float(), drawn(2, 4, 3).bfloat16()
    lengths = torch.tensor([4, 2])
    found = crf.log_partition(emissions, lengths)
    assert found.dtype == torch.float32
    assert torch.equal(found, crf.log_partition(emissions.float(), lengths))
    assert crf.marginals(emissions, lengths).dtype == torch.float32


@given(rows=st.lists(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6), min_size=1, max_size=4))
def test_iob2_allows_what_chunks_can_be_written_as(rows):
    """Against a reading of the tags: every I-x continues a chunk of kind x."""
    allowed = iob2(NAMES)
    for row in rows:
        kind, right = None, True
        for name in row:
            right = right and (name[0] != "I" or kind == name[2:])
            kind = None if name == "O" else name[2:]
        tags = [NAMES.index(name) for name in row]
        says = allowed.start[tags[0]] and all(allowed.transitions[a, b] for a, b in pairwise(tags))
        assert bool(says and allowed.end[tags[-1]]) == right


@settings(max_examples=30)
@given(seed=st.integers(0, 1000))
def test_what_is_forbidden_never_comes_out_and_has_no_probability(seed):
    crf = made(5, seed, iob2(NAMES))
    emissions, lengths = drawn(4, 9, 5, seed=seed, spread=3.0), torch.tensor([9, 1, 4, 9])
    for row in crf.viterbi(emissions, lengths)[0]:
        assert may(crf, row)
    assert not crf.marginals(emissions, lengths)[:, 0, [2, 4]].any()


def test_padding_is_never_read():
    crf, emissions, lengths = made(3), drawn(2, 6, 3), torch.tensor([6, 2])
    broken = emissions.clone()
    broken[1, 2:] = torch.nan
    found = []
    for x in (emissions, broken):
        x.requires_grad_()
        tags = torch.zeros(2, 6, dtype=torch.int64)
        likelihood = crf.log_likelihood(x, tags, lengths)
        grads = torch.autograd.grad(likelihood.sum(), (x, crf.transitions, crf.start, crf.end))
        found.append((likelihood, *grads, crf.marginals(x, lengths), crf.viterbi(x, lengths)[1]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("O", "PER"), r"tag 'PER' must be 'O', 'B-x' or 'I-x' for transitions constrained to IOB2: rename it"),
        (("O", "B-"), r"tag 'B-' must be 'O', 'B-x' or 'I-x'"),
        (("O", "I-X"), r"tag 'I-X' can follow nothing without 'B-X': add that tag, or remove this one"),
    ],
)
def test_names_that_iob2_does_not_have_are_refused(names, message):
    with pytest.raises(ConfigError, match=message):
        iob2(names)


def test_constraints_of_another_size_are_refused():
    with pytest.raises(ConfigError, match=r"allowed\.transitions has shape \(5, 5\) and must be \(3, 3\) for 3 tags"):
        CRF(3, iob2(NAMES))


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([[0, 0, 0], [1, 5, 0]], r"sequence 1 has tag 5 at step 1, and tags lie in \[0, 5\): correct it"),
        ([[0, 0, -1], [1, 2, 0]], r"sequence 0 has tag -1 at step 2"),
        ([[0, 0, 0], [2, 0, 0]], r"sequence 1 begins with tag 2, which the constraints forbid: correct the tags, or drop"),
        ([[1, 2, 4], [0, 0, 4]], r"sequence 0 has tag 4 after tag 2 at step 2, which the constraints forbid"),
    ],
)  # fmt: skip
def test_tags_that_cannot_be_are_refused(tags, message):
    crf = CRF(5, iob2(NAMES))
    with pytest.raises(DataError, match=message):
        crf.score(torch.zeros(2, 3, 5), torch.tensor(tags), torch.tensor([3, 2]))


def test_a_forbidden_last_tag_is_refused():
    allowed = Allowed(torch.ones(2, 2).bool(), torch.ones(2).bool(), torch.tensor([True, False]))
    with pytest.raises(DataError, match="sequence 1 ends with tag 1, which the constraints forbid"):
        CRF(2, allowed).score(torch.zeros(2, 3, 2), torch.tensor([[1, 1, 0], [0, 1, 0]]), torch.tensor([3, 2]))


def test_constraints_that_leave_nothing_are_refused():
    """Two tags that must alternate, from the first to the second: no odd length is possible."""
    allowed = Allowed(~torch.eye(2).bool(), torch.tensor([True, False]), torch.tensor([False, True]))
    crf = CRF(2, allowed)
    emissions = torch.zeros(2, 4, 2)
    assert crf.viterbi(emissions, torch.tensor([2, 4]))[0] == [[0, 1], [0, 1, 0, 1]]
    for compute in (crf.viterbi, crf.log_partition):
        with pytest.raises(DataError, match="the constraints allow no sequence of 3 tags: allow more transitions, first or last"):
            compute(emissions, torch.tensor([4, 3]))
