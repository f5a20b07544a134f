"""Which objective fits which architecture; every pair trains or is refused; the laws hold for each that trains."""

import re

import pytest
import torch

from athanor.core import plugins
from athanor.core.errors import ConfigError, PluginError
from athanor.data.pack import fill, select
from athanor.data.pairs import pack
from athanor.models.io import build as new
from athanor.objectives._pretraining import choose, fits, generator
from athanor.types import IGNORE

ARCHITECTURES = plugins.names("models")
OBJECTIVES = plugins.names("objectives")
PRESETS = [(a, name) for a in ARCHITECTURES for name in plugins.load("models", a).PRESETS if name.startswith("tiny")]
# One architecture for each (objective, kind), without experts, whose loss is no sum over tokens.
CASES = [
    ("next_token", "llama", {}),
    ("masked_lm", "bert", {}),
    ("masked_lm", "bert", {"pairs": "next"}),
    ("masked_lm", "bert", {"pairs": "order", "whole_words": True}),
    ("masked_lm", "longformer", {}),
    ("span_corruption", "t5", {}),
    ("denoise", "bart", {"rotate": 0.5, "mask": 0.1, "delete": 0.1}),
    ("prefix_lm", "llama", {}),
    ("prefix_lm", "gpt2", {"low": 0.25, "high": 0.5}),
    ("prefix_lm", "t5", {}),
    ("fill_in_middle", "llama", {"rate": 0.8}),
    ("multi_token", "deepseek_v3", {}),
    ("seq2seq", "transformer", {}),
]
NAMES = [f"{a}-{b}-{'-'.join(map(str, c.values()))}".rstrip("-") for a, b, c in CASES]


def preset(objective):
    return "tiny-ahead" if objective == "multi_token" else "tiny"


def batch_for(objective, rows, vocabulary, **shape):
    """Rows; of seq2seq pairs made of them."""
    batch = rows(**shape)
    if objective != "seq2seq":
        return batch
    texts = [ids.tolist() for ids in batch.ids.split(batch.lengths.tolist())]
    return pack(list(zip(texts[::2], texts[1::2], strict=False)), vocabulary.start, "pairs")


@pytest.mark.parametrize(("architecture", "name"), PRESETS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_pair_trains_or_is_refused(objective, architecture, name, noisy, rows):
    model = new(architecture, plugins.load("models", architecture).PRESETS[name], seed=0)
    reason = fits(objective, architecture)
    if reason:
        with pytest.raises(ConfigError, match=re.escape(f"objective {objective!r} does not fit this model: ")):
            choose(objective, model, {}, noisy, 48)
        return
    if objective == "multi_token" and model.ahead is None:
        message = (
            "multi_token needs heads for the tokens after the next and this deepseek_v3 has none: build it with n_ahead above 0"
        )
        with pytest.raises(ConfigError, match=message):
            choose(objective, model, {}, noisy, 48)
        return
    found = choose(objective, model, {}, noisy, 48)
    model.train()
    batch = found.prepare(batch_for(objective, rows, found.vocabulary), generator(0, 0, 0))
    total, count, metrics = found.loss(model, fill(batch, 64))
    total.backward()
    assert count == int((batch.labels != IGNORE).sum()) > 0 and torch.isfinite(total)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(grad).all() for grad in grads) and sum(float(grad.abs().sum()) for grad in grads) > 0
    assert 0 <= int(metrics["correct"]) <= count


