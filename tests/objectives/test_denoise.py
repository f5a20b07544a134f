"""What holds of each of BART's five ways to spoil a text, and BART's own loss."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from athanor.core.errors import ConfigError, NoTargetsError
from athanor.models import io
from athanor.models.base import TokenIds
from athanor.objectives._pretraining import choose, generator
from athanor.objectives._vocabulary import Vocabulary
from athanor.objectives.denoise import Config, infill, permute, prepare
from athanor.types import IGNORE, Batch

SIZE, BOS, PAD, EOS, MASK = 60, 0, 1, 2, 4
V = Vocabulary(
    size=SIZE,
    special=frozenset(range(8)),
    word_starts=torch.ones(SIZE, dtype=torch.bool),
    sentence_ends=torch.arange(SIZE) % 10 == 9,
    bos=BOS,
    eos=EOS,
    pad=PAD,
    mask=MASK,
    cls=BOS,
    sep=EOS,
    start=EOS,
)
NOTHING = {"permute": 0.0, "infill": 0.0}
PIECES = st.lists(st.lists(st.integers(5, SIZE - 1), min_size=1, max_size=40), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**32)
WAYS = ("permute", "rotate", "infill", "mask", "delete")
CONFIGS = st.builds(Config, **{way: st.sampled_from([0.2, 1.0]) for way in WAYS})


def batch_of(texts):
    ids = torch.tensor([id for text in texts for id in text])
    return Batch(ids, torch.full_like(ids, IGNORE), torch.tensor([len(text) for text in texts]), origin="texts")


def sources(batch):
    return [x.tolist() for x in batch.source.ids.split(batch.source.lengths.tolist())]


def made(texts, seed, **options):
    """What each text became."""
    batch = prepare(batch_of(texts), Config(**NOTHING | options), V, torch.Generator().manual_seed(seed))
    assert all(source[0] == BOS and source[-1] == EOS for source in sources(batch))
    return [source[1:-1] for source in sources(batch)]


def is_subsequence(short, long):
    rest = iter(long)
    return all(id in rest for id in short)


@given(PIECES, SEEDS, CONFIGS)
def test_the_answer_is_the_text_and_no_source_is_longer(texts, seed, config):
    batch = prepare(batch_of(texts), config, V, torch.Generator().manual_seed(seed))
    sizes = batch.lengths.tolist()
    for text, target, given_, source in zip(
        texts, batch.labels.split(sizes), batch.ids.split(sizes), sources(batch), strict=True
    ):
        assert target.tolist() == [BOS, *text, EOS] and given_.tolist() == [EOS, BOS, *text]
        assert len(source) <= len(text) + 2
        # No special token is lost or masked.
        kept = Counter(id for id in source[1:-1] if id < 8 and id != MASK)
        assert kept == Counter(id for id in text if id < 8 and id != MASK)


@given(PIECES, SEEDS)
def test_masked_tokens(texts, seed):
    for text, source in zip(texts, made(texts, seed, mask=0.5), strict=True):
        assert len(source) == len(text)
        assert all(a == b or (a == MASK and b > 7) for a, b in zip(source, text, strict=True))


@given(PIECES, SEEDS)
def test_deleted_tokens(texts, seed):
    for text, source in zip(texts, made(texts, seed, delete=0.5), strict=True):
        assert is_subsequence(source, text)
        assert [id for id in source if id < 8] == [id for id in text if id < 8]


@given(PIECES, SEEDS)
def test_spans(texts, seed):
    """What is left stands in its order, between masks, and a mask stands for what is missing there."""
    for text, source in zip(texts, made(texts, seed, infill=0.5), strict=True):
        assert is_subsequence([id for id in source if id != MASK], text)
        pattern = "".join(f"(?:{chr(200 + MASK)}|[^ ]*)" if id == MASK else re.escape(chr(200 + id)) for id in source)
        assert re.fullmatch(pattern, "".join(chr(200 + id) for id in text))


@given(PIECES, SEEDS)
def test_permuted_sentences(texts, seed):
    def sentences(ids):
        found = re.findall(r"(?:\d+ )*?(?:\d*9 )|(?:\d+ )+$", "".join(f"{id} " for id in ids))
        assert "".join(found) == "".join(f"{id} " for id in ids)
        return found

    for text, source in zip(texts, made(texts, seed, permute=1.0), strict=True):
        ours = sentences(text)
        if len(ours) > 1 and not ours[-1].endswith("9 "):
            # What has no full stop runs into what follows it.
            assert Counter(source) == Counter(text)
        else:
            assert Counter(sentences(source)) == Counter(ours)


@given(PIECES, SEEDS)
def test_rotated_texts(texts, seed):
    for text, source in zip(texts, made(texts, seed, rotate=1.0), strict=True):
        assert source in [text[i:] + text[:i] for i in range(len(text))]


def test_every_order_and_every_rotation_comes():
    text = torch.tensor([10, 19, 20, 29, 30])
    rng = torch.Generator().manual_seed(0)
    orders = Counter(tuple(permute(text, V, rng).tolist()) for _ in range(600))
    assert len(orders) == 6 and min(orders.values()) > 60
    turns = Counter(tuple(x) for seed in range(300) for x in made([text.tolist()], seed, rotate=1.0))
    assert len(turns) == 5 and min(turns.values()) > 30


def test_the_statistics():
    """Shares as asked for; spans of Poisson's distribution, empty ones among them."""
    text = torch.arange(1000) % 50 + 10
    rng, masks, kept, rounds = torch.Generator().manual_seed(0), 0, 0, 60
    for _ in range(rounds):
        out = infill(text, Config(), MASK, rng)
        masks += int((out == MASK).sum())
        kept += int((out != MASK).sum())
    assert kept == rounds * 700
    # 300 tokens in spans of 3 on average; the last of a text is cut.
    assert masks / rounds == pytest.approx(100, rel=0.02)
    masked = torch.tensor(made([text.tolist()] * 20, 0, mask=0.2)) == MASK
    assert float(masked.double().mean()) == pytest.approx(0.2, abs=0.01)
    left = sum(map(len, made([text.tolist()] * 20, 0, delete=0.2)))
    assert left / 20000 == pytest.approx(0.8, abs=0.01)
    # Shares are kept on average by the shortest texts too.
    short = sum(int((infill(text[:2], Config(span=1.0), MASK, rng) != MASK).sum()) for _ in range(3000))
    assert short / 6000 == pytest.approx(0.7, abs=0.03)


