"""Masks against transformers' collator, losses against its BERTs on the same ids, and what holds for any text."""

import re

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from athanor.core.errors import ConfigError, DataError, NoTargetsError
from athanor.models import io
from athanor.objectives import masked_lm
from athanor.objectives._pretraining import choose, generator
from athanor.objectives._vocabulary import Vocabulary
from athanor.objectives.masked_lm import Config, prepare
from athanor.types import IGNORE, Batch

SIZE, MASK, CLS, SEP = 60, 4, 2, 3
V = Vocabulary(
    size=SIZE,
    special=frozenset(range(8)),
    word_starts=torch.arange(SIZE) % 3 != 0,
    sentence_ends=torch.arange(SIZE) % 10 == 9,
    eos=SEP,
    mask=MASK,
    cls=CLS,
    sep=SEP,
)
PIECES = st.lists(st.lists(st.integers(5, SIZE - 1), min_size=1, max_size=30), min_size=1, max_size=7)
CONFIGS = st.builds(
    Config,
    rate=st.sampled_from([0.05, 0.15, 0.5, 0.9]),
    mask=st.sampled_from([0.0, 0.5, 0.8]),
    random=st.sampled_from([0.0, 0.1, 0.2]),
    whole_words=st.booleans(),
    pairs=st.sampled_from(["none", "next", "order"]),
)


def batch_of(texts):
    ids = torch.tensor([id for text in texts for id in text])
    return Batch(ids, torch.full_like(ids, IGNORE), torch.tensor([len(text) for text in texts]), origin="texts")


def texts_of(batch):
    """The texts as they were, and their segments, without what stands around them."""
    ids = torch.where(batch.labels != IGNORE, batch.labels, batch.ids)
    found = []
    segments = batch.extras.get("segments", torch.zeros_like(ids))
    sizes = batch.lengths.tolist()
    for row, kinds in zip(ids.split(sizes), segments.split(sizes), strict=True):
        parts = [row[kinds == kind].tolist() for kind in (0, 1)]
        assert parts[0][0] == CLS and parts[0][-1] == SEP
        assert parts[1] == [] or parts[1][-1] == SEP
        found.append((parts[0][1:-1], parts[1][:-1]))
    return found


@given(PIECES, CONFIGS, st.integers(0, 2**32))
def test_of_any_texts(texts, config, seed):
    batch = prepare(batch_of(texts), config, V, torch.Generator().manual_seed(seed))
    chosen = batch.labels != IGNORE
    original = torch.where(chosen, batch.labels, batch.ids)
    assert int(batch.lengths.sum()) == len(batch.ids) == len(batch.labels)
    # What was not chosen is as it was; special tokens never are, nor do they come in but for the mask.
    assert not V.is_special[original[chosen]].any()
    assert not (V.is_special[batch.ids[chosen]] & (batch.ids[chosen] != MASK)).any()
    if config.mask == 0:
        assert not (batch.ids == MASK)[chosen].any()
    found = texts_of(batch)
    if config.pairs == "none":
        assert found == [(text, []) for text in texts] and not batch.extras
        return
    following = batch.extras["next"].tolist()
    assert len(following) == len(texts)
    for (first, second), text, kind in zip(found, texts, following, strict=True):
        assert (kind > 0) == bool(second) or kind == 0
        if kind < 2:
            assert first + second == text
        elif config.pairs == "order":
            assert second + first == text
        else:
            assert text[: len(first)] == first and len(first + second) == len(text)
    # No token is lost.
    assert sorted(id for pair in found for part in pair for id in part) == sorted(id for text in texts for id in text)


