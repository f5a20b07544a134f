"""Checkpoint folders that are not what they should be: each is refused, saying why."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from athanor.compress import formats
from athanor.core import plugins
from athanor.core.errors import CheckpointError
from athanor.core.weights import save_sharded
from athanor.infer.engine import Engine
from athanor.models import bert, deepseek_v3, io, llama
from athanor.models.base import TokenIds
from athanor.types import Request, SamplingParams
from tests.infer.test_paths import Letters
from tests.models.reference import greatest, inputs, logits, random_ids, theirs_of


@pytest.fixture
def folder(tiny, tmp_path):
    io.save(tiny(), tmp_path)
    return tmp_path


@pytest.fixture
def edit(folder):
    """`edit(**fields)` changes config.json (None removes a field); `edit(tensors=f)` replaces the tensors by f(tensors)."""

    def change(tensors=None, **fields):
        if tensors:
            save_file(tensors(load_file(folder / io.WEIGHTS)), folder / io.WEIGHTS)
        path = folder / "config.json"
        content = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return change


def refused(folder, message):
    with pytest.raises(CheckpointError, match=message) as error:
        io.load(folder)
    return str(error.value)


def without(*names):
    return lambda tensors: {k: v for k, v in tensors.items() if k not in names}


def test_missing_tensors_are_named(folder, edit):
    edit(tensors=without("model.norm.weight", "model.layers.1.self_attn.k_proj.weight"))
    message = refused(folder, r"the weights do not fit .*config.json: missing: ")
    assert "missing: model.layers.1.self_attn.k_proj.weight, model.norm.weight." in message
    assert "Use the files that were saved together" in message


def test_many_missing_tensors_are_counted(folder, edit):
    edit(num_hidden_layers=3)
    assert refused(folder, "missing").count("model.layers.2.") == 6
    refused(folder, r" and 3 more\.")


def test_unexpected_tensors_are_named(folder, edit):
    edit(tensors=lambda tensors: tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})
    refused(folder, r"unexpected: model\.layers\.0\.self_attn\.q_proj\.bias\. Use")


def test_a_head_that_is_not_the_embedding_is_refused_where_they_are_tied(folder, edit):
    edit(tie_word_embeddings=True)
    refused(folder, r"lm_head\.weight differs from model\.embed_tokens\.weight, and config\.json says that they are tied")


def test_a_head_that_is_the_embedding_may_stand_in_the_file_too(folder, edit):
    edit(lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}, tie_word_embeddings=True)
    assert io.load(folder).head is None


def test_misshaped_tensors_are_named_with_both_shapes(folder, edit):
    edit(tensors=lambda tensors: tensors | {"model.norm.weight": torch.zeros(31)})
    refused(folder, r"misshaped: model\.norm\.weight is \(31,\) and must be \(32,\)")


def test_whole_numbers_are_no_weights(folder, edit):
    edit(tensors=lambda tensors: tensors | {"model.norm.weight": torch.zeros(32, dtype=torch.int8)})
    refused(folder, r"of the wrong kind: model\.norm\.weight is torch\.int8 and must be like torch\.float32")


def test_a_truncated_file_is_refused(folder):
    path = folder / io.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, r"model\.safetensors is not a whole safetensors file: its tensors need \d+ bytes of data and it holds \d+")


def test_a_missing_file_is_refused(folder):
    (folder / io.WEIGHTS).unlink()
    refused(folder, r"holds no weights: it needs model\.safetensors, or model\.safetensors\.index\.json")


@pytest.mark.parametrize("content", ["[]", "{}", '{"model_type": 3}'])
def test_a_config_without_a_model_type_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    refused(folder, r"config\.json has no 'model_type': it is not the config of a model")


def test_a_class_that_is_not_computed_is_named_where_its_weights_do_not_fit(folder, edit):
    edit(architectures=["LlamaForTelepathy"])
    io.load(folder)
    edit(tensors=lambda tensors: tensors | {"telepathy.weight": torch.zeros(2)})
    message = r"config\.json: architectures names 'LlamaForTelepathy', a class that is not computed here, and the weights have no"
    refused(
        folder, message + r" place in another \(unexpected: telepathy\.weight\)\. Use a checkpoint of a class that ends in Model,"
    )


def test_token_ids_that_are_none_say_in_which_folder(folder, edit):
    edit(bos_token_id="<s>")
    refused(folder, re.escape(f"{folder}/config.json: bos_token_id is '<s>' and must be a token id: copy it again"))


def test_what_is_wrong_with_a_quantisation_says_in_which_folder(folder, edit):
    edit(quantization_config=3)
    with pytest.raises(CheckpointError, match=re.escape(f"{folder}/config.json: quantization_config is 3 but must be a table")):
        io.load(folder, formats.prepare)


def test_an_unknown_architecture_is_refused_with_the_nearest_name(folder, edit):
    edit(model_type="xyzxyz")
    refused(folder, r"config\.json: no architecture computes model_type 'xyzxyz'\. There are: bart, ")
    edit(model_type="lama")
    refused(folder, r"config\.json: no architecture computes model_type 'lama'; did you mean 'llama'\?")


def test_fields_of_config_that_are_no_shape_are_refused(folder, edit):
    for fields, message in (
        ({"num_attention_heads": 0}, "does not describe a llama"),
        ({"hidden_size": "32"}, "hidden_size is '32' and must be a whole number"),
        ({"rope_parameters": [1]}, "rope_parameters is .1. and must be a table"),
        ({"num_key_value_heads": 3}, re.escape("n_kv_heads (3) must divide n_heads (4): use one of 1, 2, 4")),
    ):
        edit(**fields)
        refused(folder, message)
        edit(num_attention_heads=4, hidden_size=32, num_key_value_heads=2, rope_parameters=None)
    io.load(folder)


@pytest.mark.parametrize("value", [False, None, 0])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_what_sees_ahead_in_transformers_is_refused(tmp_path, name, value):
    """Null too: it is false there."""
    config = plugins.load("models", name).PRESETS["tiny"]
    io.save(io.build(name, config, seed=0), tmp_path, {"is_causal": True})
    io.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(io.read_config(tmp_path) | {"is_causal": value}))
    refused(tmp_path, f"is_causal is {value}, which is not supported for {name} .only True is.: use another checkpoint")


def test_an_encoder_sees_ahead_anyway(tmp_path):
    io.save(io.build("bert", bert.PRESETS["tiny"], seed=0), tmp_path, {"is_causal": False})
    io.load(tmp_path)


def test_weights_of_another_name_are_refused_and_the_field_stays_behind(folder, edit, tmp_path):
    edit(transformers_weights="other.safetensors")
    message = "transformers_weights is 'other.safetensors', and weights are read from model.safetensors: rename the file, and"
    refused(folder, re.escape(message))
    edit(transformers_weights=io.WEIGHTS)
    (tmp_path / "again").mkdir()
    io.save(io.load(folder), tmp_path / "again")
    assert "transformers_weights" not in io.read_config(tmp_path / "again")


@pytest.mark.parametrize("name", ["rotary_emb.inv_freq", "layers.1.self_attn.rotary_emb.inv_freq"])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_frequencies_of_older_files_are_harmless(folder, edit, prefix, name):
    before = io.load(folder).state_dict()
    edit(lambda t: {re.sub(r"^model\.", prefix, k): v for k, v in t.items()} | {prefix + name: torch.ones(4)})
    after = io.load(folder).state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_size_that_no_memory_holds_is_refused(folder, edit):
    for fields, message in (
        ({"vocab_size": 10**30}, "vocab_size is 1000000000000000000000000000000 and must be at most 2147483647: copy it again"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000 and must be at most 10000: copy it again"),
        ({"head_dim": 2**31}, "head_dim is 2147483648 and must be at most 16777216: copy it again"),
        ({"head_dim": 2**24, "hidden_size": 2**24, "num_attention_heads": 10_000}, "describes a llama that no memory holds"),
    ):
        edit(**fields)
        refused(folder, message)
        edit(vocab_size=320, num_hidden_layers=2, head_dim=8, hidden_size=32, num_attention_heads=4)
    io.load(folder)


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id"])
def test_ids_outside_the_vocabulary_are_harmless_in_decoders(folder, edit, name):
    """Small models that transformers saved have its default, such as GPT-2's 50256."""
    edit(**{name: 320})
    engine = Engine(io.load(folder), Letters(320))
    answer = engine.generate([Request("x", [5], SamplingParams(temperature=0.0, max_tokens=4, min_tokens=2))])[0]
    assert len(answer.ids) == 4


