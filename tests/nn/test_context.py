"""Law L3 in the model itself: packed = separate, and no sequence sees another."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from athanor.nn.context import Causal, Packed, from_rows, to_rows

LENGTHS = [(7, 1, 12, 3, 5), (1,), (1, 1, 1), (9, 9, 9), (2, 31, 4, 33, 17, 1), (40,)]


@pytest.fixture(scope="module")
def model(tiny):
    return tiny()


def random_ids(model, n, seed=0):
    return torch.randint(0, model.config.vocab_size, (n,), generator=torch.Generator().manual_seed(seed))


def packed(model, ids, lengths):
    return model.hidden(ids.unsqueeze(0), Packed(torch.tensor(lengths)))[0]


def alone(model, ids, lengths):
    parts = ids.split(list(lengths))
    return torch.cat([model.hidden(part.unsqueeze(0), Causal(1, len(part)))[0] for part in parts])


@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_is_separate_forward_and_backward(model, lengths):
    ids = random_ids(model, sum(lengths))
    weights = torch.randn(sum(lengths), model.config.d_model, generator=torch.Generator().manual_seed(1))
    results = []
    for forward in (packed, alone):
        model.zero_grad()
        hidden = forward(model, ids, lengths)
        (hidden * weights).sum().backward()
        results.append((hidden.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (one, one_grads), (other, other_grads) = results
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert len(one_grads) == len(other_grads) > 10
    for a, b in zip(one_grads, other_grads, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-6


@pytest.mark.parametrize("lengths", [(7, 12, 3), (1, 6, 1), (9, 9, 9), (5, 33, 6)])
def test_another_document_changes_no_bit_of_this_one(model, lengths):
    first, middle, _ = lengths
    ids = random_ids(model, sum(lengths))
    mine = slice(first, first + middle)
    other = random_ids(model, sum(lengths), seed=5)
    other[mine] = ids[mine]
    with torch.no_grad():
        before, after = packed(model, ids, lengths), packed(model, other, lengths)
    assert torch.equal(before[mine], after[mine])
    assert not torch.equal(before[:first], after[:first])
    assert not torch.equal(before[first + middle :], after[first + middle :])


def test_no_gradient_flows_into_another_document(model):
    lengths = (4, 9, 6)
    table = model.embedding.weight
    ids = torch.arange(20, 20 + sum(lengths))
    model.zero_grad()
    packed(model, ids, lengths)[4:13].square().sum().backward()
    touched = set(table.grad.abs().sum(1).nonzero().squeeze(1).tolist())
    assert touched == set(ids[4:13].tolist())


def test_a_later_token_changes_no_earlier_one(model):
    lengths = (6, 14)
    ids = random_ids(model, 20)
    changed = ids.clone()
    changed[12] = (ids[12] + 1) % model.config.vocab_size
    with torch.no_grad():
        before, after = packed(model, ids, lengths), packed(model, changed, lengths)
    assert torch.equal(before[:12], after[:12])
    assert all(not torch.equal(before[i], after[i]) for i in range(12, 20))


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), groups=st.sampled_from([1, 2, 4]), seed=st.integers(0, 999))
def test_packed_attention_is_causal_attention_of_each(lengths, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    query = torch.randn(1, n, 4, 8, generator=generator)
    key, value = torch.randn(2, 1, n, groups, 8, generator=generator)
    ctx = Packed(torch.tensor(lengths))
    assert ctx.positions[0].tolist() == [i for length in lengths for i in range(length)]
    start = 0
    out = ctx.attend(0, query, key, value)
    assert out.shape == query.shape
    for length in lengths:
        at = slice(start, start + length)
        expected = Causal(1, length).attend(0, query[:, at], key[:, at], value[:, at])
        torch.testing.assert_close(out[:, at], expected, rtol=1e-5, atol=1e-6)
        start += length


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(7, 12, 3), (1, 6, 1), (33, 31, 32)])
def test_what_is_not_finite_stays_in_its_document(causal, lengths):
    """Padding is multiplied by probability 0, which does not stop inf and nan: it may be of no other document."""
    x = [torch.randn(1, sum(lengths), 2, 4, requires_grad=True) for _ in range(3)]
    first = lengths[0]
    spoilt = [t.detach().clone().index_fill_(1, torch.arange(first), float("nan")).requires_grad_() for t in x]
    outs = [Packed(torch.tensor(lengths), causal=causal).attend(0, *given)[:, first:] for given in (x, spoilt)]
    assert torch.equal(*outs)
    for tensors, out in zip((x, spoilt), outs, strict=True):
        out.square().sum().backward()
        assert all(t.grad[:, first:].isfinite().all() for t in tensors)
    for a, b in zip(x, spoilt, strict=True):
        assert torch.equal(a.grad[:, first:], b.grad[:, first:])


def test_rows_of_sequences_of_any_length_hold_nobody_elses_tokens():
    lengths = torch.tensor([2, 0, 4, 1, 0])
    x = torch.arange(7.0)[:, None] + 1
    rows = to_rows(x, lengths)[:, :, 0]
    assert rows.tolist()[0] == [1, 2, 2, 2] and rows.tolist()[2] == [3, 4, 5, 6] and rows.tolist()[3] == [7, 7, 7, 7]
    assert torch.equal(from_rows(to_rows(x, lengths), lengths), x)