def test_the_table():
    """What fits, by kinds; every kind but taggers is trained by something."""
    decoders = {a for a in ARCHITECTURES if plugins.load("models", a).Model.kind == "decoder"}
    encoders, both = {"bert", "roberta", "longformer"}, {"t5", "bart", "pegasus", "switch", "transformer"}
    fitting = {o: {a for a in ARCHITECTURES if not fits(o, a)} for o in OBJECTIVES}
    assert {name: fitting[name] for name in ("next_token", "fill_in_middle", "masked_lm", "prefix_lm", "multi_token")} == {
        "next_token": decoders,
        "fill_in_middle": decoders,
        "masked_lm": encoders,
        "prefix_lm": decoders | both,
        "multi_token": {"deepseek_v3"},
    }
    assert fitting["span_corruption"] == fitting["denoise"] == fitting["seq2seq"] == both
    assert not fitting["policy_gradient"]
    assert decoders | encoders | both | {"bilstm_crf"} == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("objective", "architecture", "reason"),
    [
        ("masked_lm", "llama", "masked_lm trains models of kind encoder, and a llama is of kind decoder"),
        ("prefix_lm", "bert", "prefix_lm trains models of kind decoder or encoder_decoder, and a bert is of kind encoder"),
        ("next_token", "bilstm_crf", "next_token trains models of kind decoder, and a bilstm_crf is of kind tagger"),
        ("next_token", "t5", "next_token trains models of kind decoder, and a t5 is of kind encoder_decoder"),
        ("multi_token", "rnn_lm", "multi_token needs mtp_hidden, which an rnn_lm has not"),
        ("policy_gradient", "llama", "policy_gradient learns from rollouts, and pre-training has texts"),
        ("masked_lm", "bert", ""),
    ],
)
def test_reasons(objective, architecture, reason):
    assert fits(objective, architecture) == reason


def test_names_that_no_file_has():
    with pytest.raises(PluginError, match="no 'berd' in 'models'; did you mean 'bert'"):
        fits("masked_lm", "berd")
    with pytest.raises(PluginError, match="no 'mask_lm' in 'objectives'; did you mean 'masked_lm'"):
        fits("mask_lm", "bert")


def parts(batch, *groups):
    return [select(batch, list(group)) for group in groups]


