"""New heads on models, and what is made of hidden states without files: vectors, spans, counts; against computations by hand."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given as over_all
from hypothesis import strategies as st

from athanor.core import plugins
from athanor.core.io import read_json
from athanor.models import bert, heads, io
from athanor.models._head_names import names_of
from athanor.models._sentence import Pooling
from athanor.models.heads import HEADS, Labels
from athanor.nn.context import Bidirectional, Causal, Packed, Padded
from athanor.types import IGNORE
from tests.models.reference import greatest, random_ids

L = 3  # labels


def tiny(name="llama"):
    """A new model."""
    return io.build(name, plugins.load("models", name).PRESETS["tiny"], seed=0)


def attached(name="llama", task="sequence", labels=L, **more):
    return heads.attach(tiny(name), task, labels, generator=torch.Generator().manual_seed(1), **more).eval()


def test_a_new_head_is_a_function_of_the_generator_and_keeps_the_trunk():
    a, b, other = (heads.attach(tiny("bert"), "sequence", L, generator=torch.Generator().manual_seed(i)) for i in (1, 1, 2))
    whole = tiny("bert")
    for name, p in whole.named_parameters():
        if not name.startswith("masked"):
            assert torch.equal(p, a.trunk.get_parameter(name))
    assert torch.equal(a.head.out.weight, b.head.out.weight) and not torch.equal(a.head.out.weight, other.head.out.weight)
    assert not a.head.out.bias.any() and 0.01 < float(a.head.dense.weight.detach().std()) < 0.03
    poisoned = heads.attach(tiny("bert"), "sequence", L, generator=torch.Generator())
    with torch.no_grad():
        for p in poisoned.parameters():
            p.fill_(torch.nan)
    poisoned.initialise(torch.Generator().manual_seed(1))
    assert all(bool(p.isfinite().all()) for p in poisoned.parameters())


def test_the_pooler_that_a_bert_has_becomes_the_dense_layer_of_its_classifier(tmp_path):
    transformers.BertModel(transformers.BertConfig(**bert.PRESETS["tiny"].to_hf())).save_pretrained(tmp_path)
    trunk = io.load(tmp_path)
    pooler = trunk.pooler.weight
    ours = heads.attach(trunk, "sequence", L, generator=torch.Generator())
    assert ours.head.dense.weight is pooler and ours.trunk.pooler is None
    assert heads.attach(io.load(tmp_path), "token", L, generator=torch.Generator()).trunk.pooler is None


def test_a_recurrent_language_model_has_the_heads_of_a_decoder(tmp_path):
    for task in HEADS:
        (tmp_path / task).mkdir()
        ours = attached("rnn_lm", task, 2)
        io.save(ours, tmp_path / task)
        ids = random_ids(ours.config, 2, 7)
        assert torch.equal(io.load(tmp_path / task)(ids), ours(ids))
        assert read_json(tmp_path / task / "config.json")["architectures"] == ["RnnLM" + HEADS[task].suffix]


def test_what_was_right_is_counted():
    head, ctx = heads.SequenceHead(4, Labels.numbered(2), names_of(tiny(), "sequence")), Causal(3, 1)
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    assert int(head.loss(logits, torch.tensor([1, 1, IGNORE]), ctx)[2]["correct"]) == 1
    assert int(head.loss(logits - 0.5, torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]]), ctx)[2]["correct"]) == 5


@pytest.mark.parametrize("how", ["mean", "cls", "last"])
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
@torch.no_grad()
def test_embeddings_are_those_computed_by_hand(name, how):
    model = tiny(name)
    rows = [random_ids(model.config, n, seed=n) for n in (5, 9, 1)]
    whole = Causal if model.kind == "decoder" else Bidirectional
    expected = []
    for row in rows:
        read = model.encode if name == "t5" else model.hidden
        states = read(row.unsqueeze(0), whole(1, len(row)))[0]
        expected.append({"mean": states.sum(0) / len(row), "cls": states[0], "last": states[-1]}[how])
    expected = torch.stack(expected)
    ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, 9 - len(row) :], mask[i, 9 - len(row) :] = row, 1
    causal = model.kind == "decoder"
    for given, ctx in (
        (ids, Padded(mask, causal)),
        (torch.cat(rows).unsqueeze(0), Packed(torch.tensor([5, 9, 1]), causal)),
    ):
        found = heads.embed(model, given, ctx, Pooling(how, normalised=False))
        assert found.dtype == torch.float32 and greatest(found, expected) <= 1e-5
        scaled = heads.embed(model, given, ctx, Pooling(how))
        assert greatest(scaled, expected / expected.norm(dim=1, keepdim=True)) <= 1e-5
    assert (
        greatest(heads.similarity(expected, expected[:2]), F.cosine_similarity(expected[:, None], expected[None, :2], dim=2))
        <= 1e-6
    )


@torch.no_grad()
def test_an_embedding_does_not_depend_on_the_head():
    headed, ids = attached("bert"), random_ids(bert.PRESETS["tiny"], 2, 7)
    ctx = Bidirectional(2, 7)
    assert torch.equal(heads.embed(headed, ids, ctx), heads.embed(headed.trunk, ids, ctx))
    segments = (torch.arange(7) > 3).long().expand(2, -1)
    assert greatest(heads.embed(headed, ids, ctx, segments=segments), heads.embed(headed, ids, ctx)) > 1e-3


@over_all(st.data())
def test_the_best_answer_is_that_of_brute_force(data):
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    longest = data.draw(st.integers(1, 8))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    n = sum(lengths)
    logits, context = torch.randn(1, n, 2), torch.rand(1, n) < 0.6
    ctx, first = Packed(torch.tensor(lengths), causal=False), 0
    for size in lengths:
        context[0, first + int(torch.randint(size, ()))] = True
        first += size
    starts, ends, scores = heads.best_spans(logits, ctx, context, longest)
    first = 0
    for i, size in enumerate(lengths):
        allowed = [
            (float(logits[0, first + a, 0] + logits[0, first + b, 1]), a, b)
            for a in range(size)
            for b in range(a, min(size, a + longest))
            if context[0, first + a] and context[0, first + b]
        ]
        assert (float(scores[i]), int(starts[i]), int(ends[i])) == max(allowed)
        first += size


def test_padding_is_no_part_of_an_answer():
    logits = torch.zeros(2, 5, 2)
    logits[:, :2] = 9.0
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    logits[0, 3, 0] = logits[0, 4, 1] = 1.0
    starts, ends, scores = heads.best_spans(logits, Padded(mask, causal=False), max_length=1)
    assert starts[0] == ends[0] and float(scores[0]) == 1.0
    starts, ends, scores = heads.best_spans(logits, Padded(mask, causal=False))
    assert (starts.tolist()[0], ends.tolist()[0], scores.tolist()) == (1, 2, [2.0, 18.0])