@pytest.mark.parametrize(
    ("family", "name"), [("bart", "decoder_start_token_id"), ("bart", "forced_bos_token_id"), ("t5", "pad_token_id")]
)
def test_what_answers_begin_with_is_in_the_vocabulary(tmp_path, family, name):
    config = plugins.load("models", family).PRESETS["tiny"]
    io.save(io.build(family, config, seed=0), tmp_path, {"pad_token_id": 320} if family == "bart" else {})
    io.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(io.read_config(tmp_path) | {name: 320}))
    refused(
        tmp_path, rf"{name} is 320 and must be below vocab_size \(320\), since text is generated with it: correct it in config"
    )


@pytest.mark.parametrize("name", ["LlamaModel", "LlamaForSequenceClassification"])
def test_an_output_that_the_architecture_named_lacks_is_refused_by_that_name(folder, edit, name):
    edit(architectures=[name])
    message = refused(
        folder, f"lm_head.weight is an output of its own, and architectures in config.json names '{name}', which has"
    )
    assert "tied" not in message


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_in_one_tensor_are_refused_with_the_remedy(tmp_path, name):
    theirs = theirs_of(plugins.load("models", name).PRESETS["tiny"])
    theirs.save_pretrained(tmp_path, save_original_format=False)
    refused(
        tmp_path, r"mlp.experts.gate_up_proj holds all experts in one tensor, .*save_pretrained\(..., save_original_format=True"
    )


