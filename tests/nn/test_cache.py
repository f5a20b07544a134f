"""Keys and values of generation: what is there stays, and decoding reads what prefill wrote."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from athanor.nn.cache import KV, Decode, KVCache, Prefill, State
from athanor.nn.context import Causal


def cache_for(model):
    return KVCache(model.cache_layers(), torch.float32, torch.device("cpu"))


LAYERS = [KV(2, 4, 4), State(3), KV(1, 6, 0), KV(1, 4, 2)]


def contents(cache):
    stores = [cache.own, *([cache.memory] if cache.memory else [])]
    return [x for store in stores for x in (*store.keys, *store.values) if x is not None]


@settings(max_examples=40)
@given(sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 200), st.integers(1, 90)), min_size=1, max_size=5))
def test_growth_keeps_contents_and_has_room(sizes):
    cache = KVCache(LAYERS, torch.float32, torch.device("cpu"), cross=[KV(2, 3, 3)])
    assert len(contents(cache)) == 5 + 2  # the third layer's values are its keys
    written = [x.clone() for x in contents(cache)]
    states = torch.zeros(0, 3)
    generator = torch.Generator().manual_seed(0)
    for rows, positions, memory in sizes:
        cache.reserve(rows, positions, memory)
        for i, (entries, old) in enumerate(zip(contents(cache), written, strict=True)):
            r, _, s, _ = old.shape
            assert entries.shape[0] >= max(rows, r) and entries.shape[2] >= max(positions if i < 5 else memory, s)
            assert torch.equal(entries[:r, :, :s], old)
            assert not entries[r:].any() and not entries[:, :, s:].any()
            entries.copy_(torch.randn(entries.shape, generator=generator))
        assert torch.equal(cache.states[1][: len(states)], states) and len(cache.states[1]) >= rows
        cache.states[1].copy_(torch.randn(cache.states[1].shape, generator=generator))
        written, states = [x.clone() for x in contents(cache)], cache.states[1].clone()


def test_rows_are_copied_up_to_a_position_even_when_they_overlap():
    cache = KVCache(LAYERS, torch.float32, torch.device("cpu"), cross=[KV(2, 3, 3)])
    cache.reserve(4, 8, 8)
    cache.memory_lengths[:] = torch.tensor([1, 5, 2, 4])
    for x in contents(cache):
        x.copy_(torch.randn(x.shape))
    cache.states[1].copy_(torch.randn(4, 3))
    before, states = [x.clone() for x in contents(cache)], cache.states[1].clone()
    cache.copy_rows(torch.tensor([1, 2]), torch.tensor([2, 0]), 3)
    for i, (after, old) in enumerate(zip(contents(cache), before, strict=True)):
        n = 3 if i < 5 else 5
        expected = old.clone()
        expected[2, :, :n], expected[0, :, :n] = old[1, :, :n], old[2, :, :n]
        assert torch.equal(after, expected)
    assert torch.equal(cache.states[1], states[[2, 1, 1, 3]])
    assert cache.memory_lengths.tolist() == [2, 5, 5, 4]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_prefill_and_decoding_are_the_full_forward_pass(tiny, groups):
    model = tiny(n_kv_heads=groups)
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, model.config.vocab_size, (n,), generator=generator) for n in (9, 3, 1, 70)]
    new = 5
    prompts = [s[:-new] if len(s) > new else s[:1] for s in sequences]
    sequences = [torch.cat((p, torch.randint(0, model.config.vocab_size, (new,), generator=generator))) for p in prompts]
    rows = torch.tensor([2, 0, 3, 1])
    cache = cache_for(model)
    cache.reserve(4, max(map(len, prompts)))
    with torch.no_grad():
        whole = [model.hidden(s.unsqueeze(0), Causal(1, len(s)))[0] for s in sequences]
        lengths = torch.tensor([len(p) for p in prompts])
        hidden = model.hidden(torch.cat(prompts).unsqueeze(0), Prefill(cache, rows, lengths))[0]
        for got, expected, n in zip(hidden.split(lengths.tolist()), whole, lengths.tolist(), strict=True):
            torch.testing.assert_close(got, expected[:n], rtol=0, atol=1e-5)
        by_row = torch.argsort(rows)  # which sequence lies in rows 0, 1, 2, 3
        for step in range(new):
            at = lengths[by_row] + step
            cache.reserve(4, int(at.max()) + 1)
            tokens = torch.stack([sequences[i][lengths[i] + step] for i in by_row])
            hidden = model.hidden(tokens.unsqueeze(1), Decode(cache, at))[:, 0]
            expected = torch.stack([whole[i][lengths[i] + step] for i in by_row])
            torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)


def test_what_lies_beyond_the_end_of_a_row_is_not_seen(tiny):
    model = tiny()
    prompt = torch.tensor([[20, 30, 40]])
    results = []
    for litter in (0.0, 1e4):
        cache = cache_for(model)
        cache.reserve(2, 64)
        for entries in contents(cache):
            entries.fill_(litter)
        with torch.no_grad():
            model.hidden(prompt, Prefill(cache, torch.tensor([0]), torch.tensor([3])))
            model.hidden(torch.full((1, 40), 50), Prefill(cache, torch.tensor([1]), torch.tensor([40])))
            results.append(model.hidden(torch.tensor([[60], [60]]), Decode(cache, torch.tensor([3, 40])))[0])
    assert torch.equal(*results)
