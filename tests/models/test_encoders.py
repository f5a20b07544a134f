"""BERT and RoBERTa: what the suite of all families does not see. Heads, segments, old files, and what is refused."""

import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from athanor.core.errors import CheckpointError, ConfigError
from athanor.core.io import read_json, write_json
from athanor.models import bert, io, roberta
from athanor.models.base import TokenIds
from athanor.nn.context import Bidirectional, Packed, Padded
from tests.models.reference import (
    config_of,
    files,
    gradients_of_ours,
    gradients_of_theirs,
    greatest,
    random_ids,
    theirs_of,
)

BERT, ROBERTA, LONGFORMER = (config_of((name, "tiny")) for name in ("bert", "roberta", "longformer"))


def saved(cls, folder, config=BERT):
    """A random model of one of transformers' classes, in a folder."""
    torch.manual_seed(0)
    theirs = cls(transformers.AutoConfig.for_model(**config.to_hf())).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0.0, 0.15)
    theirs.save_pretrained(folder)
    return theirs


def written_again(ours, folder):
    """What `io.save` makes of a model that was read from a folder: the same tensors to the bit."""
    (folder / "ours").mkdir()
    io.save(ours, folder / "ours")
    a, b = files(folder), files(folder / "ours")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def ids_and_segments():
    ids = random_ids(BERT, 3, 11)
    segments = (torch.arange(11) > 5).long().expand(3, -1)
    return ids, segments


def test_both_heads_of_pre_training(tmp_path):
    theirs = saved(transformers.BertForPreTraining, tmp_path)
    ours = io.load(tmp_path)
    ids, segments = ids_and_segments()
    with torch.no_grad():
        expected = theirs(ids, token_type_ids=segments)
        hidden = ours.hidden(ids, Bidirectional(3, 11), segments)
        assert greatest(ours.logits(hidden), expected.prediction_logits) <= 1e-5
        assert greatest(ours.next_sentence(hidden[:, 0]), expected.seq_relationship_logits) <= 1e-5
    written_again(ours, tmp_path)
    again, report = transformers.BertForPreTraining.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        assert torch.equal(again.eval()(ids, token_type_ids=segments).prediction_logits, expected.prediction_logits)


def test_gradients_of_both_heads_of_pre_training(tmp_path):
    theirs = saved(transformers.BertForPreTraining, tmp_path / "model")
    ours = io.load(tmp_path / "model")
    ids, segments = ids_and_segments()
    words, follows = random_ids(BERT, 3, 11, seed=3), torch.tensor([0, 1, 1])
    expected = theirs(ids, token_type_ids=segments, labels=words, next_sentence_label=follows).loss
    expected.backward()
    hidden = ours.hidden(ids, Bidirectional(3, 11), segments)
    total, _ = ours.cross_entropy(hidden.flatten(0, 1), words.flatten())
    loss = total / words.numel() + F.cross_entropy(ours.next_sentence(hidden[:, 0]), follows)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    mine, yours = gradients_of_ours(ours), gradients_of_theirs(theirs, tmp_path / "gradients")
    assert mine.keys() == yours.keys()
    floor = 1e-3 * max(float(grad.abs().max()) for grad in yours.values())
    for name, grad in yours.items():
        assert greatest(mine[name], grad) <= 1e-4 * max(float(grad.abs().max()), floor), name


def test_a_file_of_pre_training_that_is_named_for_masked_tokens(tmp_path):
    """As bert-base-uncased was published: its pooler and its head of next sentences are kept."""
    theirs = saved(transformers.BertForPreTraining, tmp_path)
    write_json(tmp_path / "config.json", read_json(tmp_path / "config.json") | {"architectures": ["BertForMaskedLM"]})
    ours = io.load(tmp_path)
    ids, segments = ids_and_segments()
    with torch.no_grad():
        hidden = ours.hidden(ids, Bidirectional(3, 11), segments)
        expected = theirs(ids, token_type_ids=segments).seq_relationship_logits
        assert greatest(ours.next_sentence(hidden[:, 0]), expected) <= 1e-5
    written_again(ours, tmp_path)


def test_next_sentences_alone(tmp_path):
    theirs = saved(transformers.BertForNextSentencePrediction, tmp_path)
    ours = io.load(tmp_path)
    assert ours.task == "following"
    ids, segments = ids_and_segments()
    with torch.no_grad():
        hidden = ours.hidden(ids, Bidirectional(3, 11), segments)
        assert greatest(ours.next_sentence(hidden[:, 0]), theirs(ids, token_type_ids=segments).logits) <= 1e-5
    with pytest.raises(ConfigError, match="this bert was saved without its language-model head"):
        ours.logits(hidden)
    written_again(ours, tmp_path)