@given(st.lists(st.integers(5, SIZE - 1), min_size=2, max_size=60), st.integers(0, 2**32))
def test_words_are_chosen_whole(text, seed):
    batch = prepare(batch_of([text]), Config(rate=0.5, whole_words=True), V, torch.Generator().manual_seed(seed))
    chosen = (batch.labels != IGNORE).tolist()[1:-1]
    words = []
    for i, id in enumerate(text):
        if i == 0 or V.word_starts[id] or V.is_special[id] or V.is_special[text[i - 1]]:
            words.append([])
        words[-1].append(i)
    assert all(len({chosen[i] for i in word}) == 1 for word in words)


def test_special_tokens_at_the_edges_are_not_doubled():
    batch = prepare(batch_of([[CLS, 20, 21, SEP], [22, 23]]), Config(rate=0.01), V, generator(0, 0, 0))
    assert batch.lengths.tolist() == [4, 4] and texts_of(batch) == [([20, 21], []), ([22, 23], [])]


def shares(ids, labels, original, mask):
    """Share of chosen tokens, and of these the shares that became the mask, stayed, and became another."""
    chosen = labels != IGNORE
    masked, kept = (ids == mask) & chosen, (ids == original) & chosen
    n = int(chosen.sum())
    return n / len(ids), int(masked.sum()) / n, int(kept.sum()) / n, 1 - int((masked | kept).sum()) / n


