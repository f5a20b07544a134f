"""The tagger against torch.nn.LSTM and brute force; packed = separate; files there and back; it learns a rule."""

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from torch import nn

from athanor.core.errors import CheckpointError, ConfigError, DataError
from athanor.core.io import read_json
from athanor.models import bilstm_crf, io
from athanor.nn.context import Bidirectional, Packed, Padded
from tests.models import test_parity
from tests.models.reference import files, greatest, random_ids

TINY = [name for name in bilstm_crf.PRESETS if name.startswith("tiny")]
over_presets = pytest.mark.parametrize("preset", TINY)


def built(preset):
    model = io.build("bilstm_crf", bilstm_crf.PRESETS[preset], seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5, generator=generator)
    return model.eval()


class Theirs(nn.Module):
    """Emissions by PyTorch's parts alone."""

    def __init__(self, c):
        super().__init__()
        self.embedding = nn.Embedding(c.vocab_size, c.d_embedding)
        self.cells = nn.LSTM(c.d_embedding, c.d_hidden, c.n_layers, batch_first=True, bidirectional=True)
        self.emission = nn.Linear(2 * c.d_hidden, c.n_tags)

    def forward(self, ids):
        return self.emission(self.cells(self.embedding(ids))[0])


def renamed(name):
    if not name.startswith("layers."):
        return name
    _, i, _, leaf = name.split(".")
    return "cells." + leaf.replace("_l0", f"_l{i}")


def theirs_of(model):
    theirs = Theirs(model.config)
    mine = {renamed(name): p for name, p in model.named_parameters() if not name.startswith("crf.")}
    theirs.load_state_dict(mine)
    return theirs


@over_presets
def test_emissions_and_gradients_are_those_of_torch(preset):
    ours = built(preset)
    theirs = theirs_of(ours)
    ids = random_ids(ours.config, 3, 11)
    weights = torch.randn(3, 11, ours.config.n_tags, generator=torch.Generator().manual_seed(0))
    found, expected = ours(ids), theirs(ids)
    assert expected.std() > 0.05
    assert greatest(found.detach(), expected.detach()) <= 1e-5
    for x in (found, expected):
        (x * weights).sum().backward()
    yours = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if not name.startswith("crf."):
            grad = yours[renamed(name)].grad
            assert greatest(p.grad, grad) <= 1e-4 * float(grad.abs().max()), name


