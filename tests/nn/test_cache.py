"""Keys and values of generation: what is there stays, and decoding reads what prefill wrote."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from athanor.nn.cache import Decode, KVCache, Prefill
from athanor.nn.context import Causal


def cache_for(model):
    c = model.config
    return KVCache(c.n_layers, c.n_kv_heads, c.head_dim, torch.float32, torch.device("cpu"))


@settings(max_examples=40)
@given(sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 200)), min_size=1, max_size=5))
def test_growth_keeps_contents_and_has_room(sizes):
    cache = KVCache(1, 2, 4, torch.float32, torch.device("cpu"))
    written = torch.zeros(1, 0, 2, 0, 4)
    generator = torch.Generator().manual_seed(0)
    for rows, positions in sizes:
        cache.reserve(rows, positions)
        r, s = written.shape[1], written.shape[3]
        for entries in (cache.keys, cache.values):
            assert entries.shape[1] >= max(rows, r) and entries.shape[3] >= max(positions, s)
            assert torch.equal(entries[:, :r, :, :s], written)
            assert not entries[:, r:].any() and not entries[:, :, :, s:].any()
        written = torch.randn(cache.keys.shape, generator=generator)
        cache.keys.copy_(written)
        cache.values.copy_(written)


def test_rows_are_copied_up_to_a_position_even_when_they_overlap():
    cache = KVCache(2, 1, 2, torch.float32, torch.device("cpu"))
    cache.reserve(4, 8)
    cache.keys.copy_(torch.randn(cache.keys.shape))
    before = cache.keys.clone()
    cache.copy_rows(torch.tensor([1, 2]), torch.tensor([2, 0]), 3)
    expected = before.clone()
    expected[:, 2, :, :3], expected[:, 0, :, :3] = before[:, 1, :, :3], before[:, 2, :, :3]
    assert torch.equal(cache.keys, expected)


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
        cache.keys.fill_(litter)
        cache.values.fill_(litter)
        with torch.no_grad():
            model.hidden(prompt, Prefill(cache, torch.tensor([0]), torch.tensor([3])))
            model.hidden(torch.full((1, 40), 50), Prefill(cache, torch.tensor([1]), torch.tensor([40])))
            results.append(model.hidden(torch.tensor([[60], [60]]), Decode(cache, torch.tensor([3, 40])))[0])
    assert torch.equal(*results)
