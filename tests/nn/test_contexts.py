"""Who sees whom, in every context, against softmax over an explicit mask: values and gradients.

Legend: S sequences, T tokens of each, H query heads, G key/value heads, K key width, V value width.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from athanor.nn.context import Bidirectional, Causal, Memory, Packed, Padded, WithMemory
from athanor.nn.sdpa import Scoring

H, G, K, V = 4, 2, 6, 5
LENGTHS = st.lists(st.integers(1, 24), min_size=1, max_size=5)
SCORINGS = st.builds(
    Scoring, scale=st.sampled_from([None, 0.3]), softcap=st.sampled_from([None, 2.0]), window=st.sampled_from([None, 1, 3, 9])
)


def drawn(n, *shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=generator).requires_grad_() for shape in shapes]


def plainly(query, key, value, visible, scoring):
    """softmax(cap(scale Q K^T)) V of one sequence: (T, H, K), (S, G, K), (S, G, V), (T, S) -> (T, H, V)."""
    key, value = (x.repeat_interleave(H // G, 1) for x in (key, value))
    scores = torch.einsum("thk,shk->hts", query, key) * (K**-0.5 if scoring.scale is None else scoring.scale)
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    return torch.einsum("hts,shv->thv", scores.softmax(-1), value)


def visible_to(time, causal, window, prefix=0):
    """Query by query and key by key, as it is said in words."""
    seen = torch.zeros(time, time, dtype=torch.bool)
    for q in range(time):
        for k in range(time):
            if causal:
                inside = window is None or q - k < window
                seen[q, k] = (k <= q or k < prefix) and inside
            else:
                seen[q, k] = window is None or abs(q - k) <= window
    return seen


def same(found, expected, tensors):
    """Values, and the gradients of both by all tensors."""
    assert torch.allclose(found, expected, atol=1e-5)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(9))
    mine = torch.autograd.grad(found, tensors, upstream)
    for a, b in zip(mine, torch.autograd.grad(expected, tensors, upstream), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@given(st.integers(1, 4), st.integers(1, 24), st.booleans(), SCORINGS)
def test_rows_of_one_length(rows, time, causal, scoring):
    q, k, v = drawn(rows * time, (H, K), (G, K), (G, V))
    shaped = [x.view(rows, time, *x.shape[1:]) for x in (q, k, v)]
    ctx = (Causal if causal else Bidirectional)(rows, time)
    found = ctx.attend(0, *shaped, scoring).reshape(rows * time, H, V)
    mask = visible_to(time, causal, scoring.window)
    parts = zip(*(x.split(time) for x in (q, k, v)), strict=True)
    same(found, torch.cat([plainly(*part, mask, scoring) for part in parts]), (q, k, v))


@pytest.mark.parametrize(("causal", "prefixed"), [(False, False), (True, False), (True, True)])
@given(lengths=LENGTHS, scoring=SCORINGS, data=st.data())
def test_packed_sequences_with_and_without_a_prefix(causal, prefixed, lengths, scoring, data):
    q, k, v = drawn(sum(lengths), (H, K), (G, K), (G, V))
    prefix = [data.draw(st.integers(0, n)) if prefixed else 0 for n in lengths]
    before = torch.tensor(prefix) if prefixed else None
    ctx = Packed(torch.tensor(lengths), causal, before)
    assert ctx.positions[0].tolist() == [t for n in lengths for t in range(n)] and ctx.extent == max(lengths)
    found = ctx.attend(0, q[None], k[None], v[None], scoring)[0]
    parts = zip(*(x.split(lengths) for x in (q, k, v)), lengths, prefix, strict=True)
    expected = [plainly(a, b, c, visible_to(n, causal, scoring.window, p), scoring) for a, b, c, n, p in parts]
    same(found, torch.cat(expected), (q, k, v))


@given(LENGTHS, st.booleans(), SCORINGS, st.data())
def test_padding_on_either_side(lengths, causal, scoring, data):
    longest = max(lengths)
    left = [data.draw(st.integers(0, longest - n)) for n in lengths]
    q, k, v = drawn(len(lengths) * longest, (H, K), (G, K), (G, V))
    shaped = [x.view(len(lengths), longest, *x.shape[1:]) for x in (q, k, v)]
    mask = torch.zeros(len(lengths), longest, dtype=torch.int64)
    for row, (n, at) in enumerate(zip(lengths, left, strict=True)):
        mask[row, at : at + n] = 1
    ctx = Padded(mask, causal)
    found = ctx.attend(0, *shaped, scoring)
    real, expected = [], []
    for row, (n, at) in enumerate(zip(lengths, left, strict=True)):
        assert ctx.positions[row, at : at + n].tolist() == list(range(n))
        real.append(found[row, at : at + n])
        part = (x[row, at : at + n] for x in shaped)
        expected.append(plainly(*part, visible_to(n, causal, scoring.window), scoring))
    same(torch.cat(real), torch.cat(expected), (q, k, v))


@given(LENGTHS, st.data())
def test_a_memory_is_seen_whole_by_its_own_answer(lengths, data):
    sources = [data.draw(st.integers(1, 20)) for _ in lengths]
    (q,) = drawn(sum(lengths), (H, K))
    memory, w_key, w_value = drawn(1, (sum(sources), 3), (3, H * K), (3, H * V), seed=4)

    def project(x):
        return (x @ w_key[0]).view(*x.shape[:2], H, K), (x @ w_value[0]).view(*x.shape[:2], H, V)

    ctx = WithMemory(Packed(torch.tensor(lengths)), Memory(memory, torch.tensor(sources)))
    found = ctx.cross(0, q[None], project)[0]
    expected = []
    for part, source in zip(q.split(lengths), memory[0].split(sources), strict=True):
        key, value = project(source[None])
        scores = torch.einsum("thk,shk->hts", part, key[0]) * K**-0.5
        expected.append(torch.einsum("hts,shv->thv", scores.softmax(-1), value[0]))
    same(found, torch.cat(expected), (q, memory, w_key, w_value))


def test_a_memory_with_padding():
    (q,) = drawn(2 * 3, (H, K))
    (memory,) = drawn(2 * 5, (H * K,), seed=1)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])

    def project(x):
        return x.view(*x.shape[:2], H, K), x.view(*x.shape[:2], H, K)

    rows = memory.view(2, 5, -1)
    found = WithMemory(Causal(2, 3), Memory(rows, mask=mask)).cross(0, q.view(2, 3, H, K), project)
    expected = []
    for row in range(2):
        key = rows[row][mask[row].bool()].view(-1, H, K)
        scores = torch.einsum("thk,shk->hts", q.view(2, 3, H, K)[row], key) * K**-0.5
        expected.append(torch.einsum("hts,shk->thk", scores.softmax(-1), key))
    same(found, torch.stack(expected), (q, memory))


@pytest.mark.parametrize("ctx", [Causal(1, 3), Packed(torch.tensor([3])), Padded(torch.ones(1, 3), causal=True)])
def test_without_a_memory_there_is_nothing_to_read(ctx):
    with pytest.raises(AssertionError, match="this context has no memory: wrap it in WithMemory"):
        ctx.cross(0, torch.zeros(1, 3, H, K), lambda x: (x, x))
