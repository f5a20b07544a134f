"""T5, BART and Pegasus: what the suite of all families does not see. Bare models, old files, and what is refused."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.pegasus.modeling_pegasus import PegasusSinusoidalPositionalEmbedding

from athanor.core.errors import CheckpointError, ConfigError
from athanor.core.io import read_json, write_json
from athanor.models import _seq2seq, bart, io, pegasus, t5
from athanor.nn.context import Bidirectional, Causal, Memory, WithMemory
from tests.models.reference import config_of, files, greatest, inputs, logits, packed, random_ids, theirs_of

T5, BART, PEGASUS = (config_of((name, "tiny")) for name in ("t5", "bart", "pegasus"))


def test_an_output_of_its_own_is_not_scaled(tmp_path):
    """T5 1.1, as it was published: tie_word_embeddings false, and no word of scaling."""
    config = replace(config_of(("t5", "tiny-gated")), tied=False)
    theirs = theirs_of(config)
    theirs.save_pretrained(tmp_path)
    fields = read_json(tmp_path / "config.json")
    fields.pop("scale_decoder_outputs", None)
    write_json(tmp_path / "config.json", fields | {"tie_word_embeddings": False})
    ours = io.load(tmp_path)
    source, answer = random_ids(config, 2, 9), random_ids(config, 2, 5)
    with torch.no_grad():
        assert greatest(ours(source, answer), theirs(source, decoder_input_ids=answer).logits) <= 1e-5
    assert not ours.config.tied


def test_an_output_that_is_tied_and_not_scaled(tmp_path):
    """What transformers 5 makes of tie_word_embeddings false where nothing was loaded: its files say so in two fields."""
    config = replace(T5, tied=False)
    theirs = theirs_of(config)
    theirs.save_pretrained(tmp_path)
    fields = read_json(tmp_path / "config.json")
    assert fields["tie_word_embeddings"] is True and fields["scale_decoder_outputs"] is False
    ours = io.load(tmp_path)
    assert ours.config == config and ours.head is None
    source, answer = random_ids(config, 2, 9), random_ids(config, 2, 5)
    with torch.no_grad():
        assert greatest(ours(source, answer), theirs(source, decoder_input_ids=answer).logits) <= 1e-5


def test_they_read_an_output_of_its_own(tmp_path):
    config = replace(config_of(("t5", "tiny-gated")), tied=False)
    ours = io.build("t5", config, seed=0).eval()
    io.save(ours, tmp_path)
    assert io.load(tmp_path).config == config
    theirs, report = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    source, answer = random_ids(config, 2, 9), random_ids(config, 2, 5)
    with torch.no_grad():
        assert greatest(ours(source, answer), theirs.eval()(source, decoder_input_ids=answer).logits) <= 1e-5


def test_an_encoder_alone_is_refused(tmp_path):
    transformers.T5EncoderModel(transformers.AutoConfig.for_model(**T5.to_hf())).save_pretrained(tmp_path)
    message = "architectures names 'T5EncoderModel', which has no decoder, and a t5 is read whole: use a checkpoint of the whole"
    with pytest.raises(CheckpointError, match=message):
        io.load(tmp_path)


@pytest.mark.parametrize("config", [BART, PEGASUS], ids=["bart", "pegasus"])
def test_an_output_of_its_own_is_refused_where_transformers_takes_more_apart(config, tmp_path):
    message = (
        "tied (False) must be True: transformers leaves the embeddings of both stacks apart otherwise, and this model has one"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace(config, tied=False)
    write_json(tmp_path / "config.json", config.to_hf() | {"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match=re.escape(message)):
        io.load(tmp_path)


def test_answers_of_a_t5_begin_with_padding(tmp_path):
    theirs = theirs_of(T5)
    theirs.config.decoder_start_token_id = None
    theirs.generation_config = transformers.GenerationConfig()
    theirs.save_pretrained(tmp_path)
    assert io.load(tmp_path).token_ids.decoder_start == read_json(tmp_path / "config.json")["pad_token_id"] == 0


def test_a_tensor_of_old_t5_files_that_nothing_is_computed_with(tmp_path):
    theirs_of(T5).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(8, 4)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    io.load(tmp_path)
    tensors["decoder.block.1.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(8, 4)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected: decoder\.block\.1\.layer\.1\.EncDecAttention"):
        io.load(tmp_path)


BARE = [(transformers.T5Model, T5), (transformers.BartModel, BART), (transformers.PegasusModel, PEGASUS)]


def read_bare(cls, config, folder):
    """A bare model of transformers in a folder, and what makes our hidden states of its inputs as it would."""
    torch.manual_seed(0)
    theirs = cls(transformers.AutoConfig.for_model(**config.to_hf())).eval()
    theirs.save_pretrained(folder)
    source, answer = random_ids(config, 2, 9), random_ids(config, 2, 5)

    def hidden(ours):
        memory = Memory(ours.encode(source, Bidirectional(2, 9)))
        return ours.hidden(answer, WithMemory(Causal(2, 5), memory))

    with torch.no_grad():
        return theirs(source, decoder_input_ids=answer).last_hidden_state, hidden


@pytest.mark.parametrize(("cls", "config"), BARE, ids=["t5", "bart", "pegasus"])
def test_bare_models(tmp_path, cls, config):
    expected, hidden = read_bare(cls, config, tmp_path)
    ours = io.load(tmp_path)
    assert ours.task == "none"
    with torch.no_grad():
        found = hidden(ours)
    assert greatest(found, expected) <= 1e-5
    with pytest.raises(ConfigError, match="was saved without its language-model head"):
        ours.logits(found)
    (tmp_path / "ours").mkdir()
    io.save(ours, tmp_path / "ours")
    a, b = files(tmp_path), files(tmp_path / "ours")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("lacking", [("encoder", "decoder"), ("decoder",)], ids="-".join)
def test_a_bare_pegasus_whose_file_lacks_a_table(tmp_path, lacking):
    expected, hidden = read_bare(transformers.PegasusModel, PEGASUS, tmp_path)
    gone = {f"{stack}.embed_positions.weight" for stack in lacking}
    tensors = load_file(tmp_path / "model.safetensors")
    assert gone < tensors.keys()
    save_file({k: v for k, v in tensors.items() if k not in gone}, tmp_path / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        assert greatest(hidden(io.load(tmp_path)), expected) <= 1e-5


@pytest.mark.parametrize("config", [BART, PEGASUS], ids=["bart", "pegasus"])
def test_the_bias_of_logits_counts(tmp_path, config):
    theirs = theirs_of(config)
    theirs.final_logits_bias.normal_(generator=torch.Generator().manual_seed(4))
    theirs.save_pretrained(tmp_path)
    ours = io.load(tmp_path)
    source, answer, targets = random_ids(config, 2, 9), random_ids(config, 2, 5), random_ids(config, 10, seed=3)
    with torch.no_grad():
        expected = theirs(source, decoder_input_ids=answer).logits
        assert greatest(ours(source, answer), expected) <= 1e-5
        total, _ = ours.cross_entropy(packed(ours, list(source), list(answer)), targets)
    wanted = F.cross_entropy(expected.flatten(0, 1), targets, reduction="sum")
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert torch.equal(ours.to_hf(ours.state_dict())["final_logits_bias"], theirs.final_logits_bias)


def test_what_answers_begin_with_is_what_generation_goes_by(tmp_path):
    """generation_config.json is asked before config.json, as in transformers; a family's own custom is asked last."""
    theirs = theirs_of(BART)
    theirs.config.decoder_start_token_id, theirs.config.bos_token_id = 7, 0
    theirs.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    assert io.load(tmp_path).token_ids.decoder_start == 7
    write_json(tmp_path / "generation_config.json", {"decoder_start_token_id": 9})
    assert io.load(tmp_path).token_ids.decoder_start == 9