def test_empty_spans_insert_masks():
    """Of spans of 1 on average e^-1 are empty: 30 tokens stand in about 19 of the others, and about 11 masks come in."""
    rng = torch.Generator().manual_seed(0)
    masks = 0
    for _ in range(200):
        out = infill(torch.arange(100) % 50 + 10, Config(span=1.0), MASK, rng)
        assert int((out != MASK).sum()) == 70 and len(out) <= 100
        masks += int((out == MASK).sum())
    assert 26 <= masks / 200 <= 30


def test_the_shares_are_of_texts():
    texts = [[10, 19, 20, 29, 30, 39, 40, 49]] * 400
    for way in ("permute", "rotate"):
        changed = sum(a != b for a, b in zip(texts, made(texts, 0, **{way: 0.25}), strict=True))
        assert 0.17 <= changed / 400 <= 0.28


@pytest.mark.parametrize("preset", ["tiny", "tiny-uneven"])
def test_the_loss_is_that_of_bart(preset, model_of, noisy, rows, tmp_path):
    model = model_of("bart", preset)
    # As BART's files have it: answers begin with the end of a text, then its beginning.
    model.token_ids = TokenIds(bos=1, eos=(2,), pad=0, decoder_start=2)
    found = choose("denoise", model, {"rotate": 0.5, "mask": 0.1}, noisy, 48)
    io.save(model, tmp_path)
    theirs = transformers.BartForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = found.prepare(rows(), generator(0, 0, 0))
    total, count, metrics = found.loss(model, batch)
    expected, correct = 0.0, 0
    sizes = batch.lengths.tolist()
    for source, given_, labels in zip(sources(batch), batch.ids.split(sizes), batch.labels.split(sizes), strict=True):
        # Theirs makes the decoder's input of the labels.
        assert theirs.prepare_decoder_input_ids_from_labels(labels[None])[0].tolist() == given_.tolist()
        assert labels[0] == 1 and labels[-1] == 2
        with torch.no_grad():
            out = theirs(torch.tensor([source]), labels=labels[None])
        expected += float(out.loss) * len(labels)
        correct += int((out.logits.argmax(-1) == labels).sum())
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert count == len(batch.labels) and int(metrics["correct"]) == correct


def test_each_option_changes_the_sources(noisy, rows):
    v = replace(Vocabulary.of(noisy), start=1)
    options = [{}, {"permute": 0.0}, {"rotate": 1.0}, {"infill": 0.1}, {"span": 1.0}, {"mask": 0.2}, {"delete": 0.2}]
    found = [prepare(rows(), Config(**x), v, generator(0, 0, 0)) for x in options]
    assert len({tuple(batch.source.ids.tolist()) for batch in found}) == len(options)


def test_pieces_without_text():
    batch = prepare(batch_of([[BOS], [BOS, 20, 21, EOS], [EOS]]), Config(), V, generator(0, 0, 0))
    assert batch.labels.tolist() == [BOS, 20, 21, EOS]
    with pytest.raises(NoTargetsError, match="batch 'texts': all its 2 sequences are too short: use longer rows"):
        prepare(batch_of([[BOS], [EOS]]), Config(), V, generator(0, 0, 0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(({name: 1.5}, f"{name} (1.5) must lie in [0, 1]") for name in WAYS),
        ({"span": 0.9}, "span (0.9) must be at least 1 token: 3 is usual"),
        (
            NOTHING,
            "all of permute, rotate, infill, mask, delete are 0, so no text is spoiled: infill 0.3 and permute 1 are usual",
        ),
    ],
)
def test_options_out_of_range(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config(**fields)
