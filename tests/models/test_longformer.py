"""Longformer: global attention, long sequences, heads, and what files are refused; the rest is in test_parity.py."""

import re
from dataclasses import replace

import pytest
import torch
from transformers import (
    LongformerConfig,
    LongformerForMaskedLM,
    LongformerForQuestionAnswering,
    LongformerForSequenceClassification,
    LongformerModel,
)

from athanor.core.errors import CheckpointError, ConfigError, DataError
from athanor.core.io import read_json
from athanor.models import io, longformer
from athanor.nn import spans
from athanor.nn.context import Bidirectional, Packed, Padded
from athanor.nn.landmarks import WithLandmarks, first_tokens
from tests.models.reference import files, gradients_of_ours, gradients_of_theirs, greatest, ours_of, random_ids, theirs_of
from tests.nn.test_banded import Largest

TINY = longformer.PRESETS["tiny"]
LONG = replace(TINY, windows=(8, 4), max_positions=400)


def randomised(theirs):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.normal_(float(p.mean()) if "norm" in name.lower() and name.endswith("weight") else 0.0, 0.15)
    return theirs.eval()


def marks_of(rows, time, share, seed=4):
    return torch.rand(rows, time, generator=torch.Generator().manual_seed(seed)) < share


def padding(rows, time):
    mask = torch.ones(rows, time, dtype=torch.int64)
    mask[-1, time - 13 :] = 0
    return mask


def test_the_published_config_is_the_preset():
    published = {
        "attention_mode": "longformer", "attention_probs_dropout_prob": 0.1, "attention_window": [512] * 12, "bos_token_id": 0,
        "eos_token_id": 2, "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "hidden_size": 768, "ignore_attention_mask": False, "initializer_range": 0.02, "intermediate_size": 3072,
        "layer_norm_eps": 1e-05, "max_position_embeddings": 4098, "model_type": "longformer", "num_attention_heads": 12,
        "num_hidden_layers": 12, "pad_token_id": 1, "sep_token_id": 2, "type_vocab_size": 1, "vocab_size": 50265,
    }  # fmt: skip
    assert longformer.Config.from_hf(published) == longformer.PRESETS["longformer-base-4096"]
    with torch.device("meta"):
        theirs = LongformerForMaskedLM(LongformerConfig(**published))
    assert io.build("longformer", longformer.PRESETS["longformer-base-4096"]).n_parameters() == theirs.num_parameters()


def test_fields_that_a_file_lacks_have_the_values_of_transformers():
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    fields = {name: TINY.to_hf()[name] for name in needed}
    found = longformer.Config.from_hf(fields)
    assert found == longformer.Config.from_hf(LongformerConfig(**fields).to_dict())
    assert found.windows == (512, 512)


# 21 is cut nowhere, 100 in both layers; neither is a multiple of a window.
@pytest.mark.parametrize("time", [21, 64, 100])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("share", [None, 0.0, 0.05, 0.3])
def test_logits_and_every_gradient_are_theirs(time, padded, share, tmp_path):
    theirs = theirs_of(LONG)
    ours = ours_of(theirs, tmp_path / "model")
    ids, marks = random_ids(LONG, 3, time), None if share is None else marks_of(3, time, share)
    mask = padding(3, time) if padded else torch.ones(3, time, dtype=torch.int64)
    masks = {"attention_mask": mask} | ({} if marks is None else {"global_attention_mask": marks.long()})
    direction = torch.randn(3, time, 320, generator=torch.Generator().manual_seed(5)) * mask.unsqueeze(2)
    expected = theirs(ids, **masks).logits
    ctx = Padded(mask, causal=False) if padded else Bidirectional(3, time)
    found = ours.logits(ours.hidden(ids, ctx if marks is None else WithLandmarks(ctx, marks)))
    seen = mask.bool()
    assert greatest(found[seen].detach(), expected[seen].detach()) <= 1e-5
    (expected * direction).sum().backward()
    (found * direction).sum().backward()
    mine, yours = gradients_of_ours(ours), gradients_of_theirs(theirs, tmp_path / "gradients")
    assert mine.keys() == yours.keys()
    floor = 1e-3 * max(float(grad.abs().max()) for grad in yours.values())
    for name, grad in yours.items():
        assert greatest(mine[name], grad) <= 1e-4 * max(float(grad.abs().max()), floor), name


