import math
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from athanor.core.errors import CheckpointError
from athanor.models import _llama2c
from athanor.tokenizer import llama2c

# (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len)
SHAPE = (16, 24, 2, 4, 2, 11, 9)
PER_LAYER = ("rms_att", "wq", "wk", "wv", "wo", "rms_ffn", "w1", "w2", "w3")
# The order of the parts in the file, by version.
ORDER = {
    0: ("tok_emb", *PER_LAYER, "rms_final", "freq_cos", "freq_sin", "wcls"),
    1: ("rms_att", "rms_ffn", "rms_final", "tok_emb", "wq", "wk", "wv", "wo", "w1", "w2", "w3", "wcls"),
}


def _weights(tied, seed=0):
    """Random weights under llama2.c's names, those of a layer stacked."""
    dim, hidden, layers, heads, kv_heads, vocab, seq = SHAPE
    kv, half = dim // heads * kv_heads, dim // heads // 2
    shapes = {
        "tok_emb": (vocab, dim),
        "rms_att": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv, dim),
        "wv": (layers, kv, dim),
        "wo": (layers, dim, dim),
        "rms_ffn": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "rms_final": (dim,),
        "freq_cos": (seq, half),
        "freq_sin": (seq, half),
    } | ({} if tied else {"wcls": (vocab, dim)})
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in shapes.items()}


def _file(path, weights, version=0, shape=SHAPE):
    tied = "wcls" not in weights
    fields = list(shape)
    if version == 0:
        head = struct.pack("<7i", *fields[:5], fields[5] if tied else -fields[5], fields[6])
    else:
        head = struct.pack("<Ii7iB", 0x616B3432, version, *fields, tied).ljust(256, b"\0")
    body = b"".join(weights[name].numpy().tobytes() for name in ORDER[min(version, 1)] if name in weights)
    path.write_bytes(head + body)
    return path


def _reference(weights, ids):
    """llama2.c's forward pass, token by token as its program runs it: logits [T, V]."""
    dim, _, layers, heads, kv_heads, _, _ = SHAPE
    width = dim // heads
    keys = [[] for _ in range(layers)]
    values = [[] for _ in range(layers)]

    def norm(x, gain):
        return gain * x / torch.sqrt((x * x).mean() + 1e-5)

    def turn(x, position):  # neighbours 2i, 2i+1 of each head
        out = x.clone()
        for i in range(0, x.numel(), 2):
            angle = position / 10000 ** ((i % width) / width)
            a, b = x[i].item(), x[i + 1].item()
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + 1] = a * math.sin(angle) + b * math.cos(angle)
        return out

    logits = []
    for position, token in enumerate(ids):
        x = weights["tok_emb"][token]
        for layer in range(layers):
            w = {name: weights[name][layer] for name in PER_LAYER}
            y = norm(x, w["rms_att"])
            query = turn(w["wq"] @ y, position).view(heads, width)
            keys[layer].append(turn(w["wk"] @ y, position).view(kv_heads, width))
            values[layer].append((w["wv"] @ y).view(kv_heads, width))
            heads_out = []
            for head in range(heads):
                group = head // (heads // kv_heads)
                scores = torch.stack([query[head] @ key[group] for key in keys[layer]]) / math.sqrt(width)
                heads_out.append(torch.softmax(scores, 0) @ torch.stack([value[group] for value in values[layer]]))
            x = x + w["wo"] @ torch.cat(heads_out)
            y = norm(x, w["rms_ffn"])
            x = x + w["w2"] @ (functional.silu(w["w1"] @ y) * (w["w3"] @ y))
        logits.append(weights.get("wcls", weights["tok_emb"]) @ norm(x, weights["rms_final"]))
    return torch.stack(logits)


def _transformers(path):
    fields, tensors = _llama2c.read(path)
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if fields["tie_word_embeddings"] else [])
    model.tie_weights()
    return model


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_what_llama2c_computes(tmp_path, version, tied):
    weights = _weights(tied)
    model = _transformers(_file(tmp_path / "model.bin", weights, version))
    ids = [1, 5, 10, 3, 3, 0, 7, 2, 9]
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([ids])).logits[0], _reference(weights, ids), rtol=1e-4, atol=1e-5)


