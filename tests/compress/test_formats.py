"""Quantised folders: bit for bit, strict, and the same model to transformers."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import athanor
from athanor.compress import formats, rtn
from athanor.compress.apply import compress
from athanor.core.errors import CheckpointError
from athanor.lm import LM, MANIFEST
from athanor.models import io

KINDS = {
    "int8": {"bits": 8},
    "int8 in groups": {"bits": 8, "group": 32},
    "int4": {"bits": 4},
    "int4 in part": {"bits": 4, "skip": ("blocks.0.attention.qkv", "blocks.1.feed_forward.down")},
}
kinds = pytest.mark.parametrize("kind", KINDS)
tied = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@pytest.fixture
def folder(tiny, tokenizer, tmp_path):
    """`folder(kind, **fields)`: a quantised tiny model and the folder it is saved in."""

    def make(kind, **fields):
        model = compress(tiny(**fields), **KINDS[kind])
        return model, LM(model, tokenizer).save(tmp_path / "small")

    return make


@pytest.fixture
def ids(tokenizer):
    return torch.randint(tokenizer.vocab_size, (3, 40), generator=torch.Generator().manual_seed(1))


@st.composite
def integers(draw, bits, step=1):
    rows, columns = draw(st.integers(1, 5)), step * draw(st.integers(1, 37))
    seed, half = draw(st.integers(0, 2**32 - 1)), 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)


@given(integers(8))
def test_packing_8_bits_is_that_of_compressed_tensors_and_can_be_undone(q):
    theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    packed = formats.pack8(q)
    assert torch.equal(packed, theirs.pack_to_int32(q, 8))
    assert torch.equal(formats.unpack8(packed, q.shape[1]), q)


@given(integers(4, step=32))
def test_packing_4_bits_is_that_of_compressed_tensors(q):
    theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    codes = rtn.quantise(q.float(), 4, 32)[0]
    assert torch.equal(codes.view(torch.int32), theirs.pack_to_int32(rtn.integers(codes), 4))
    assert torch.equal(rtn.integers(codes), theirs.unpack_from_int32(codes.view(torch.int32), 4, q.shape))


@tied
@kinds
def test_what_is_loaded_is_what_was_saved(kind, tied, folder, tokenizer, ids, tmp_path):
    model, path = folder(kind, tied=tied)
    again = athanor.load(path)
    before, after = model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    assert torch.equal(again.logits(ids), LM(model, tokenizer).logits(ids))
    again.save(tmp_path / "twice")
    for name in (io.WEIGHTS, "config.json", MANIFEST):
        assert (tmp_path / "twice" / name).read_bytes() == (path / name).read_bytes()


@tied
@kinds
def test_transformers_gives_our_logits(kind, tied, folder, ids):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model, path = folder(kind, tied=tied)
    theirs, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() <= 1e-4


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32)])
def test_a_folder_that_compressed_tensors_wrote_gives_their_logits(bits, group, tiny, ids, tmp_path):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny().config.to_hf()), dtype=torch.float32).eval()
    weights = {"num_bits": bits, "strategy": "group" if group else "channel", "group_size": group, "symmetric": True}
    config = quantization.QuantizationConfig(
        config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["re:.*lm_head"], format="pack-quantized"
    )
    quantization.apply_quantization_config(theirs, config)
    for module in theirs.modules():
        if hasattr(module, "weight_scale"):
            runs = module.weight.detach().view(len(module.weight), -1, group or module.in_features)
            module.weight_scale.data = runs.abs().amax(-1) / (2 ** (bits - 1) - 0.5)
    compressor = compressors.ModelCompressor(quantization_config=config)
    with torch.no_grad():
        expected = theirs(ids).logits
    compressor.compress_model(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    compressor.update_config(tmp_path / "theirs")
    ours = io.load(tmp_path / "theirs", formats.prepare)
    with torch.no_grad():
        logits = ours(ids)
    assert (logits - expected).abs().max() <= 1e-4
    # Their scales are no bfloat16 numbers: they are not rounded on the way out.
    (tmp_path / "ours").mkdir()
    io.save(ours, tmp_path / "ours", formats.describe(ours), formats.layout(ours))
    before, after = (load_file(tmp_path / side / io.WEIGHTS) for side in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k].float(), after[k].float()) for k in before)


def test_files_are_as_small_as_they_claim(tiny, tokenizer, tmp_path):
    model = tiny()
    matrices = sum(p.nbytes for name, p in model.named_parameters() if name.startswith("blocks") and p.ndim == 2)
    rest = sum(p.nbytes for p in model.parameters()) - matrices
    for bits, share in ((8, 0.28), (4, 0.15)):
        path = LM(compress(model, bits), tokenizer).save(tmp_path / f"int{bits}")
        tensors = load_file(path / io.WEIGHTS)
        quantised = {k: v.nbytes for k, v in tensors.items() if ".weight_" in k}
        # Two bytes a scale, and 16 bytes a weight_shape.
        assert sum(n for k, n in quantised.items() if not k.endswith("weight_shape")) < share * matrices
        assert sum(n for k, n in quantised.items() if k.endswith("weight_shape")) == 16 * 2 * 7
        assert sum(v.nbytes for k, v in tensors.items() if k not in quantised) == rest / 2


def test_a_plain_model_has_no_layout(tiny):
    assert formats.describe(tiny()) == {}
    assert formats.layout(tiny()) is None
    assert formats.prepare(tiny(), {"dtype": "float32"}) is None


def test_a_bfloat16_model_comes_back_as_one(tiny, tokenizer, tmp_path):
    model = compress(tiny().to(torch.bfloat16), 4)
    path = LM(model, tokenizer).save(tmp_path / "small")
    after = athanor.load(path).model.state_dict()
    for name, tensor in model.state_dict().items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name


def test_widths_that_fill_no_whole_word(folder, ids):
    model, path = folder("int8", d_ff=45)
    assert load_file(path / io.WEIGHTS)["model.layers.0.mlp.down_proj.weight_packed"].shape == (32, 12)
    with torch.no_grad():
        assert torch.equal(athanor.load(path).model(ids), model(ids))


def refused(path, message, tensors=None, change=None):
    """Alter a copy of what is in `path` (tensors, or config.json by `change`), load it, and expect a CheckpointError."""
    if tensors:
        save_file(tensors(load_file(path / io.WEIGHTS)), path / io.WEIGHTS)
    if change:
        fields = json.loads((path / "config.json").read_text())
        change(fields)
        (path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=message):
        io.load(path, formats.prepare)


Q = "model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != Q + "weight_scale"}, rf"missing: {Q}weight_scale\. Use"),
        (lambda t: t | {Q + "weight": torch.zeros(32, 32)}, rf"unexpected: {Q}weight\. Use"),
        (lambda t: t | {Q + "weight_zero_point": torch.zeros(1)}, rf"unexpected: {Q}weight_zero_point\. Use"),
        (
            lambda t: t | {Q + "weight_packed": torch.zeros(32, 9, dtype=torch.int32)},
            rf"misshaped: {Q}weight_packed is \(32, 9\) and must be \(32, 8\)",
        ),
        (lambda t: t | {Q + "weight_scale": torch.ones(32, 2)}, rf"{Q}weight_scale is \(32, 2\) and must be \(32, 1\)"),
        (
            lambda t: t | {Q + "weight_packed": t[Q + "weight_packed"].long()},
            rf"of the wrong kind: {Q}weight_packed is torch\.int64 and must be like torch\.int32",
        ),
        (
            lambda t: t | {Q + "weight_shape": torch.tensor([32, 31])},
            rf"{Q}weight_shape says \[32, 31\] and must say \[32, 32\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, change, message):
    refused(folder("int8")[1], message, tensors=change)


def test_bits_that_are_not_those_of_the_file_are_refused(folder):
    def change(fields):
        fields["quantization_config"]["config_groups"]["group_0"]["weights"] |= {
            "strategy": "group",
            "group_size": 32,
            "num_bits": 4,
        }

    refused(folder("int8")[1], r"misshaped: .*weight_packed is \(32, 8\) and must be \(32, 4\)", change=change)


def test_a_quantised_file_beside_a_plain_config_is_refused(folder):
    refused(folder("int8")[1], r"missing: .*; unexpected: .*weight_packed", change=lambda f: f.pop("quantization_config"))


def setting(value, *path):
    def change(fields):
        table = fields
        for key in path[:-1]:
            table = table[key]
        table[path[-1]] = value

    return change


C = "quantization_config"
G = (C, "config_groups", "group_0")
W = (*G, "weights")
REMEDY = "copy the file again, or make the folder anew with `athanor quantize`"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting(3, C), r"quantization_config is 3 but must be a table"),
        (setting("gptq", C, "quant_method"), r"quant_method is 'gptq' but must be 'compressed-tensors'"),
        (setting("dense", C, "format"), r"format is 'dense' but must be 'pack-quantized'"),
        (setting("initialized", C, "quantization_status"), r"quantization_status is 'initialized' but must be 'compressed' or"),
        (setting({"num_bits": 8}, C, "kv_cache_scheme"), r"kv_cache_scheme is \{'num_bits': 8\} but must be absent"),
        (setting({"a": 1}, C, "transform_config"), r"transform_config is .* but must be absent, since it means something"),
        (setting({}, C, "config_groups"), r"config_groups is \[\] but must be exactly one group"),
        (setting(None, C, "config_groups"), r"config_groups is None but must be a table"),
        (setting([], *G), r"config_groups\.group_0 is \[\] but must be a table"),
        (setting(["Conv1d"], *G, "targets"), r"targets is \['Conv1d'\] but must be \['Linear'\]"),
        (setting({"num_bits": 8}, *G, "input_activations"), r"group_0\.input_activations is .* but must be absent"),
        (setting(None, *W), r"group_0\.weights is None but must be a table"),
        (setting(3, *W, "num_bits"), r"weights\.num_bits is 3 but must be 8 or 4"),
        (setting([8], *W, "num_bits"), r"weights\.num_bits is \[8\] but must be 8 or 4"),
        (setting(8.0, *W, "num_bits"), r"weights\.num_bits is 8\.0 but must be 8 or 4"),
        (setting("float", *W, "type"), r"weights\.type is 'float' but must be 'int'"),
        (setting(False, *W, "symmetric"), r"weights\.symmetric is False but must be True"),
        (setting(True, *W, "dynamic"), r"weights\.dynamic is True but must be False or None"),
        (setting("tensor", *W, "strategy"), r"weights\.strategy is 'tensor' but must be 'channel' or 'group'"),
        (setting("group", *W, "actorder"), r"weights\.actorder is 'group' but must be"),
        (setting([16, 16], *W, "block_structure"), r"weights\.block_structure is \[16, 16\] but must be absent"),
        (
            setting(32, *W, "group_size"),
            r"weights\.strategy is 'channel' but must be 'group' for 4 bits or where there is a group_size",
        ),
        (setting(4, *W, "num_bits"), r"weights\.strategy is 'channel' but must be 'group' for 4 bits"),
        (setting("group", *W, "strategy"), r"weights\.group_size is None but must be 32, 64 or 128"),
        (setting(["re:("], C, "ignore"), r"ignore is 're:\(' but must be a name or 're:' and a regular expression \(missing"),
        (setting("lm_head", C, "ignore"), r"ignore is 'lm_head' but must be a list of names"),
        (setting([], C, "ignore"), r"ignore leaves out nothing of lm_head, but the output is never quantised here"),
        (setting(["lm_head", Q[:-1]], C, "ignore"), rf"ignore leaves out {Q[:-1]} of {Q[:-1]}, .* but these are one matrix here"),
        (setting("int8", "dtype"), r"dtype is 'int8' but must be one of float32, bfloat16, float16"),
        (setting([1], "dtype"), r"dtype is \[1\] but must be one of"),
    ],
)
def test_a_config_that_means_something_else_is_refused(folder, change, message):
    refused(folder("int8")[1], rf"config\.json: .*{message}.*: {REMEDY}", change=change)


def test_a_group_that_does_not_divide_a_width_is_refused(folder):
    def change(fields):
        fields["quantization_config"]["config_groups"]["group_0"]["weights"] |= {"strategy": "group", "group_size": 64}

    refused(folder("int8")[1], r"quantization_config: group \(64\) must divide the 32 columns of blocks\.0", change=change)


def test_a_group_size_that_is_no_whole_number_is_refused(folder):
    refused(folder("int4")[1], r"weights\.group_size is 32\.0 but must be 32, 64 or 128", change=setting(32.0, *W, "group_size"))


def test_fields_without_a_meaning_for_inference_are_no_hindrance(folder, ids):
    model, path = folder("int8")
    fields = json.loads((path / "config.json").read_text())
    config = fields["quantization_config"]
    config |= {"version": "0.20.0", "global_compression_ratio": 1.5, "kv_cache_scheme": None, "sparsity_config": {}}
    config["config_groups"]["group_0"]["weights"] |= {"observer": "minmax", "group_size": -1, "actorder": None}
    prepared = copy.deepcopy(fields)
    (path / "config.json").write_text(json.dumps(fields))
    with torch.no_grad():
        assert torch.equal(io.load(path, formats.prepare)(ids), model(ids))
    assert fields == prepared


def test_an_altered_folder_is_refused(folder):
    _, path = folder("int4")
    tensors = load_file(path / io.WEIGHTS)
    tensors[Q + "weight_packed"][0, 0] ^= 1
    save_file(tensors, path / io.WEIGHTS)
    with pytest.raises(CheckpointError, match=r"weights differ from what athanor\.json recorded"):
        athanor.load(path)
