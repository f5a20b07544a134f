"""The paged cache: whatever way a text is cut into calls, and wherever its blocks lie, the numbers are those of one pass."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from athanor.core.errors import ConfigError
from athanor.models import io
from athanor.nn.cache import KV, State
from athanor.nn.context import Causal
from athanor.nn.paged import Paged, PagedCache
from tests.models.reference import cases, config_of

CPU = torch.device("cpu")


def random_model(case):
    model = io.build(case[0], config_of(case), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.15, generator=generator)
    return model.eval()


def in_calls(model, sequences, cuts, size, seed=0):
    """Hidden states of all sequences, a call at a time; `cuts[i]` are the sizes of the calls of sequence i."""
    layers = model.cache_layers()
    needed = [-(-len(s) // size) for s in sequences]
    cache = PagedCache(layers, sum(needed) + 3, size, len(sequences), torch.float32, CPU)
    for x in (*cache.keys, *cache.values, *cache.states):
        if x is not None:
            x.fill_(7.0)  # what others left
    order = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
    tables = torch.zeros(len(sequences), max(needed), dtype=torch.int64)
    for i, n in enumerate(needed):
        tables[i, :n] = torch.tensor([order.pop() for _ in range(n)])
    done, found = [0] * len(sequences), [[] for _ in sequences]
    for call in range(max(map(len, cuts))):
        who = [i for i in range(len(sequences)) if call < len(cuts[i])]
        lengths = [cuts[i][call] for i in who]
        ids = torch.cat([sequences[i][done[i] : done[i] + n] for i, n in zip(who, lengths, strict=True)])
        at = torch.tensor(who)
        starts = torch.tensor([done[i] for i in who])
        with torch.no_grad():
            ctx = Paged(cache, tables[at], starts, torch.tensor(lengths), at)
            hidden = model.hidden(ids.unsqueeze(0), ctx)[0]
        for i, part in zip(who, hidden.split(lengths), strict=True):
            done[i] += len(part)
            found[i].append(part)
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize("case", cases("decoder"), ids="-".join)
def test_parts_of_prompts_and_single_tokens_are_one_pass(case):
    model = random_model(case)
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(3, model.config.vocab_size, (n,), generator=generator) for n in (29, 12, 40)]
    cuts = [[9, 7, 1, 1, 11], [12], [1, 1, 20, 1, 1, 16]]
    with torch.no_grad():
        whole = [model.hidden(s.unsqueeze(0), Causal(1, len(s)))[0] for s in sequences]
    for got, expected in zip(in_calls(model, sequences, cuts, 8), whole, strict=True):
        assert float((got - expected).abs().max()) <= 1e-5


@settings(max_examples=25)
@given(data=st.data(), size=st.sampled_from([1, 4, 16]), seed=st.integers(0, 9))
def test_any_cut_and_any_order_of_blocks(data, size, seed):
    model = random_model(("llama", "tiny"))
    cuts = data.draw(st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(3, 300, (sum(c),), generator=generator) for c in cuts]
    with torch.no_grad():
        whole = [model.hidden(s.unsqueeze(0), Causal(1, len(s)))[0] for s in sequences]
    for got, expected in zip(in_calls(model, sequences, cuts, size, seed), whole, strict=True):
        assert float((got - expected).abs().max()) <= 1e-5


def test_a_block_costs_what_its_layers_keep():
    layers = [KV(2, 8, 8), KV(1, 12, 0), State(7)]
    cache = PagedCache(layers, 5, 16, 1, torch.bfloat16, CPU)
    held = sum(x.nbytes for x in (*cache.keys, *cache.values) if x is not None)
    assert 5 * 16 * PagedCache.bytes_per_token(layers, torch.bfloat16) == held == 5 * 16 * 2 * (2 * (8 + 8) + 12)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_room_that_nothing_stands_in_takes_no_memory(dtype):
    """4 GB of it, of which three blocks are written."""
    before = resident()
    cache = PagedCache([KV(8, 128, 128)], (2 << 30) // (8 * 16 * 128 * dtype.itemsize), 16, 1, dtype, CPU)
    assert cache.keys[0].dtype == dtype and cache.keys[0].nbytes + cache.values[0].nbytes == 4 << 30
    cache.keys[0][:, [0, 7, -1]] = 3.0
    assert cache.keys[0][:, :9].sum() == 3.0 * 2 * 8 * 16 * 128 and not cache.values[0][:, ::4096].any()
    assert resident() - before < 100e6
    cache.clear(torch.tensor([7]))
    assert cache.keys[0][:, :9].sum() == 3.0 * 8 * 16 * 128


def test_more_room_than_there_is_is_refused():
    with pytest.raises(ConfigError, match=r"a cache of [\d,]+ bytes for each layer is more than the system gives \(Cannot"):
        PagedCache([KV(8, 128, 128)], 1 << 36, 16, 1, torch.float32, CPU)  # more than processors can name