def test_a_bart_without_a_bias_of_logits(tmp_path):
    theirs_of(BART).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bias = tensors.pop("final_logits_bias")
    assert bias.shape == (1, 320)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ours = io.load(tmp_path)
    assert ours.output_bias is None and "final_logits_bias" not in ours.to_hf(ours.state_dict())


def test_a_pegasus_whose_file_lacks_its_table(tmp_path):
    """Sinusoids are computed where they are not stored, as in old files, and stay out of new ones."""
    theirs = theirs_of(PEGASUS)
    with torch.no_grad():
        for stack in (theirs.model.encoder, theirs.model.decoder):
            stack.embed_positions.weight.copy_(PegasusSinusoidalPositionalEmbedding(128, 32).create_weight())
    theirs.save_pretrained(tmp_path)
    tensors = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if "embed_positions" not in k}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ours = io.load(tmp_path)
    source, answer = random_ids(PEGASUS, 2, 9), random_ids(PEGASUS, 2, 5)
    with torch.no_grad():
        assert greatest(ours(source, answer), theirs(source, decoder_input_ids=answer).logits) <= 1e-5
    assert ours.to_hf(ours.state_dict()).keys() == tensors.keys()


def test_twins_that_differ_are_refused(tmp_path):
    theirs_of(BART).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    words = tensors["model.shared.weight"]
    save_file(tensors | {"lm_head.weight": words.clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    io.load(tmp_path)
    save_file(tensors | {"lm_head.weight": words + 1}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight differs from model\.shared\.weight, and config\.json says that they"
    ):
        io.load(tmp_path)


def test_what_a_config_leaves_out_is_that_of_transformers():
    """transformers' own defaults are t5-small and bart-large."""
    assert t5.Config.from_hf(transformers.T5Config().to_dict()) == t5.PRESETS["t5-small"]
    assert bart.Config.from_hf(transformers.BartConfig().to_dict()) == bart.PRESETS["bart-large"]
    fields, needed = transformers.T5Config().to_dict(), ("vocab_size", "d_model", "num_layers", "num_heads", "d_kv", "d_ff")
    assert t5.Config.from_hf({name: fields[name] for name in needed}) == t5.PRESETS["t5-small"]
    optional = ("max_position_embeddings", "activation_function", "scale_embedding", "tie_word_embeddings")
    fields = {k: v for k, v in transformers.BartConfig().to_dict().items() if k not in optional}
    assert bart.Config.from_hf(fields) == bart.PRESETS["bart-large"]


@pytest.mark.parametrize(
    "changed",
    [
        {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True},
        {"dense_act_fn": "relu", "is_gated_act": False},
        {"scale_decoder_outputs": None},
        {"scale_decoder_outputs": False, "tie_word_embeddings": True},
        {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8},
    ],
    ids=lambda changed: next(iter(changed)),
)
@torch.no_grad()
def test_fields_of_a_t5_that_say_more_than_needed(tmp_path, changed):
    """Read and written as transformers has them."""
    theirs = theirs_of(replace(T5, feed_forward=changed.get("feed_forward_proj", "relu")))
    theirs.save_pretrained(tmp_path)
    fields = read_json(tmp_path / "config.json") | changed
    if "dense_act_fn" in changed and "feed_forward_proj" not in changed:
        del fields["feed_forward_proj"]
    write_json(tmp_path / "config.json", fields)
    ours, given = io.load(tmp_path), inputs(T5, "encoder_decoder")
    expected = type(theirs).from_pretrained(tmp_path)(**given).logits
    assert greatest(logits(ours, given), expected) <= 1e-5
    (tmp_path / "ours").mkdir()
    io.save(ours, tmp_path / "ours")
    assert greatest(type(theirs).from_pretrained(tmp_path / "ours")(**given).logits, expected) <= 1e-6


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (T5, {"head_dim": 0}, "head_dim (0) must be at least 1"),
        (T5, {"feed_forward": "glu"}, "feed_forward ('glu') must be one of relu, gelu, gated-gelu, gated-silu, gated-relu"),
        (T5, {"n_buckets": 6}, "n_buckets (6) must be a positive multiple of 4: 32 is usual"),
        (
            T5,
            {"max_distance": 4},
            "max_distance (4) must be above n_buckets / 2 (4), up to which each distance has its own bucket",
        ),
        (T5, {"norm_eps": -1.0}, "norm_eps (-1.0) must be positive: 1e-6 is usual"),
        (BART, {"max_positions": 0}, "max_positions (0) must be at least 1"),
        (BART, {"n_decoder_heads": 3}, "n_decoder_heads (3) must divide d_model (32): use 2 or 4"),
        (BART, {"activation": "x"}, "activation ('x') must be one of"),
        (PEGASUS, {"d_model": 33, "n_heads": 3, "n_decoder_heads": 3}, "d_model (33) must be even, for a sine and a cosine each"),
    ],
)
def test_shapes_that_are_none(config, fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace(config, **fields)


@pytest.mark.parametrize(
    ("read", "cls"),
    [
        (t5.ALIASES | {"head_dim": "d_kv"}, transformers.T5Config),
        (t5.ALIASES, transformers.SwitchTransformersConfig),
        (_seq2seq.ALIASES, transformers.BartConfig),
        (_seq2seq.ALIASES, transformers.PegasusConfig),
    ],
)
def test_fields_have_the_other_names_that_transformers_gives_them(read, cls):
    assert cls.attribute_map.items() <= read.items()


@pytest.mark.parametrize(
    ("module", "config", "changed", "message"),
    [
        (
            t5,
            T5,
            {"feed_forward_proj": "gated-mish"},
            "feed_forward_proj is 'gated-mish', which is not supported for t5 (only 'relu'",
        ),
        (t5, T5, {"d_kv": None}, "config.json lacks 'd_kv', which a t5 needs"),
        (
            t5,
            T5,
            {"num_heads": 2, "num_attention_heads": 4},
            "num_attention_heads is 4 and num_heads, which means the same in a t5",
        ),
        (
            bart,
            BART,
            {"num_hidden_layers": 1},
            "num_hidden_layers is 1 and encoder_layers, which means the same in a bart, is 2: remove the one that is wrong",
        ),
        (pegasus, PEGASUS, {"hidden_size": 8}, "hidden_size is 8 and d_model, which means the same in a pegasus, is 32"),
        (bart, BART, {"normalize_before": True}, "normalize_before is True, which is not supported for bart (only False is)"),
        (bart, BART, {"add_final_layer_norm": True}, "add_final_layer_norm is True, which is not supported for bart"),
        (bart, BART, {"normalize_embedding": False}, "normalize_embedding is False, which is not supported for bart"),
        (bart, BART, {"activation_function": "mish"}, "activation_function is 'mish', which is not supported for bart"),
        (pegasus, PEGASUS, {"normalize_before": False}, "normalize_before is False, which is not supported for pegasus"),
        (pegasus, PEGASUS, {"add_final_layer_norm": False}, "add_final_layer_norm is False, which is not supported for pegasus"),
        (pegasus, PEGASUS, {"normalize_embedding": True}, "normalize_embedding is True, which is not supported for pegasus"),
        (
            t5,
            T5,
            {"dense_act_fn": "gelu"},
            "dense_act_fn is 'gelu' and must be 'relu' where feed_forward_proj is 'relu' (or absent, for 'relu'): remove the one",
        ),
        (t5, T5, {"feed_forward_proj": None, "dense_act_fn": "gelu"}, "dense_act_fn is 'gelu' and must be 'relu' where"),
        (t5, T5, {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}, "dense_act_fn is 'gelu' and must be 'gelu_new'"),
        (t5, T5, {"is_gated_act": True}, "is_gated_act is True and must be False where feed_forward_proj is 'relu'"),
        (t5, T5, {"is_encoder_decoder": False}, "is_encoder_decoder is False, which is not supported for t5 (only True is)"),
        (t5, T5, {"num_hidden_layers": 1}, "num_hidden_layers is 1 and num_layers, which means the same in a t5, is 2"),
        (t5, T5, {"num_attention_heads": 2}, "num_attention_heads is 2 and num_heads, which means the same in a t5, is 4"),
        (t5, T5, {"head_dim": 4}, "head_dim is 4 and d_kv, which means the same in a t5, is 8"),
        (bart, BART, {"decoder_layers": None}, "config.json lacks 'decoder_layers', which a bart needs"),
        (bart, BART, {"decoder_ffn_dim": None}, "config.json lacks 'decoder_ffn_dim', which a bart needs"),
        (
            pegasus,
            PEGASUS,
            {"decoder_attention_heads": None},
            "config.json lacks 'decoder_attention_heads', which a pegasus needs",
        ),
        (
            bart,
            BART,
            {"num_attention_heads": 8},
            "num_attention_heads is 8 and encoder_attention_heads, which means the same in a",
        ),
        (
            pegasus,
            PEGASUS,
            {"num_hidden_layers": 1},
            "num_hidden_layers is 1 and encoder_layers, which means the same in a pegas",
        ),
        (bart, BART, {"hidden_size": 64}, "hidden_size is 64 and d_model, which means the same in a bart, is 32: remove the one"),
    ],
)
def test_configs_that_are_computed_otherwise(module, config, changed, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        module.Config.from_hf(config.to_hf() | changed)
