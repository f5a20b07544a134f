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
from athanor.core.errors import CheckpointError
from athanor.core.weights import save_sharded
from athanor.models import io, llama


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