@pytest.mark.parametrize("pooler", [True, False])
@pytest.mark.parametrize("kind", ["Bert", "Roberta", "XLMRoberta", "Camembert"])
def test_the_trunk_with_and_without_its_pooler(tmp_path, kind, pooler):
    name = {"XLMRoberta": "xlm-roberta"}.get(kind, kind.lower())
    config = BERT if kind == "Bert" else replace(ROBERTA, variant=name)
    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(**config.to_hf())
    theirs = getattr(transformers, f"{kind}Model")(settings, add_pooling_layer=pooler).eval()
    theirs.save_pretrained(tmp_path)
    ours = io.load(tmp_path)
    assert ours.config == config and ours.task == "none"
    ids, segments = ids_and_segments()
    segments = segments if config.n_segments > 1 else torch.zeros_like(segments)
    mask = torch.ones(3, 11, dtype=torch.int64)
    mask[1, 7:] = 0
    with torch.no_grad():
        expected = theirs(ids, token_type_ids=segments, attention_mask=mask)
        hidden = ours.hidden(ids, Padded(mask, causal=False), segments)
        assert greatest(hidden[mask.bool()], expected.last_hidden_state[mask.bool()]) <= 1e-5
        if pooler:
            assert greatest(ours.pooled(hidden[:, 0]), expected.pooler_output) <= 1e-5
        else:
            with pytest.raises(ConfigError, match=r"was saved without its pooler: use `hidden`, or a checkpoint that has one"):
                ours.pooled(hidden[:, 0])
    with pytest.raises(ConfigError, match="was saved without its head of next sentences: use a checkpoint that has one"):
        ours.next_sentence(hidden[:, 0])
    written_again(ours, tmp_path)


HEADS = [(BERT, "cls.predictions."), (ROBERTA, "lm_head."), (LONGFORMER, "lm_head.")]


@pytest.mark.parametrize(("config", "head"), HEADS, ids=["bert", "roberta", "longformer"])
def test_an_output_of_its_own_has_a_bias_of_its_own(tmp_path, config, head):
    """As transformers 5 has it; a file of version 4 has one bias, which is the output's."""
    theirs = theirs_of(replace(config, tied=False))
    theirs.save_pretrained(tmp_path)
    ours = io.load(tmp_path)
    ids = random_ids(config, 2, 9)
    biases = dict(theirs.named_parameters())
    with torch.no_grad():
        assert greatest(biases[head + "bias"], biases[head + "decoder.bias"]) > 0.1
        assert greatest(ours(ids), theirs(ids).logits) <= 1e-5
        written_again(ours, tmp_path)
        biases[head + "decoder.bias"].copy_(biases[head + "bias"])
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors[head + "decoder.bias"]
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        old = io.load(tmp_path)
        assert greatest(old(ids), theirs(ids).logits) <= 1e-5
        # transformers 5 would take the bias that it misses for zero.
        (tmp_path / "again").mkdir()
        io.save(old, tmp_path / "again")
        assert files(tmp_path / "again").keys() == tensors.keys() | {head + "decoder.bias"}
        again, report = type(theirs).from_pretrained(tmp_path / "again", output_loading_info=True)
        assert not any(report.values()), report
        assert torch.equal(again(ids).logits, theirs(ids).logits)
        assert torch.equal(io.load(tmp_path / "again")(ids), old(ids))
        del tensors[head + "bias"]
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=re.escape(f"missing: {head}bias, {head}decoder.bias")):
        io.load(tmp_path)