def test_the_fields_say_what_the_header_says(tmp_path):
    fields, tensors = _llama2c.read(_file(tmp_path / "model.bin", _weights(tied=False)))
    assert fields["model_type"] == "llama" and fields["architectures"] == ["LlamaForCausalLM"]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert tuple(fields[name] for name in (*names, "vocab_size", "max_position_embeddings")) == SHAPE
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["tie_word_embeddings"]) == (1, 2, False)
    assert (fields["rms_norm_eps"], fields["rope_theta"]) == (1e-5, 10000.0)
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("change", [-4, -1, 1, 4])
def test_a_file_of_another_length_is_refused_with_both_lengths(tmp_path, version, change):
    path = _file(tmp_path / "model.bin", _weights(tied=True), version)
    whole = path.read_bytes()
    path.write_bytes(whole[:change] if change < 0 else whole + bytes(change))
    with pytest.raises(CheckpointError, match=rf"has {len(whole) + change} bytes and its header .* asks for {len(whole)}: give"):
        _llama2c.read(path)


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (0, 0, r"every number of its header \(dim 0, .* must be at least 1"),
        (1, -24, "hidden_dim -24, .* must be at least 1"),
        (2, 0, "n_layers 0, .* must be at least 1"),
        (3, 3, "n_heads must divide dim into heads of even width"),
        (3, 16, "n_heads must divide dim into heads of even width"),
        (4, 3, "n_kv_heads n_heads"),
        (6, -1, "seq_len -1, .* must be at least 1"),
        (2, 2**31 - 1, "n_layers 2147483647, .* asks for"),
        (5, 2**31 - 1, "vocab_size 2147483647, .* asks for"),
    ],
)
def test_absurd_headers_are_refused_before_memory_is_taken(tmp_path, version, field, value, message):
    shape = [*SHAPE]
    shape[field] = value
    path = _file(tmp_path / "model.bin", _weights(tied=True), version, shape)
    with pytest.raises(CheckpointError, match=message):
        _llama2c.read(path)


def test_the_vocabulary_of_version_1_has_no_sign(tmp_path):
    shape = (*SHAPE[:5], -11, SHAPE[6])
    with pytest.raises(CheckpointError, match=r"vocab_size -11, .* must be at least 1"):
        _llama2c.read(_file(tmp_path / "model.bin", _weights(tied=False), 1, shape))


def _gguf(path):
    path.write_bytes(b"GGUF" + bytes(300))


@pytest.mark.parametrize(
    ("write", "what"),
    [
        (_gguf, "a GGUF file, which is written here and not read: give the Hugging Face folder that it"),
        (lambda path: save_file({"w": torch.ones(99)}, path), "a safetensors file: give the folder that it belongs to"),
        (lambda path: torch.save({"w": torch.ones(99)}, path), "a pickle or an archive of them: give the folder"),
        (lambda path: path.write_bytes(pickle.dumps([1])), "a pickle or an archive of them: .* with --pickled if you trust"),
        (lambda path: path.write_text('\n{"model_type": "llama"}'), "a JSON file: give the folder that it belongs to"),
    ],
)
def test_other_files_are_named(tmp_path, write, what):
    write(tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match=f"model.bin is no llama2.c file but seems to be {what}"):
        _llama2c.read(tmp_path / "model.bin")


@pytest.mark.parametrize("width", [640, 896, 1152, 1408])
def test_a_width_that_begins_like_a_pickle_is_one(tmp_path, width):
    (tmp_path / "model.bin").write_bytes(struct.pack("<7i", width, 8, 1, 2, 2, 9, 4))
    with pytest.raises(CheckpointError, match=rf"has 28 bytes and its header \(dim {width}, .* asks for"):
        _llama2c.read(tmp_path / "model.bin")


@pytest.mark.parametrize(("version", "what"), [(2, "quantised to int8"), (3, "unknown here"), (-1, "unknown here")])
def test_other_versions_are_refused(tmp_path, version, what):
    path = tmp_path / "model.bin"
    path.write_bytes(struct.pack("<Ii", 0x616B3432, version).ljust(300, b"\0"))
    with pytest.raises(CheckpointError, match=f"of version {version}, which is {what}: give a float32 file"):
        _llama2c.read(path)


@pytest.mark.parametrize(("content", "length"), [(b"", 28), (b"\1\0\0", 28), (struct.pack("<Ii", 0x616B3432, 1), 256)])
def test_a_file_too_short_for_a_header(tmp_path, content, length):
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"has {len(content)} bytes and a llama2.c header has {length}"):
        _llama2c.read(path)


def test_no_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent.bin cannot be read \(No such file or directory\): check the path"):
        _llama2c.read(tmp_path / "absent.bin")


def test_a_file_that_shrinks_under_the_reader(tmp_path, monkeypatch):
    path = _file(tmp_path / "model.bin", _weights(tied=True))
    parts = _llama2c._parts

    def shrink(*args):
        size = path.stat().st_size
        monkeypatch.setattr(type(path), "stat", lambda self, **_: type("Stat", (), {"st_size": size})())
        path.write_bytes(path.read_bytes()[:100])
        return parts(*args)

    monkeypatch.setattr(_llama2c, "_parts", shrink)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        _llama2c.read(path)


@pytest.mark.shared
def test_stories260k_tells_the_published_story(shared):
    folder = shared / "data/weights/stories260K"
    model = _transformers(folder / "stories260K.bin")
    tokenizer = Tokenizer.from_str(llama2c.read(folder / "tok512.bin", model.config.vocab_size))
    ids = [1]
    with torch.no_grad():
        for _ in range(256):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    expected = (folder / "expected_greedy.txt").read_text(encoding="utf-8")
    assert tokenizer.decode(ids).rstrip("\n") == expected.rstrip("\n")
