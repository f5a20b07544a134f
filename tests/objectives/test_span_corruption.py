"""Spans as T5 takes them out: the paper's example, what holds for any text, the distribution, and T5's own loss."""

import re
from dataclasses import replace
from math import comb

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from athanor.core.errors import ConfigError, DataError, NoTargetsError
from athanor.models import io
from athanor.objectives._pretraining import choose, generator
from athanor.objectives._vocabulary import Vocabulary
from athanor.objectives.span_corruption import Config, corrupt, noise_mask, prepare, sizes
from athanor.types import IGNORE, Batch

SENTINELS = tuple(range(90, 120))
V = Vocabulary(
    size=120,
    special=frozenset({0, 1, 2, 3, *SENTINELS}),
    word_starts=torch.ones(120, dtype=torch.bool),
    sentence_ends=torch.zeros(120, dtype=torch.bool),
    eos=1,
    sep=1,
    pad=0,
    sentinels=SENTINELS,
    start=0,
)
CONFIGS = st.builds(Config, rate=st.sampled_from([0.05, 0.15, 0.5, 0.9]), span=st.sampled_from([1.0, 3.0, 8.5]))


def batch_of(texts):
    ids = torch.tensor([id for text in texts for id in text])
    return Batch(ids, torch.full_like(ids, IGNORE), torch.tensor([len(text) for text in texts]), origin="texts")


def split(batch):
    """(source, decoder input, target) of each sequence."""
    sizes = batch.lengths.tolist()
    sources = batch.source.ids.split(batch.source.lengths.tolist())
    return zip(*([x.tolist() for x in xs] for xs in (sources, batch.ids.split(sizes), batch.labels.split(sizes))), strict=True)


def rebuilt(source, target):
    """The text of a source without its end and a target without its own."""
    spans, current = {}, None
    for id in target:
        if id in SENTINELS:
            current = spans.setdefault(id, [])
        else:
            current.append(id)
    return [x for id in source for x in (spans[id] if id in SENTINELS else [id])], spans


def test_the_example_of_the_paper():
    """Figure 2: Thank you for inviting me to your party last week."""
    text = torch.arange(10, 20)
    taken = torch.zeros(10, dtype=torch.bool)
    taken[[2, 3, 8]] = True
    source, target = corrupt(text, taken, SENTINELS)
    assert source.tolist() == [10, 11, 90, 14, 15, 16, 17, 91, 19]
    assert target.tolist() == [90, 12, 13, 91, 18]


@given(st.lists(st.lists(st.integers(2, 89), min_size=1, max_size=60), min_size=1, max_size=5), CONFIGS, st.integers(0, 2**32))
def test_of_any_texts(texts, config, seed):
    free = [[id for id in text if id > 3] for text in texts]
    used = [text for text, ordinary in zip(texts, free, strict=True) if len(ordinary) > 1]
    rng = torch.Generator().manual_seed(seed)
    if not used:
        with pytest.raises(NoTargetsError, match=rf"'texts': all its {len(texts)} sequences are too short: use longer rows"):
            prepare(batch_of(texts), config, V, rng)
        return
    if sum(len(text) > 1 for text in free) and max(map(len, texts)) > 25 and config.rate * 60 / config.span > 12:
        return  # special tokens may cut spans into more than there are sentinels: see below
    batch = prepare(batch_of(texts), config, V, rng)
    assert int(batch.extras["lost"].sum()) == sum(map(len, texts)) - sum(map(len, used))
    assert len(batch.lengths) == len(batch.source.lengths) == len(used)
    for text, (source, given_, target) in zip(used, split(batch), strict=True):
        assert source[-1] == target[-1] == 1 and given_ == [0, *target[:-1]]
        text_again, spans = rebuilt(source[:-1], target[:-1])
        assert text_again == text
        # Sentinel k stands for span k, in both.
        marks = [id for id in source if id in SENTINELS]
        assert marks == [id for id in target if id in SENTINELS] == list(SENTINELS[: len(marks)])
        assert all(spans[mark] and min(spans[mark]) > 3 for mark in marks)
        n = sum(id > 3 for id in text)
        assert sum(map(len, spans.values())) == sizes(n, config)[0]