@pytest.mark.parametrize(("config", "head"), HEADS, ids=["bert", "roberta", "longformer"])
@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_a_tied_output_that_is_there_twice_must_be_the_same(tmp_path, config, head, leaf):
    theirs_of(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    words = next(name for name in tensors if name.endswith("word_embeddings.weight"))
    original = {"weight": words, "bias": head + "bias"}[leaf]
    twin = f"{head}decoder.{leaf}"
    save_file(tensors | {twin: tensors[original].clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    io.load(tmp_path)
    save_file(tensors | {twin: tensors[original] + 1}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=re.escape(f"{twin} differs from {original}, and config.json says that they are")):
        io.load(tmp_path)


@pytest.mark.parametrize("config", [ROBERTA, LONGFORMER, replace(ROBERTA, pad_id=0)], ids=["roberta", "longformer", "pad-0"])
@torch.no_grad()
def test_padding_within_a_text_is_not_counted(tmp_path, config):
    theirs = theirs_of(config)
    theirs.save_pretrained(tmp_path)
    ours = io.load(tmp_path)
    ids, pad = random_ids(config, 3, 19), config.pad_id
    ids[0, [0, 5, 6]] = ids[1, 15:] = ids[2] = pad
    expected = theirs(ids).logits
    assert greatest(ours(ids), expected) <= 1e-5
    packed = Packed(torch.tensor([19] * 3), causal=False)
    assert greatest(ours.logits(ours.hidden(ids.view(1, -1), packed)).view_as(expected), expected) <= 1e-5
    for side in (slice(0, 4), slice(15, 19)):
        mask = torch.ones_like(ids)
        mask[:, side], ids[:, side] = 0, pad
        seen = mask.bool()
        found = ours.logits(ours.hidden(ids, Padded(mask, causal=False)))
        assert greatest(found[seen], theirs(ids, attention_mask=mask).logits[seen]) <= 1e-5


@pytest.mark.parametrize("config", [ROBERTA, LONGFORMER], ids=["roberta", "longformer"])
def test_the_padding_that_positions_are_counted_by_is_not_the_tokenizers(tmp_path, config):
    model = io.build(config.variant, config, seed=0).eval()
    model.token_ids = TokenIds(bos=1, eos=(2,), pad=0)  # as those of the house's tokenizers
    io.save(model, tmp_path)
    again = io.load(tmp_path)
    ids = random_ids(config, 2, 9)
    with torch.no_grad():
        assert again.config == config and torch.equal(again(ids), model(ids))


def test_segments_are_the_first_unless_told(tmp_path):
    theirs = saved(transformers.BertForMaskedLM, tmp_path)
    ours = io.load(tmp_path)
    ids, segments = ids_and_segments()
    with torch.no_grad():
        assert greatest(ours(ids), theirs(ids).logits) <= 1e-5
        told = ours.logits(ours.hidden(ids, Bidirectional(3, 11), segments))
        assert greatest(told, theirs(ids, token_type_ids=segments).logits) <= 1e-5 < greatest(told, ours(ids))


def test_files_of_2018(tmp_path):
    """Norms whose weights are called gamma and beta, and a table of positions that follows from the config."""
    saved(transformers.BertForMaskedLM, tmp_path)
    expected = io.load(tmp_path).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        re.sub(r"(LayerNorm)\.weight$", r"\1.gamma", re.sub(r"(LayerNorm)\.bias$", r"\1.beta", k)): v for k, v in tensors.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(128)[None]
    assert sum(k.endswith("gamma") for k in old) > 4
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    found = io.load(tmp_path).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    both = old | {"bert.embeddings.LayerNorm.weight": tensors["bert.embeddings.LayerNorm.weight"].clone()}
    save_file(both, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="stand there under an old name and a new one: use a folder of one version"):
        io.load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_ff": 0}, "d_ff (0) must be at least 1"),
        ({"n_heads": 5}, "n_heads (5) must divide d_model (32): use 2 or 4"),
        ({"norm_eps": 0.0}, "norm_eps (0.0) must be positive: 1e-12 is usual"),
        ({"activation": "swish2"}, "activation ('swish2') must be one of"),
    ],
)
def test_shapes_that_are_none(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace(BERT, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "electra"}, "variant ('electra') must be one of roberta, xlm-roberta, camembert, longformer"),
        ({"pad_id": -1}, "pad_id (-1) must be a token id: 1 is usual"),
    ],
)
def test_shapes_that_are_no_robertas(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace(config_of(("roberta", "tiny")), **fields)


@pytest.mark.parametrize(
    ("module", "changed", "message"),
    [
        (bert, {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key', which is not supported"),
        (bert, {"is_decoder": True}, "is_decoder is True, which is not supported for bert (only False is)"),
        (bert, {"add_cross_attention": True}, "add_cross_attention is True, which is not supported for bert"),
        (bert, {"hidden_act": "mish"}, "hidden_act is 'mish', which is not supported for bert (only "),
        (bert, {"hidden_size": "32"}, "hidden_size is '32' and must be a whole number: copy it again"),
        (bert, {"vocab_size": None}, "config.json lacks 'vocab_size', which a bert needs: copy it again"),
        (roberta, {"model_type": "roberta", "position_embedding_type": "x"}, "which is not supported for roberta"),
    ],
)
def test_configs_that_are_computed_otherwise(module, changed, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        module.Config.from_hf(BERT.to_hf() | changed)


def test_published_configs_are_the_presets():
    """config.json of bert-base-uncased and roberta-base, as they were published."""
    uncased = json.loads(
        """{"architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": false,
        "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02,
        "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
        "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute",
        "type_vocab_size": 2, "use_cache": true, "vocab_size": 30522}"""
    )
    assert bert.Config.from_hf(uncased) == bert.PRESETS["bert-base-uncased"]
    base = {
        "model_type": "roberta",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "vocab_size": 50265,
    }
    assert roberta.Config.from_hf(uncased | base | {"pad_token_id": 1}) == roberta.PRESETS["roberta-base"]


def test_what_a_config_leaves_out_is_that_of_transformers():
    """transformers' own defaults are bert-base-uncased."""
    assert bert.Config.from_hf(transformers.BertConfig().to_dict()) == bert.PRESETS["bert-base-uncased"]
    needed = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    fields = transformers.BertConfig().to_dict()
    assert bert.Config.from_hf({name: fields[name] for name in needed}) == bert.PRESETS["bert-base-uncased"]


def test_a_roberta_with_no_room_for_a_token(tmp_path):
    write_json(tmp_path / "config.json", ROBERTA.to_hf() | {"max_position_embeddings": 2})
    with pytest.raises(CheckpointError, match=r"does not describe a roberta \(max_positions \(0\) must be at least 1\): copy it"):
        io.load(tmp_path)


def test_a_camembert_is_a_roberta(tmp_path):
    config = replace(config_of(("roberta", "tiny")), variant="camembert")
    theirs = theirs_of(config)
    theirs.save_pretrained(tmp_path)
    ours = io.load(tmp_path)
    ids = random_ids(config, 2, 9)
    with torch.no_grad():
        assert ours.config == config and greatest(ours(ids), theirs(ids).logits) <= 1e-5
