"""BLEU against its formula, translations against the search that they are made by."""

import math
import sys
from collections import Counter

import pytest
import torch

from athanor.core.errors import ConfigError, DataError, MissingExtraError
from athanor.data.pairs import TextPair
from athanor.evals import translation
from athanor.evals.translation import Search, bleu, measure, metric, translate
from athanor.infer.beam import Beams, beam_search
from athanor.models import transformer
from athanor.models.base import TokenIds

OURS = ["the cat sat on the mat .", "two dogs run on a beach .", "a man stands", "Nothing more to say here ."]
THEIRS = ["the cat is on the mat .", "two dogs run along the beach .", "a man stands on a ladder .", "nothing more to say here ."]


def by_formula(ours, theirs):
    """Papineni et al. 2002, equations 1 to 3, over words between spaces."""
    found, possible, logs = 0, 0, []
    for n in range(1, 5):
        found = possible = 0
        for a, b in zip(ours, theirs, strict=True):
            grams = [Counter(zip(*(x.split()[i:] for i in range(n)), strict=False)) for x in (a, b)]
            found += sum((grams[0] & grams[1]).values())
            possible += sum(grams[0].values())
        logs.append(math.log(found / possible))
    c, r = (sum(len(x.split()) for x in side) for side in (ours, theirs))
    return 100 * math.exp(min(0, 1 - r / c)) * math.exp(sum(logs) / 4)


def test_bleu_is_its_formula():
    found = bleu(OURS, THEIRS, metric("none"))
    assert found.value == pytest.approx(by_formula(OURS, THEIRS), abs=1e-9)
    assert found.low < found.value < found.high and found.brevity < 1
    assert found.signature.startswith("nrefs:1|bs:1000|seed:12345|case:mixed|eff:no|tok:none|smooth:exp|version:")
    assert bleu(THEIRS, THEIRS, metric()).value == pytest.approx(100)
    assert bleu(OURS, THEIRS, metric()) == bleu(OURS, THEIRS, metric())


def test_case_and_words_change_it():
    plain = bleu(OURS, THEIRS, metric()).value
    lower = bleu(OURS, THEIRS, metric(lower=True))
    assert lower.value > plain and "|case:lc|" in lower.signature
    assert bleu(OURS, THEIRS, metric("char")).value > plain


def test_what_cannot_be_measured_is_refused(monkeypatch):
    with pytest.raises(DataError, match="there are 1 translations and 2 references: give one for each, and at least one"):
        bleu(["a"], ["a", "b"], metric())
    with pytest.raises(DataError, match="there are 0 translations and 0 references"):
        bleu([], [], metric())
    with pytest.raises(ConfigError, match=r"tokenize \('13b'\) must be one of sacrebleu's: none, zh, 13a.*did you mean '13a'"):
        metric("13b")
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(MissingExtraError, match=r"by sacrebleu, which is not installed: pip install 'athanor-lm\[eval\]'"):
        metric()


def test_a_tokenizer_of_others_that_is_missing(monkeypatch):
    from sacrebleu.metrics.bleu import BLEU

    def fail(*args, **kwargs):
        raise RuntimeError("Please install mecab")

    monkeypatch.setattr(BLEU, "__init__", fail)
    with pytest.raises(MissingExtraError, match="sacrebleu's tokenizer 'ja-mecab' does not start: Please install mecab"):
        metric("ja-mecab")


@pytest.fixture(scope="module")
def model(tokenizer):
    model = transformer.Model(transformer.Config(tokenizer.vocab_size, 32, 2, 4, 48, max_positions=24))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(float("norm.weight" in name), 0.2, generator=generator)
    model.token_ids = TokenIds(tokenizer.bos_id, (tokenizer.end_id,), decoder_start=tokenizer.bos_id)
    return model.eval()


def test_translations_are_the_answers_of_beam_search(model, tokenizer):
    texts = ["heat", "the steady heat", "", "x" * 60]
    found = translate(model, tokenizer, texts, Search(3, 0.5))
    for text, ours in zip(texts, found.texts, strict=True):
        limit = min(23, 2 * len(tokenizer.prompt(text)) + 10)
        answer = beam_search(model, tokenizer.prompt(text)[:24], Beams(3, limit, 0.5), [tokenizer.end_id])
        assert ours == " ".join(tokenizer.decode(answer.ids).split()) and "\n" not in ours
    assert found.cut == 1 and 0 <= found.open <= 4
    short = translate(model, tokenizer, texts, Search(3, 0.5, ratio=0.01))
    lengths = [len(beam_search(model, tokenizer.prompt(t)[:24], Beams(3, 10, 0.5), [tokenizer.end_id]).ids) for t in texts]
    assert max(lengths) == 10 and short.texts != found.texts
    with pytest.raises(ConfigError, match=r"search.ratio \(0\) must be positive: 2 is usual"):
        Search(ratio=0)
    model.token_ids = TokenIds(tokenizer.bos_id, (399,), decoder_start=tokenizer.bos_id)  # which never comes
    assert translate(model, tokenizer, texts, Search(1)).open == 4
    model.token_ids = TokenIds(tokenizer.bos_id, (tokenizer.end_id,), decoder_start=tokenizer.bos_id)


def test_all_of_it_in_a_file(model, tokenizer, tmp_path):
    pairs = [TextPair(f"heat {i}", f"steady {i}") for i in range(12)]
    figures = measure(model, tokenizer, pairs, Search(2), metric(), tmp_path / "new" / "out.txt")
    texts = translate(model, tokenizer, [p.source for p in pairs], Search(2)).texts
    assert (tmp_path / "new" / "out.txt").read_text("utf-8").split("\n") == [*texts, ""]
    assert figures["examples"] == [(p.source, t, p.target) for p, t in zip(pairs, texts, strict=True)][::3]
    assert len(figures["examples"]) <= translation._EXAMPLES
    assert figures["value"] == bleu(texts, [p.target for p in pairs], metric()).value
    assert figures["seconds"] > 0 and {"low", "high", "signature", "cut", "open"} < figures.keys()