def test_prepare_sees_the_model_and_the_fields_before_weights_are_read(folder):
    seen = []

    def prepare(model, fields):
        seen.append((type(model).__name__, fields["hidden_size"], next(model.parameters()).is_meta))

    io.load(folder, prepare)
    assert seen == [("Model", 32, True)]


def test_extra_fields_join_the_config(tiny, tmp_path):
    io.save(tiny(), tmp_path, {"quantization_config": {"bits": 8}})
    assert io.read_config(tmp_path)["quantization_config"] == {"bits": 8}


PEAK = """
import sys, torch
from pathlib import Path
from athanor.models import io, llama

def resident(which):
    for line in open("/proc/self/status"):
        if line.startswith(which):
            return int(line.split()[1]) * 1024

io.load(Path(sys.argv[1]))  # what only the first load needs
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
model = io.load(Path(sys.argv[2]))
weights = sum(p.nbytes for p in model.parameters())
print((resident("VmHWM") - before) / weights, weights)
"""


@pytest.mark.parametrize(("said", "eos"), [({}, (7,)), ({"eos_token_id": None}, (7,)), ({"eos_token_id": [5, 9]}, (5, 9))])
def test_an_end_of_text_that_generation_config_lacks_is_that_of_config(folder, edit, said, eos):
    edit(eos_token_id=7)
    (folder / "generation_config.json").write_text(json.dumps(said))
    assert io.load(folder).token_ids.eos == eos


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_token_ids_come_back(tmp_path, family):
    model = io.build(family, plugins.load("models", family).PRESETS["tiny"], seed=0)
    model.token_ids = TokenIds(bos=4, eos=(5, 6), pad=7)
    io.save(model, tmp_path)
    assert io.load(tmp_path).token_ids == model.token_ids


def half(*wide, base=torch.bfloat16):
    """Tensors in `base`, but those whose name has one of `wide` in it."""
    return lambda tensors: {k: v if any(w in k for w in wide) else v.to(base) for k, v in tensors.items()}