@torch.no_grad()
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_packed_is_separate_with_global_tokens(share, tmp_path):
    ours = ours_of(theirs_of(LONG), tmp_path)
    lengths = (130, 1, 12, 97, 12, 100)
    ids, marks = random_ids(LONG, 1, sum(lengths)), marks_of(1, sum(lengths), share)
    found = ours.hidden(ids, WithLandmarks(Packed(torch.tensor(lengths), causal=False), marks))[0]
    alone = [
        ours.hidden(part, WithLandmarks(Bidirectional(*part.shape), mark))[0]
        for part, mark in zip(ids.split(list(lengths), 1), marks.split(list(lengths), 1), strict=True)
    ]
    assert greatest(found, torch.cat(alone)) <= 1e-5


@torch.no_grad()
def test_global_tokens_see_and_are_seen_from_afar_and_others_are_not(tmp_path):
    ours = ours_of(theirs_of(LONG), tmp_path)
    ids, marks = random_ids(LONG, 1, 100), torch.zeros(1, 100, dtype=torch.bool)
    changed = ids.clone()
    changed[0, 90] = 7
    near = ours.hidden(ids, Bidirectional(1, 100)) != ours.hidden(changed, Bidirectional(1, 100))
    assert near.any(2)[0].nonzero().squeeze(1).tolist() == list(range(84, 97))  # 4 + 2 on either side
    marks[0, 0] = True
    ctx = WithLandmarks(Bidirectional(1, 100), marks)
    assert (ours.hidden(ids, ctx) != ours.hidden(changed, ctx)).any(2).all()


def test_memory_grows_with_the_length():
    model = io.build("longformer", replace(TINY, max_positions=2048), seed=0)

    def largest(time):
        ctx = WithLandmarks(Bidirectional(2, time), first_tokens(Bidirectional(2, time)))
        with Largest() as seen:
            model.hidden(random_ids(TINY, 2, time), ctx).sum().backward()
        return seen.found

    assert largest(2048) == 2 * largest(1024) < 2 * 1024 * 1024


@torch.no_grad()
def test_a_trunk_with_its_pooler_is_read_and_pools_as_theirs(tmp_path):
    theirs = randomised(LongformerModel(LongformerConfig(**TINY.to_hf())))
    ours = ours_of(theirs, tmp_path / "theirs")
    assert (ours.task, ours.global_tokens) == ("none", "none")
    ids = random_ids(TINY, 3, 19)
    ctx = Bidirectional(3, 19)
    marks = first_tokens(ctx)
    expected = theirs(ids, global_attention_mask=marks.long())
    found = ours.hidden(ids, WithLandmarks(ctx, marks))
    assert greatest(found, expected.last_hidden_state) <= 1e-5
    assert greatest(ours.pooled(spans.at(found, spans.first(ctx))), expected.pooler_output) <= 1e-5
    (tmp_path / "ours").mkdir()
    io.save(ours, tmp_path / "ours")
    a, b = files(tmp_path / "theirs"), files(tmp_path / "ours")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@torch.no_grad()
def test_a_classifier_reads_with_its_first_token_unless_told_otherwise(tmp_path):
    theirs = randomised(LongformerForSequenceClassification(LongformerConfig(**TINY.to_hf())))
    theirs.longformer.save_pretrained(tmp_path)
    named = read_json(tmp_path / "config.json")
    model = io.load(tmp_path)
    assert named["architectures"] == ["LongformerModel"] and model.global_tokens == "none"
    model.become("LongformerForSequenceClassification", lambda name: False)
    assert model.global_tokens == "first"
    ids, mask = random_ids(TINY, 3, 19), torch.ones(3, 19, dtype=torch.int64)
    mask[1, 11:] = 0
    kept = {}
    theirs.classifier.register_forward_pre_hook(lambda module, given: kept.update(hidden=given[0]))
    theirs(ids, attention_mask=mask)
    seen = mask.bool()
    assert greatest(model.hidden(ids, Padded(mask, causal=False))[seen], kept["hidden"][seen]) <= 1e-5
    marks = marks_of(3, 19, 0.3)
    theirs(ids, attention_mask=mask, global_attention_mask=marks.long())
    assert greatest(model.hidden(ids, WithLandmarks(Padded(mask, causal=False), marks))[seen], kept["hidden"][seen]) <= 1e-5