@pytest.mark.parametrize("whole_words", [False, True])
def test_the_statistics_are_those_of_the_collator(whole_words, noisy, tmp_path):
    """400,000 tokens: standard deviations are below 0.001 and 0.002."""
    noisy.save(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    if whole_words:
        with pytest.warns(UserWarning, match="Setting mask_replace_prob to 1"):
            theirs = transformers.DataCollatorForLanguageModeling(tokenizer, whole_word_mask=True)
    else:
        theirs = transformers.DataCollatorForLanguageModeling(tokenizer)
    theirs.generator = torch.Generator().manual_seed(0)
    config = Config(whole_words=True, mask=1.0, random=0.0) if whole_words else Config()
    v = Vocabulary.of(noisy)
    original = v.ordinary[torch.randint(len(v.ordinary), (4000, 100), generator=torch.Generator().manual_seed(0))]
    starts = v.word_starts[original].clone()
    starts[:, 0] = True
    # Offsets with a gap before each word: that is how theirs knows words.
    ends = (torch.arange(1, 101) * 2).expand(4000, 100)
    offsets = torch.stack([torch.where(starts, ends - 1, ends - 2), ends], -1)
    ids, labels = theirs.torch_mask_tokens(original.clone(), torch.zeros_like(original), offset_mapping=offsets)
    expected = shares(ids.flatten(), labels.flatten(), original.flatten(), theirs.tokenizer.mask_token_id)
    batch = Batch(original.flatten(), original.flatten(), torch.full((4000,), 100))
    ours = prepare(batch, config, v, generator(0, 0, 0))
    inner = torch.ones(4000, 102, dtype=torch.bool)
    inner[:, [0, -1]] = False
    at = inner.flatten()
    found = shares(ours.ids[at], ours.labels[at], original.flatten(), v.mask)
    assert theirs.tokenizer.mask_token_id == v.mask
    assert found == pytest.approx((0.15, 1.0, 0.0, 0.0) if whole_words else (0.15, 0.8, 0.1, 0.1), abs=0.006)
    assert found == pytest.approx(expected, abs=0.01)


def test_pairs_are_even_and_their_lengths_say_nothing():
    """Of texts of many lengths: as often one as the other, with second segments of one distribution."""
    generator_ = torch.Generator().manual_seed(0)
    texts = [[20] * int(n) for n in torch.randint(2, 80, (3000,), generator=generator_)]
    for pairs in ("next", "order"):
        made = prepare(batch_of(texts), Config(pairs=pairs), V, generator_)
        seconds = torch.tensor([len(second) for _, second in texts_of(made)]).double()
        following = made.extras["next"]
        assert (following > 0).all()
        assert float((following == 1).double().mean()) == pytest.approx(0.5, abs=0.04)
        means = [float(seconds[following == kind].mean()) for kind in (1, 2)]
        assert means[0] == pytest.approx(means[1], abs=2.5)


def test_who_has_no_partner_is_not_asked():
    made = prepare(batch_of([[20, 21, 22], [23, 24, 25], [26, 27], [28]]), Config(pairs="next"), V, generator(0, 0, 0))
    assert sorted((made.extras["next"] == 0).tolist()) == [False, False, True, True]
    assert made.extras["next"][3] == 0


def bert(model_of, noisy, tmp_path, weight=20.0, pairs="next"):
    """Ours with its two heads, the same one of transformers, and the objective."""
    model = model_of("bert")
    found = choose("masked_lm", model, {"pairs": pairs, "pair_weight": weight}, noisy, 48)
    with torch.no_grad():
        model.following.weight.mul_(50)
        model.pooler.weight.mul_(10)
    io.save(model, tmp_path)
    return model, found, transformers.BertForPreTraining.from_pretrained(tmp_path).eval()


def padded(batch, values, fill):
    return torch.nn.utils.rnn.pad_sequence(values.split(batch.lengths.tolist()), batch_first=True, padding_value=fill)


@pytest.mark.parametrize("pairs", ["next", "order"])
def test_the_loss_is_that_of_bert_for_pre_training(pairs, model_of, noisy, rows, tmp_path):
    model, found, theirs = bert(model_of, noisy, tmp_path, pairs=pairs)
    batch = found.prepare(rows(), generator(0, 0, 0))
    asked = batch.extras["next"] > 0
    count, n = int((batch.labels != IGNORE).sum()), int(asked.sum())
    out = theirs(
        padded(batch, batch.ids, 0),
        attention_mask=padded(batch, torch.ones_like(batch.ids), 0),
        token_type_ids=padded(batch, batch.extras["segments"], 0),
        labels=padded(batch, batch.labels, IGNORE),
        next_sentence_label=torch.where(asked, batch.extras["next"] - 1, IGNORE),
    )
    out.loss.backward()
    # Their loss is the sum of two means.
    total, counted, metrics = masked_lm.build(Config(pairs=pairs, pair_weight=count / n))(model, batch)
    (total / counted).backward()
    assert counted == count and int(metrics["pairs"]) == n
    assert total.item() / count == pytest.approx(out.loss.item(), rel=1e-5)
    following = cross_entropy(out.seq_relationship_logits[asked], batch.extras["next"][asked] - 1)
    assert float(metrics["pairs_loss"]) / n == pytest.approx(following.item(), rel=1e-5)
    right = out.seq_relationship_logits[asked].argmax(1) == batch.extras["next"][asked] - 1
    assert int(metrics["pairs_correct"]) == int(right.sum())
    for ours, other in (
        (model.pooler.weight, theirs.bert.pooler.dense.weight),
        (model.following.bias, theirs.cls.seq_relationship.bias),
        (model.embedding.weight, theirs.bert.embeddings.word_embeddings.weight),
        (model.segments.weight, theirs.bert.embeddings.token_type_embeddings.weight),
    ):
        assert (ours.grad - other.grad).abs().max() <= 1e-4 * other.grad.abs().max()


@pytest.mark.parametrize("architecture", ["bert", "roberta", "longformer"])
@pytest.mark.parametrize("whole_words", [False, True])
def test_the_loss_is_that_of_transformers(architecture, whole_words, model_of, noisy, rows, tmp_path):
    model = model_of(architecture)
    found = choose("masked_lm", model, {"whole_words": whole_words}, noisy, 48)
    io.save(model, tmp_path)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    batch = found.prepare(rows(), generator(1, 0, 0))
    total, count, metrics = found.loss(model, batch)
    expected, correct = 0.0, 0
    for ids, labels in zip(batch.ids.split(batch.lengths.tolist()), batch.labels.split(batch.lengths.tolist()), strict=True):
        with torch.no_grad():
            logits = theirs(ids[None]).logits[0]
        expected += float(cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"))
        correct += int((logits.argmax(-1) == labels).sum())
    assert count == int((batch.labels != IGNORE).sum())
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert int(metrics["correct"]) == correct


def test_each_option_changes_the_batch(rows, noisy):
    v, batch = Vocabulary.of(noisy), rows()
    made = [{}, {"rate": 0.3}, {"mask": 0.5}, {"random": 0.0}, {"whole_words": True}, {"pairs": "next"}, {"pairs": "order"}]
    found = [prepare(batch, Config(**options), v, generator(0, 0, 0)) for options in made]
    assert len({(tuple(b.ids.tolist()), tuple(b.labels.tolist())) for b in found}) == len(made)


def test_new_heads_are_the_same_every_time(model_of, noisy):
    models = [model_of("bert") for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        choose("masked_lm", model, {"pairs": "order"}, noisy, 48, seed=seed)
    heads = [torch.cat([m.pooler.weight.flatten(), m.following.weight.flatten()]) for m in models]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert float(heads[0].detach().std()) == pytest.approx(0.02, rel=0.1)
    pooler = models[0].pooler
    choose("masked_lm", models[0], {"pairs": "next"}, noisy, 48)
    assert models[0].pooler is pooler


@pytest.mark.parametrize(("architecture", "fields"), [("roberta", {}), ("longformer", {}), ("bert", {"n_segments": 1})])
def test_pairs_that_a_model_cannot_learn(architecture, fields, model_of, noisy):
    message = (
        "pairs ('next') needs a family with a head of next sentences and two segments, and this"
        f" {architecture} has 1 of these: leave pairs 'none', or take a bert"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        choose("masked_lm", model_of(architecture, **fields), {"pairs": "next"}, noisy, 48)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": 0.0}, "rate (0.0) must lie in (0, 1): 0.15 is usual"),
        ({"rate": float("nan")}, "rate (nan) must lie in (0, 1)"),
        ({"mask": 1.1}, "mask (1.1) must lie in [0, 1]"),
        ({"random": -0.1}, "random (-0.1) must lie in [0, 1]"),
        ({"mask": 0.8, "random": 0.3}, "mask (0.8) and random (0.3) are shares of the same and must not sum to more than 1"),
        ({"pairs": "previous"}, "pairs ('previous') must be one of none, next, order"),
        ({"pair_weight": 0.0}, "pair_weight (0.0) must be above 0: leave pairs 'none' to learn nothing of them"),
    ],
)
def test_options_out_of_range(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config(**fields)


def test_batches_that_cannot_be_learned_from(model_of, noisy, rows):
    model = model_of("bert")
    loss = choose("masked_lm", model, {"pairs": "next"}, noisy, 48).loss
    batch = prepare(rows(), Config(), Vocabulary.of(noisy), generator(0, 0, 0))
    with pytest.raises(DataError, match=r"batch 'rows 0..7' lacks extras segments, which `prepare` of the objective adds"):
        loss(model, batch)
    batch.extras["segments"] = torch.zeros_like(batch.ids)
    with pytest.raises(DataError, match=r"batch 'rows 0..7' lacks extras next, which `prepare` of the objective adds"):
        loss(model, batch)
    batch.labels.fill_(IGNORE)
    with pytest.raises(NoTargetsError, match=r"there is nothing to learn from it; take more tokens at a time, or a higher rate"):
        loss(model, batch)


@settings(max_examples=20)
@given(PIECES, st.integers(0, 2**32))
def test_without_tokens_around_a_text(texts, seed):
    """Vocabularies that have neither [CLS] nor [SEP]."""
    from dataclasses import replace

    bare = replace(V, cls=None, sep=None, eos=None)
    batch = prepare(batch_of(texts), Config(), bare, torch.Generator().manual_seed(seed))
    assert batch.lengths.tolist() == [len(text) for text in texts]