MIXED = [("llama", "embed"), ("qwen2", "v_proj"), ("gpt2", "ln_"), ("bert", "LayerNorm"), ("mixtral", "gate"), ("bart", "fc1")]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16", None])
@pytest.mark.parametrize(("family", "wide"), MIXED, ids=[name for name, _ in MIXED])
def test_weights_of_two_dtypes_get_that_of_the_config_or_the_wider(tmp_path, family, wide, dtype):
    config = plugins.load("models", family).PRESETS["tiny"]
    theirs = theirs_of(config)
    theirs.save_pretrained(tmp_path)
    save_file(half(wide)(load_file(tmp_path / io.WEIGHTS)), tmp_path / io.WEIGHTS, {"format": "pt"})
    fields = json.loads((tmp_path / "config.json").read_text()) | {"dtype": dtype}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours = io.load(tmp_path)
    expected = torch.bfloat16 if dtype == "bfloat16" else torch.float32  # no tensor is float16
    assert {p.dtype for p in (*ours.parameters(), *io.skeleton(tmp_path).parameters())} == {expected}
    given = inputs(config, ours.kind)
    with torch.no_grad():
        found = logits(ours, given).float()
        exact = type(theirs).from_pretrained(tmp_path, dtype=torch.float32)(**given).logits
    if expected == torch.bfloat16:  # a token may go to another expert
        assert float((found - exact).abs().mean()) <= 0.1 * float(exact.std())
    else:
        assert greatest(found, exact) <= 1e-5


def test_parts_of_one_matrix_of_several_dtypes_are_not_rounded(folder, edit):
    edit(tensors=half("k_proj", base=torch.float16), dtype=None)
    there, read = load_file(folder / io.WEIGHTS), io.load(folder)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(read.to_hf(read.state_dict())[name], there[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_chooses_experts_of_a_deepseek_stays_in_float32(tmp_path, dtype):
    theirs = theirs_of(deepseek_v3.PRESETS["tiny"])
    theirs.save_pretrained(tmp_path)
    ours = io.load(tmp_path, dtype=dtype)
    mine = ours.to_hf(ours.state_dict())
    kept = {name for name, tensor in mine.items() if tensor.dtype == torch.float32}
    again = type(theirs).from_pretrained(tmp_path, dtype=dtype)
    assert kept and kept == {name for name, tensor in again.state_dict().items() if tensor.dtype == torch.float32}
    assert all(torch.equal(mine[name], again.state_dict()[name]) for name in kept)
    given = random_ids(theirs.config, 2, 19)
    with torch.no_grad():
        assert float((ours(given).float() - theirs(given).logits).abs().mean()) <= 0.1 * float(theirs(given).logits.std())


@pytest.mark.parametrize("family", ["t5", "switch"])
@pytest.mark.parametrize("given", [torch.float16, None])
def test_float16_is_refused_for_a_family_that_leaves_its_range(tmp_path, family, given):
    theirs = theirs_of(plugins.load("models", family).PRESETS["tiny"])
    theirs.save_pretrained(tmp_path)
    if given is None:  # as transformers writes it, with half of each feed-forward block in float32
        type(theirs).from_pretrained(tmp_path, dtype=torch.float16).save_pretrained(tmp_path)
    message = "the dtype is float16, whose range the numbers of a .* leave: load it with dtype=torch.bfloat16 or torch.float32"
    with pytest.raises(CheckpointError, match=message):
        io.load(tmp_path, dtype=given)
    assert {p.dtype for p in io.load(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}
    assert {p.dtype for p in io.load(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured by Linux's /proc")
@pytest.mark.parametrize("shards", [1, 4])
def test_loading_takes_little_more_memory_than_the_weights(tiny, tmp_path, shards):
    """Peak resident memory is at most 1.15 times the weights; a second copy of them would make it 2."""
    io.save(tiny(), tmp_path)
    big = llama.Model(llama.Config(8192, 640, 6, 10, 5, 2560, tied=False))
    weights = sum(p.nbytes for p in big.parameters())
    (tmp_path / "big").mkdir()
    save_sharded(tmp_path / "big", big.to_hf(big.state_dict()), {"format": "pt"}, weights // shards + 2**20)
    (tmp_path / "big" / "config.json").write_text(json.dumps(big.config.to_hf()))
    out = subprocess.run([sys.executable, "-c", PEAK, tmp_path, tmp_path / "big"], capture_output=True, text=True, check=True)
    ratio, loaded = out.stdout.split()
    assert int(loaded) == weights > 150e6
    assert float(ratio) <= 1.15