@torch.no_grad()
def test_a_question_sees_everything_up_to_its_separator_unless_told_otherwise(tmp_path):
    theirs = randomised(LongformerForQuestionAnswering(LongformerConfig(**TINY.to_hf() | {"sep_token_id": 5})))
    theirs.save_pretrained(tmp_path)
    ours = io.load(tmp_path)
    assert ours.trunk.global_tokens == "question" and ours.config.sep_id == 5
    ids, mask = random_ids(TINY, 3, 60), torch.ones(3, 60, dtype=torch.int64)
    ids[ids == 5] = 6
    ids[0, [9, 10, 59]] = ids[1, [0, 1, 40]] = ids[2, [20, 30, 46]] = 5  # of the second the question is empty
    mask[2, 47:] = 0
    seen = mask.bool()

    def answered(**more):
        out = theirs(ids, attention_mask=mask, **more)
        return torch.stack([out.start_logits, out.end_logits], 2)[seen]

    ctx = Padded(mask, causal=False)
    assert greatest(ours(ids, ctx)[seen], answered()) <= 1e-5
    marks = marks_of(3, 60, 0.3)
    assert greatest(ours(ids, WithLandmarks(ctx, marks))[seen], answered(global_attention_mask=marks.long())) <= 1e-5
    nobody = ours(ids, WithLandmarks(ctx, torch.zeros_like(marks)))[seen]
    assert greatest(nobody, answered(global_attention_mask=torch.zeros_like(ids))) <= 1e-5
    assert greatest(nobody, answered()) > 1e-2
    ids[1, mask[1].bool()] = 6
    with pytest.raises(DataError, match=re.escape("sequence 1 has no separator (sep_id, 5), before which a question has global")):
        ours(ids, ctx)


@torch.no_grad()
def test_segments_are_theirs(tmp_path):
    config = longformer.PRESETS["tiny-wide"]
    theirs = theirs_of(config)
    ours = ours_of(theirs, tmp_path)
    ids, kinds = random_ids(config, 2, 19), (torch.arange(19) > 8).long().expand(2, -1)
    found = ours.logits(ours.hidden(ids, Bidirectional(2, 19), kinds))
    assert greatest(found, theirs(ids, token_type_ids=kinds).logits) <= 1e-5
    assert greatest(found, ours(ids)) > 1e-2


def test_one_window_for_all_layers_is_read():
    assert longformer.Config.from_hf(TINY.to_hf() | {"attention_window": 6}).windows == (6, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": (8,)}, "windows names 1 layers and n_layers is 2: name each layer"),
        ({"windows": (8, 5)}, "windows has 5 and must have positive even numbers: 512 is usual"),
        ({"windows": (0, 4)}, "windows has 0 and must have positive even numbers: 512 is usual"),
        ({"variant": "roberta"}, "variant ('roberta') must be 'longformer': leave it out, or use models/roberta.py"),
        ({"d_ff": 0}, "d_ff (0) must be at least 1"),
    ],
)
def test_mistakes_in_a_config_are_named(change, message):
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        replace(TINY, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"attention_window": [8, 4.0]},
            "config.json: attention_window is [8, 4.0] and must be a whole number or a list of them: copy it again",
        ),
        ({"attention_window": "8"}, "config.json: attention_window is '8' and must be a whole number or a list of them"),
        ({"hidden_act": "tanh"}, "config.json: hidden_act is 'tanh', which is not supported for longformer"),
    ],
)
def test_what_is_not_computed_is_refused(change, message):
    with pytest.raises(CheckpointError, match="^" + re.escape(message)):
        longformer.Config.from_hf(TINY.to_hf() | change)