@pytest.mark.parametrize(("objective", "architecture", "options"), CASES, ids=NAMES)
def test_packed_is_separate_and_accumulated_is_whole_and_filling_changes_nothing(
    objective, architecture, options, model_of, chosen, rows
):
    """Law L3, of loss, count, metrics and gradients."""
    model = model_of(architecture, preset(objective))
    found = chosen(objective, model, **options)
    batch = found.prepare(batch_for(objective, rows, found.vocabulary), generator(0, 1, 0))
    n = len(batch.lengths)
    assert n >= 8 and len(set(batch.lengths.tolist())) > 2

    def run(batches):
        model.zero_grad()
        total, count, sums = 0.0, 0, {}
        for part in batches:
            loss, number, metrics = found.loss(model, part)
            loss.backward()
            total, count = total + loss.item(), count + number
            sums = {name: sums.get(name, 0.0) + float(value) for name, value in metrics.items()}
        return total, count, sums, {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    # A sequence without a target would be an error alone.
    learned = [i for i in range(n) if bool((select(batch, [i]).labels != IGNORE).any())]
    whole = select(batch, learned)
    total, count, metrics, grads = run([whole])
    single = parts(batch, *([i] for i in learned))
    halves = parts(batch, learned[::2], learned[1::2])
    for batches in (single, halves, [fill(whole, 64)], [fill(whole, 7)]):
        other, number, sums, others = run(batches)
        assert number == count and other == pytest.approx(total, rel=1e-5)
        assert sums == pytest.approx(metrics, rel=1e-4, abs=1e-5)
        largest = max(float(grad.abs().max()) for grad in grads.values())
        for name, grad in grads.items():
            assert (others[name] - grad).abs().max() <= 1e-5 * max(largest, 1), name


@pytest.mark.parametrize(("objective", "architecture", "options"), CASES, ids=NAMES)
def test_the_same_numbers_give_the_same_batch_and_others_another(objective, architecture, options, model_of, chosen, rows):
    found = chosen(objective, model_of(architecture, preset(objective)), **options)
    batch = batch_for(objective, rows, found.vocabulary)
    before = batch.ids.clone(), batch.labels.clone(), batch.lengths.clone()

    def flat(seed, step, micro):
        made = found.prepare(batch, generator(seed, step, micro))
        tensors = [made.ids, made.labels, made.lengths, *(made.extras[k] for k in sorted(made.extras))]
        tensors += [] if made.source is None else [made.source.ids, made.source.lengths]
        return [tensor.tolist() for tensor in tensors]

    assert flat(3, 5, 1) == flat(3, 5, 1)
    drawn = [flat(3, 5, 1), flat(4, 5, 1), flat(3, 6, 1), flat(3, 5, 2)]
    different = objective not in ("next_token", "multi_token", "seq2seq")
    assert all((a != b) == different for i, a in enumerate(drawn) for b in drawn[:i])
    assert all(torch.equal(a, b) for a, b in zip(before, (batch.ids, batch.labels, batch.lengths), strict=True))


@pytest.mark.parametrize(("objective", "architecture", "options"), CASES, ids=NAMES)
def test_no_sequence_is_longer_than_said(objective, architecture, options, model_of, chosen, rows):
    found = chosen(objective, model_of(architecture, preset(objective)), **options)
    if objective == "seq2seq":
        return  # its sequences are made elsewhere
    longest = 0
    for step in range(12):
        batch = found.prepare(rows(first=step), generator(0, step, 0))
        longest = max(longest, int(batch.lengths.max()), 0 if batch.source is None else int(batch.source.lengths.max()))
    assert longest <= found.longest


def test_options_reach_the_objective(model_of, noisy):
    with pytest.raises(ConfigError, match=r"objective 'masked_lm': unknown field 'rat'; did you mean 'rate'\?"):
        choose("masked_lm", model_of("bert"), {"rat": 0.2}, noisy, 48)
    with pytest.raises(ConfigError, match=r"objective 'masked_lm': rate \(1.5\) must lie in \(0, 1\): 0.15 is usual"):
        choose("masked_lm", model_of("bert"), {"rate": 1.5}, noisy, 48)


def test_an_objective_of_a_file_with_a_loss_alone(model_of, noisy, rows, tmp_path, monkeypatch):
    (tmp_path / "objectives").mkdir()
    (tmp_path / "objectives" / "plain.py").write_text("from athanor.objectives.next_token import loss\n")
    (tmp_path / "objectives" / "empty.py").write_text("")
    monkeypatch.setattr(plugins, "_folders", [tmp_path])
    model, batch = model_of("llama"), rows()
    found = choose("plain", model, {}, noisy, 48)
    assert found.prepare(batch, generator(0, 0, 0)) is batch
    assert found.loss(model, batch)[0] == plugins.load("objectives", "next_token").loss(model, batch)[0]
    with pytest.raises(ConfigError, match="objective 'plain' has no options, and rate is given: leave it out"):
        choose("plain", model, {"rate": 1}, noisy, 48)
    with pytest.raises(ConfigError, match="plain trains models of kind decoder, and a bert is of kind encoder"):
        choose("plain", model_of("bert"), {}, noisy, 48)
    with pytest.raises(PluginError, match=r"empty.py must define loss to be a plugin of 'objectives'"):
        choose("empty", model, {}, noisy, 48)


def test_the_objectives_that_fit_are_named(model_of, noisy):
    message = (
        "objective 'next_token' does not fit this model: next_token trains models of kind decoder, and a bert is of kind encoder;"
        " use masked_lm"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        choose("next_token", model_of("bert"), {}, noisy, 48)
    with pytest.raises(ConfigError, match="is of kind tagger; no objective of pre-training fits it"):
        choose("masked_lm", model_of("bilstm_crf"), {}, noisy, 48)


@pytest.mark.parametrize(
    ("objective", "architecture", "message"),
    [
        ("masked_lm", "bert", "masked_lm needs tokens that the vocabulary lacks: mask. Train one that has them (athanor"
         " tokenizer --noise 1), or take that of a model of this kind"),
        ("denoise", "bart", "denoise needs tokens that the vocabulary lacks: mask."),
        ("span_corruption", "t5", "span_corruption needs 2 sentinels and the vocabulary has 0: train one that has them (athanor"
         " tokenizer --noise 2)"),
        ("fill_in_middle", "llama", "fill_in_middle needs 3 sentinels and the vocabulary has 0: train one that has them (athanor"
         " tokenizer --noise 3)"),
    ],
)  # fmt: skip
def test_vocabularies_that_lack_something(objective, architecture, message, model_of, tokenizer):
    with pytest.raises(ConfigError, match=re.escape(message)):
        choose(objective, model_of(architecture), {}, tokenizer, 48)


def test_what_needs_no_mask_takes_any_vocabulary(model_of, tokenizer, rows):
    choose("masked_lm", model_of("bert"), {"mask": 0.0}, tokenizer, 48)
    choose("denoise", model_of("bart"), {"infill": 0.0}, tokenizer, 48)
    choose("prefix_lm", model_of("t5"), {}, tokenizer, 48)


@pytest.mark.parametrize(
    ("objective", "architecture", "options", "longest"),
    [
        ("next_token", "llama", {}, 128),
        ("masked_lm", "bert", {}, 130),
        ("masked_lm", "bert", {"pairs": "order"}, 131),
        ("denoise", "bart", {}, 130),
        ("fill_in_middle", "llama", {}, 131),
        ("prefix_lm", "llama", {}, 128),
        ("prefix_lm", "t5", {}, 128),
        ("span_corruption", "t5", {}, 128 - 19 + 6 + 2),
        ("span_corruption", "t5", {"rate": 0.8, "span": 20.0}, 102 + 5 + 1),
    ],
)
def test_sequences_that_are_too_long_are_refused(objective, architecture, options, longest, model_of, noisy):
    model = model_of(architecture, max_positions=longest)
    assert choose(objective, model, options, noisy, 128).longest == longest
    model = model_of(architecture, max_positions=longest - 1)
    message = (
        f"{objective} makes sequences of up to {longest} tokens out of context (128) and the model's max_positions is"
        f" {longest - 1}: lower context by 1, or raise max_positions"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        choose(objective, model, options, noisy, 128)


def test_a_vocabulary_that_is_larger_than_the_model(model_of, noisy):
    with pytest.raises(ConfigError, match="the vocabulary has 320 tokens and the model's vocab_size is 319: give the tokenizer"):
        choose("next_token", model_of("llama", vocab_size=319), {}, noisy, 48)


def test_a_model_without_its_head(model_of, noisy):
    model = model_of("bert")
    model.behead()
    with pytest.raises(ConfigError, match=r"this bert was saved without its .*head \(its task is 'none'\), which masked_lm"):
        choose("masked_lm", model, {}, noisy, 48)


def test_what_answers_begin_with(model_of, noisy):
    from athanor.models.base import TokenIds

    model = model_of("t5")
    assert choose("denoise", model, {}, noisy, 48).vocabulary.start == noisy.bos_id
    model.token_ids = TokenIds(decoder_start=7)
    assert choose("denoise", model, {}, noisy, 48).vocabulary.start == 7
    assert choose("next_token", model_of("llama"), {}, noisy, 48).vocabulary.start is None


def test_answers_that_begin_with_nothing(model_of, tmp_path):
    from athanor.tokenizer.foreign import ForeignTokenizer

    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\n")
    message = "this t5 does not say what its answers begin with, and the vocabulary has neither bos nor pad: set model.token_ids"
    with pytest.raises(ConfigError, match=message):
        choose("denoise", model_of("t5"), {}, ForeignTokenizer.load(tmp_path), 48)


def test_what_is_lost_is_counted(model_of, noisy, rows):
    """A piece of one token cannot be cut in two."""
    model = model_of("t5")
    batch = rows()
    batch.lengths = torch.tensor([1, *([12] * 31), 11])
    found = choose("span_corruption", model, {}, noisy, 48)
    batch.ids[0] = 50
    made = found.prepare(batch, generator(0, 0, 0))
    assert len(made.lengths) < 33
    metrics = found.loss(model, fill(made, 64))[2]
    kept = int(made.extras["lost"].sum())
    assert int(metrics["lost"]) == kept >= 1


def test_generators_differ_in_everything_they_are_made_of():
    made_of = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]
    assert len({int(torch.randint(2**40, (), generator=generator(*x))) for x in made_of}) == 5