@given(st.integers(2, 300), CONFIGS, st.integers(0, 2**32))
def test_the_mask(n, config, seed):
    """Numbers of tokens and spans as the paper says; it begins with what is kept and ends with what is taken."""
    mask = noise_mask(n, config, torch.Generator().manual_seed(seed))
    noise, spans = sizes(n, config)
    assert len(mask) == n and int(mask.sum()) == noise and not mask[0] and mask[-1]
    assert int((mask[1:] & ~mask[:-1]).sum()) == spans
    share = n * config.rate
    assert abs(noise - share) <= 0.5 or (noise == 1 and share < 1) or (noise == n - 1 and share > n - 1)


def test_the_sizes_of_t5():
    """512 tokens in 114 of which 77 are taken out in 26 spans (the authors' defaults)."""
    assert sizes(512, Config()) == (77, 26)
    assert sizes(512, Config(rate=0.5, span=3.0)) == (256, 85)
    assert sizes(2, Config()) == (1, 1)


def test_any_cut_is_as_likely():
    """Lengths of the first span taken: n into k parts at random has a part of l with C(n - l - 1, k - 2) / C(n - 1, k - 1)."""
    config, rng = Config(rate=0.4, span=4.0), torch.Generator().manual_seed(0)
    (noise, spans), draws = sizes(50, config), 4000
    assert (noise, spans) == (20, 5)
    found = torch.zeros(noise)
    for _ in range(draws):
        mask = noise_mask(50, config, rng)
        first = int(mask.int().argmax())
        found[int((~mask[first:]).int().argmax()) if not mask[first:].all() else noise - 1] += 1
    for length in range(1, 9):
        expected = comb(noise - length - 1, spans - 2) / comb(noise - 1, spans - 1)
        assert float(found[length]) / draws == pytest.approx(expected, abs=4 * (expected / draws) ** 0.5)


@pytest.mark.parametrize("preset", ["tiny", "tiny-gated"])
def test_the_loss_is_that_of_t5(preset, model_of, noisy, rows, tmp_path):
    model = model_of("t5", preset)
    found = choose("span_corruption", model, {}, noisy, 48)
    io.save(model, tmp_path)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = found.prepare(rows(), generator(0, 0, 0))
    total, count, metrics = found.loss(model, batch)
    expected, correct = 0.0, 0
    for source, given_, target in split(batch):
        with torch.no_grad():
            labels = torch.tensor([target])
            out = theirs(torch.tensor([source]), decoder_input_ids=torch.tensor([given_]), labels=labels)
        expected += float(out.loss) * len(target)
        correct += int((out.logits.argmax(-1) == labels).sum())
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert count == len(batch.labels) and int(metrics["correct"]) == correct


def test_their_shift_gives_our_inputs(model_of, noisy, rows, tmp_path):
    """From the labels alone, with the start that the model's files say."""
    from athanor.models.base import TokenIds

    model = model_of("t5")
    model.token_ids = TokenIds(eos=(2,), pad=0, decoder_start=0)
    found = choose("span_corruption", model, {}, noisy, 48)
    io.save(model, tmp_path)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = found.prepare(rows(), generator(0, 0, 0))
    for _, given_, target in split(batch):
        assert theirs.prepare_decoder_input_ids_from_labels(torch.tensor([target]))[0].tolist() == given_


def test_options_change_the_batch(noisy, rows):
    v = replace(Vocabulary.of(noisy), start=1)
    made = [prepare(rows(), Config(**x), v, generator(0, 0, 0)) for x in ({}, {"rate": 0.3}, {"span": 1.5})]
    assert len({tuple(batch.source.ids.tolist()) for batch in made}) == 3


def test_more_spans_than_sentinels():
    text = torch.arange(10, 20)
    message = (
        "5 spans are taken out of a text and the vocabulary has 3 sentinels: use shorter rows, or train one that has them"
        " (athanor tokenizer --noise 5)"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        corrupt(text, torch.arange(10) % 2 == 1, SENTINELS[:3])


def test_a_vocabulary_without_an_end(model_of):
    from athanor.objectives.span_corruption import check

    with pytest.raises(ConfigError, match="span_corruption needs tokens that the vocabulary lacks: eos"):
        check(Config(), replace(V, eos=None), 48)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": 0.0}, "rate (0.0) must lie in (0, 1): 0.15 is usual"),
        ({"rate": 1.0}, "rate (1.0) must lie in (0, 1)"),
        ({"span": 0.5}, "span (0.5) must be at least 1 token: 3 is usual"),
        ({"span": float("nan")}, "span (nan) must be at least 1 token"),
    ],
)
def test_options_out_of_range(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config(**fields)