@over_presets
def test_likelihood_decoding_and_marginals_are_those_of_brute_force(preset):
    ours = built(preset)
    theirs, crf, c = theirs_of(ours), ours.crf, ours.config
    lengths = (4, 1, 3)
    texts = [random_ids(c, n, seed=n) for n in lengths]
    ctx, ids = Packed(torch.tensor(lengths), causal=False), torch.cat(texts).unsqueeze(0)
    with torch.no_grad():
        best, marginals = ours.decode(ids, ctx), ours.marginals(ids, ctx)
        for row, text in enumerate(texts):
            emissions = theirs(text.unsqueeze(0))[0].double()
            scores = {}
            for path in product(range(c.n_tags), repeat=len(text)):
                names = ["O", *(c.tags[tag] for tag in path)]
                if c.iob2 and any(b[0] == "I" and a[2:] != b[2:] for a, b in pairwise(names)):
                    continue
                score = crf.start[path[0]] + crf.end[path[-1]] + sum(emissions[t, tag] for t, tag in enumerate(path))
                scores[path] = float(score + sum(crf.transitions[a, b] for a, b in pairwise(path)))
            log_z = float(torch.tensor(list(scores.values()), dtype=torch.float64).logsumexp(0))
            assert tuple(best[row]) == max(scores, key=scores.get)
            for tag in range(c.n_tags):
                p = sum(torch.tensor(score - log_z).exp() for path, score in scores.items() if path[0] == tag)
                assert abs(float(marginals[row, 0, tag]) - float(p)) <= 1e-5
            for path in list(scores)[:: max(1, len(scores) // 20)]:
                found = ours.log_likelihood(text.unsqueeze(0), torch.tensor([path]), Bidirectional(1, len(text)))
                assert abs(float(found) - (scores[path] - log_z)) <= 1e-5 * max(1.0, abs(scores[path] - log_z))


@over_presets
def test_packed_and_padded_are_separate(preset):
    """Likelihoods, tags and every gradient; what reads from the end begins at each sequence's true end."""
    ours, lengths = built(preset), (7, 1, 12, 3, 12)
    texts = [random_ids(ours.config, n, seed=n) for n in lengths]
    tags = [torch.zeros(n, dtype=torch.int64) + torch.arange(n) % 2 for n in lengths]
    flat = torch.cat(texts).unsqueeze(0), torch.cat(tags).unsqueeze(0)
    ways = {"packed": (*flat, Packed(torch.tensor(lengths), causal=False))}
    for side in ("left", "right"):
        mask = torch.zeros(5, 14, dtype=torch.bool)
        for row, n in enumerate(lengths):
            mask[row, slice(14 - n, 14) if side == "left" else slice(0, n)] = True
        ids, gold = torch.full((5, 14), 9), torch.full((5, 14), -100)
        ids[mask], gold[mask] = flat[0][0], flat[1][0]
        ways[side] = ids, gold, Padded(mask, causal=False)
    alone = [(i.unsqueeze(0), t.unsqueeze(0), Bidirectional(1, len(i))) for i, t in zip(texts, tags, strict=True)]
    ours.zero_grad()
    expected = torch.cat([ours.log_likelihood(*one) for one in alone])
    expected.sum().backward()
    grads = {name: p.grad.clone() for name, p in ours.named_parameters()}
    best = [ours.decode(i, ctx)[0] for i, _, ctx in alone]
    for way, (ids, gold, ctx) in ways.items():
        ours.zero_grad()
        found = ours.log_likelihood(ids, gold, ctx)
        found.sum().backward()
        assert greatest(found.detach(), expected.detach()) <= 1e-4, way
        assert ours.decode(ids, ctx) == best
        for name, p in ours.named_parameters():
            assert greatest(p.grad, grads[name]) <= 1e-4 * float(grads[name].abs().max()) + 1e-6, (way, name)


def test_another_sequence_changes_no_bit_of_this_one():
    ours, ctx = built("tiny"), Packed(torch.tensor([5, 8]), causal=False)
    ids = random_ids(ours.config, 1, 13)
    changed = torch.cat((ids[:, :5], ids[:, 5:].flip(1)), 1)
    with torch.no_grad():
        assert torch.equal(ours.emissions(ids, ctx)[:, :5], ours.emissions(changed, ctx)[:, :5])
        # ... and both ends of its own do.
        for at in (0, 4):
            changed = ids.clone()
            changed[0, at] += 1
            before, after = ours.emissions(ids, ctx), ours.emissions(changed, ctx)
            assert ((before != after).any(2)[0, :5]).all() and torch.equal(before[:, 5:], after[:, 5:])


def test_it_learns_a_rule_that_needs_both_sides_and_the_tags_beside():
    """A chunk begins at a word below 100, goes on over words from 200 on, and has the kind that the word after it says."""
    config = bilstm_crf.Config(300, ("O", "B-X", "I-X", "B-Y", "I-Y"), 16, 24, iob2=True)
    model = io.build("bilstm_crf", config, seed=0)
    generator = torch.Generator().manual_seed(0)

    def sentences(n):
        ids, tags = [], []
        while len(ids) < n:
            kind = int(torch.randint(2, (), generator=generator))
            inside = int(torch.randint(3, (), generator=generator))
            before, after = (100 + 2 * torch.randint(50, (2,), generator=generator)).tolist()
            begin = int(torch.randint(100, (), generator=generator))
            middle = torch.randint(200, 300, (inside,), generator=generator).tolist()
            ids.append(torch.tensor([before, begin, *middle, after + kind]))
            tags.append(torch.tensor([0, 1 + 2 * kind, *[2 + 2 * kind] * inside, 0]))
        return torch.cat(ids).unsqueeze(0), tags, Packed(torch.tensor([len(t) for t in tags]), causal=False)

    def right(ids, tags, ctx):
        return sum(found == gold.tolist() for found, gold in zip(model.decode(ids, ctx), tags, strict=True)) / len(tags)

    held_out = sentences(200)
    assert right(*held_out) < 0.3
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        ids, tags, ctx = sentences(32)
        loss = -model.log_likelihood(ids, torch.cat(tags).unsqueeze(0), ctx).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert right(*held_out) >= 0.95


@over_presets
def test_files_there_and_back(preset, tmp_path):
    ours = built(preset)
    ids, ctx = random_ids(ours.config, 2, 9), Bidirectional(2, 9)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    io.save(ours, tmp_path / "a")
    again = io.load(tmp_path / "a")
    assert again.config == ours.config
    assert torch.equal(again.marginals(ids, ctx), ours.marginals(ids, ctx)) and again.decode(ids, ctx) == ours.decode(ids, ctx)
    io.save(again, tmp_path / "b")
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert {"embedding.weight", "layers.0.weight_hh_l0_reverse", "emission.bias", "crf.transitions"} <= a.keys()
    fields = read_json(tmp_path / "b" / "config.json")
    assert fields == read_json(tmp_path / "a" / "config.json")
    assert fields["id2label"] == {str(i): tag for i, tag in enumerate(ours.config.tags)}
    assert fields["label2id"] == {tag: i for i, tag in enumerate(ours.config.tags)}


@over_presets
def test_the_suite_of_all_architectures(preset, tmp_path):
    test_parity.test_initialise_is_a_function_of_the_seed_and_sets_every_weight(("bilstm_crf", preset))
    test_parity.test_loading_neither_draws_random_numbers_nor_leaves_anything_without_a_device(("bilstm_crf", preset), tmp_path)


def test_published_shapes():
    config = bilstm_crf.PRESETS["huang-2015"]
    expected = 130_000 * 50 + 2 * (4 * 300 * (50 + 300) + 8 * 300) + 9 * 601 + 9 * 9 + 18
    assert io.build("bilstm_crf", config).n_parameters() == expected
    assert bilstm_crf.Config.from_hf(config.to_hf()) == config


def test_tags_that_the_constraints_forbid_are_refused():
    ours = built("tiny-iob2")
    with pytest.raises(DataError, match="sequence 1 has tag 4 after tag 1 at step 1, which the constraints forbid"):
        ours.log_likelihood(
            random_ids(ours.config, 1, 5), torch.tensor([[0, 0, 1, 4, 0]]), Packed(torch.tensor([2, 3]), causal=False)
        )


def test_it_has_no_logits_of_tokens():
    with pytest.raises(ConfigError, match="its task is 'tags'"):
        built("tiny").logits(torch.zeros(1, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_hidden": 0}, r"d_hidden \(0\) must be at least 1"),
        ({"tags": ()}, "tags is empty: name at least one tag"),
        ({"tags": ("A", "B", "A")}, "tags names 'A' twice: each tag needs a name of its own"),
        ({"iob2": True}, "tag 'A' must be 'O', 'B-x' or 'I-x'"),
    ],
)
def test_mistakes_in_a_config_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(bilstm_crf.PRESETS["tiny"], **change)


@pytest.mark.parametrize("value", [None, {}, {"1": "A", "2": "B"}, {"0": 3}, ["A"]])
def test_labels_that_are_none_are_refused(value):
    with pytest.raises(CheckpointError, match="id2label"):
        bilstm_crf.Config.from_hf(bilstm_crf.PRESETS["tiny"].to_hf() | {"id2label": value})
