"""GGUF files against transformers' reader and llama.cpp itself (how to get it: tests/models/llamacpp.py)."""

import json
import math
import sys
import weakref
from functools import partial

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM

from athanor.core.errors import CheckpointError, ConfigError, MissingExtraError
from athanor.models import _gguf, _gguf_fields, _llama2c
from athanor.tokenizer import bpe, llama2c
from athanor.tokenizer.template import TEMPLATE
from tests.models import llamacpp

KINDS = ("f32", "f16", "bf16", "q8_0", "q4_0")
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "max_position_embeddings": 256,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = LLAMA3 | {"original_max_position_embeddings": 64, "rope_theta": 1000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1000.0}
LONG = {"rope_type": "longrope", "rope_theta": 1000.0}
LONG = LONG | {"short_factor": [1 + i / 32 for i in range(32)], "long_factor": [2 + i / 8 for i in range(32)]}
LOCAL = {"rope_type": "default", "rope_theta": 100.0}
PHI = partial(transformers.Phi3Config, **SHAPE, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 8, "pad_token_id": 0}
GEMMA3 = partial(transformers.Gemma3TextConfig, **SHAPE | {"num_hidden_layers": 7}, **GEMMA)
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 96, "head_dim": 64}

# Every architecture, with what distinguishes it.
CONFIGS = {
    "llama": partial(transformers.LlamaConfig, **SHAPE),
    "llama_tied_biases": partial(
        transformers.LlamaConfig, **SHAPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=96
    ),
    "mistral": partial(transformers.MistralConfig, **SHAPE, sliding_window=64),
    "qwen2": partial(transformers.Qwen2Config, **SHAPE),
    "qwen3": partial(transformers.Qwen3Config, **SHAPE, head_dim=128),
    "gemma2": partial(transformers.Gemma2Config, **SHAPE, **GEMMA),
    "gemma3": GEMMA3,
    "gpt2": partial(
        transformers.GPT2Config, vocab_size=320, n_embd=256, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
    "phi3": PHI,
    "mixtral": partial(transformers.MixtralConfig, **SHAPE, num_local_experts=4),
    "qwen3_moe": partial(transformers.Qwen3MoeConfig, **SHAPE, **MOE, num_experts=4, norm_topk_prob=True),
}
# Rotary settings and patterns of layers.
VARIANTS = {
    "llama3": partial(transformers.LlamaConfig, **SHAPE, rope_parameters=LLAMA3),
    "linear": partial(
        transformers.LlamaConfig, **SHAPE, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    ),
    "dynamic": partial(
        transformers.LlamaConfig, **SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0}
    ),
    "yarn": partial(transformers.LlamaConfig, **SHAPE, rope_parameters=YARN),
    "yarn_attention": partial(transformers.Qwen2Config, **SHAPE, rope_parameters=YARN | {"attention_factor": 1.5}),
    "partial_rotary": partial(PHI, rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}),
    "longrope_short": partial(PHI, rope_parameters=LONG, max_position_embeddings=1024, original_max_position_embeddings=256),
    "longrope_long": partial(PHI, rope_parameters=LONG, max_position_embeddings=1024, original_max_position_embeddings=256),
    "gemma3_global_linear": partial(
        GEMMA3,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
            "sliding_attention": LOCAL,
        },
    ),
    "gemma3_other_layers": partial(GEMMA3, layer_types=["full_attention", "sliding_attention"] * 3 + ["sliding_attention"]),
    "gemma3_no_windows": partial(GEMMA3, layer_types=["full_attention"] * 7),
    "gemma2_other_layers": partial(
        transformers.Gemma2Config, **SHAPE, **GEMMA, layer_types=["full_attention", "sliding_attention"]
    ),
}
# The same models without them.
PLAIN = {CONFIGS[name]().model_type: CONFIGS[name].keywords for name in ("llama", "qwen2", "phi3", "gemma2", "gemma3")}
# Bounds of the root mean square of the difference in logits, in units of the logits' standard deviation.
# f32: summation order. Elsewhere llama.cpp rounds the activations too: to 16 bits where the weights are, and to blocks of 8 bits
# where they are in blocks; the reference has the rounded weights only.
BOUNDS = {"f32": 1e-5, "f16": 2e-3, "bf16": 2e-2, "q8_0": 4e-2, "q4_0": 4e-2}
GELU_BOUND = 1e-3  # of f32 where ggml looks GELU up in a table of float16


def _random(config, seed=0):
    """A model of transformers with random weights in all places, biases and norms too."""
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    centre = 0.0 if "gemma" in config.model_type else 1.0
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(centre if "norm" in name or "ln_" in name else 0.0, 0.06 if p.dim() > 1 else 0.2, generator=generator)
            if name.endswith("bias"):
                p.sub_(p.mean())
    return model


def _saved(model, folder):
    """The config.json and the tensors that transformers writes."""
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def _round(model, kind):
    """Put the weights of `model` to the values that a file of `kind` has."""
    dtype = gguf.GGMLQuantizationType[kind.upper()]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2 or "wpe" in name or name.endswith("mlp.gate.weight"):
                continue
            turned = model.config.model_type == "gpt2" and ".h." in name
            values = (p.T if turned else p).contiguous()
            raw = gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), dtype), dtype)
            values = torch.from_numpy(np.array(raw)).view(values.shape)
            p.copy_(values.T if turned else values)


def _logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def _ids(count, vocab_size=320):
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(5)).tolist()


def _distance(found, expected):
    """Root mean square of the difference, in units of the expected values' spread."""
    assert found.shape == expected.shape
    return float(np.sqrt(np.mean((found - expected) ** 2)) / expected.std())


# --- transformers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "mixtral"])  # its reader has no experts for llama
def test_transformers_reads_the_same_weights(tmp_path, name, kind):
    model = _random(CONFIGS[name]())
    fields, tensors = _saved(model, tmp_path)
    assert _gguf.write(tmp_path / "model.gguf", fields, tensors.items(), None, kind) == _notes(name)
    # Its reader takes the shape from the file for these; for the others it does not know all of the file's keys.
    whole = name in ("llama", "mistral", "qwen2", "qwen3")
    given = {} if whole else {"config": model.config}
    if name == "llama_tied_biases":
        given = {"config": model.config}
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", **given).eval()
    _round(model, kind)
    ids = _ids(40)
    np.testing.assert_allclose(_logits(read, ids), _logits(model, ids), rtol=0, atol=1e-5)


def _notes(name):
    if name != "mistral":
        return ()
    note = (
        "llama.cpp has no sliding window for mistral: within 64 tokens it computes the same, so the file's context_length is 64"
    )
    return (note + " instead of 256",)


# --- llama.cpp


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_llamacpp_computes_the_same_logits(tmp_path, name, kind):
    # Rounded activations move a token to other experts now and then, which no bound could tell from a mistake: in blocks, all
    # experts are used.
    experts = {"num_experts_per_tok": 4} if kind in ("q8_0", "q4_0") and name in ("mixtral", "qwen3_moe") else {}
    model = _random(CONFIGS[name](**experts))
    fields, tensors = _saved(model, tmp_path)
    _gguf.write(tmp_path / "model.gguf", fields, tensors.items(), None, kind)
    _round(model, kind)
    ids = _ids(40)
    with llamacpp.load(tmp_path / "model.gguf") as loaded:
        distance = _distance(loaded.logits(ids), _logits(model, ids))
    assert distance <= (GELU_BOUND if kind == "f32" and name.startswith(("gpt2", "gemma")) else BOUNDS[kind])


@pytest.mark.parametrize("name", VARIANTS)
def test_llamacpp_turns_and_sees_the_same(tmp_path, name):
    model = _random(VARIANTS[name]())
    fields, tensors = _saved(model, tmp_path)
    _gguf.write(tmp_path / "model.gguf", fields, tensors.items(), None, "f32")
    # llama.cpp goes by the context's size, a multiple of 256, where transformers goes by the text's length.
    ids, size = (_ids(300), 512) if name == "longrope_long" else (_ids(200), 256)
    expected = _logits(model, ids)
    with llamacpp.load(tmp_path / "model.gguf") as loaded:
        distance = _distance(loaded.logits(ids, size), expected)
    assert distance <= (GELU_BOUND if name.startswith("gemma") else BOUNDS["f32"])
    plain = _random(VARIANTS[name].func(**PLAIN[model.config.model_type]))
    assert name == "dynamic" or _distance(_logits(plain, ids), expected) > 0.01  # what is tested makes a difference


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_permutation_llamacpp_differs_widely(tmp_path, monkeypatch, kind):
    model = _random(CONFIGS["llama"]())
    fields, tensors = _saved(model, tmp_path)
    monkeypatch.setattr(_gguf, "to_neighbours", lambda name, weight, n_heads: weight)
    _gguf.write(tmp_path / "model.gguf", fields, tensors.items(), None, kind)
    _round(model, kind)
    ids = _ids(40)
    with llamacpp.load(tmp_path / "model.gguf") as loaded:
        assert _distance(loaded.logits(ids), _logits(model, ids)) > 0.5


@pytest.mark.shared
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_llamacpp_tells_the_published_story(tmp_path, shared, kind):
    folder = shared / "data/weights/stories260K"
    fields, tensors = _llama2c.read(folder / "stories260K.bin")
    (tmp_path / "tokenizer.json").write_text(llama2c.read(folder / "tok512.bin", fields["vocab_size"]), encoding="utf-8")
    assert _gguf.write(tmp_path / "model.gguf", fields, tensors.items(), tmp_path, kind) == ()
    expected = (folder / "expected_greedy.txt").read_text(encoding="utf-8").rstrip("\n")
    with llamacpp.load(tmp_path / "model.gguf") as loaded:
        ids = loaded.greedy([loaded.bos], 256)
        assert loaded.decode(ids).rstrip("\n").removeprefix(" ") == expected
        inner = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        for text in (expected, "Zoë said: “Hi!” 🔥\n\tTim  ran."):
            assert loaded.encode(text) == inner.encode(text, add_special_tokens=False).ids


# --- Vocabulary

QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = ("Don't stop: 12345 + 67 = x!\n\n  def f():\treturn 'we'll'", "naïve café 你好，世界 🔥 \r\n end  ", "the " * 9)


def _byte_level(folder, pre_tokenizer, normalizer=None):
    """A tokenizer.json of byte-level BPE with the special tokens <pad>, <s>, </s> and the ordinary one <tool>."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder, inner.normalizer = pre_tokenizer, decoders.ByteLevel(), normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(list(TEXTS) * 3, trainer)
    inner.add_tokens(["<tool>"])
    inner.save(str(folder / "tokenizer.json"))
    return inner


def _split(pattern):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _write_with(folder, **fields):
    """A file with the tokenizer in `folder`; its notes."""
    model = _random(transformers.LlamaConfig(**SHAPE | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64}))
    own, tensors = _saved(model, folder)
    return _gguf.write(folder / "model.gguf", own | fields, tensors.items(), folder, "f32")


def _strings(path, key):
    value = gguf.GGUFReader(path).get_field(key)
    return value and value.contents()


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (_split(QWEN2), "qwen2"),
        (_split(QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), "llama-bpe"),
    ],
)
def test_llamacpp_splits_as_the_known_patterns_do(tmp_path, pre_tokenizer, name):
    inner = _byte_level(tmp_path, pre_tokenizer)
    assert _write_with(tmp_path) == ()
    assert _strings(tmp_path / "model.gguf", "tokenizer.ggml.pre") == name
    with llamacpp.load(tmp_path / "model.gguf") as loaded:
        for text in TEXTS:
            assert loaded.encode(text) == inner.encode(text, add_special_tokens=False).ids
            assert loaded.decode(inner.encode(text).ids) == text
        assert loaded.encode("a<tool>b", special=True)[-2] == inner.token_to_id("<tool>")
        assert [loaded.is_control(i) for i in (0, 1, 2, 3, inner.token_to_id("<tool>"))] == [True, True, True, False, False]


def test_llamacpp_has_our_vocabulary_and_the_notes_say_where_it_splits_otherwise(tmp_path):
    text = "Don't they? We don't, they don't! "
    ours = bpe.Tokenizer.train([text * 9], 320)
    ours.save(tmp_path)
    (note,) = _write_with(tmp_path)
    assert note == (
        "llama.cpp has not this tokenizer's way to split text: 'qwen2', the nearest that it has, gives other tokens for some"
        " texts; the model's own logits need ids from the model's own tokenizer"
    )
    with llamacpp.load(tmp_path / "model.gguf") as loaded:
        assert loaded.vocab_size == 512  # the model's: the rest is unused
        assert (loaded.bos, loaded.eos, loaded.adds_bos) == (1, 2, False)
        assert all(loaded.is_control(i) == (i < 16) for i in range(ours.vocab_size))
        assert loaded.chat_template == TEMPLATE
        assert loaded.decode(ours.encode(text)) == text
        plain = "They 12 + 3, 你好\n"
        assert loaded.encode(plain) == ours.encode(plain)
        assert loaded.encode(text) != ours.encode(text)  # clitics are pieces of their own there
        assert loaded.encode("<|end|>", special=True) == [2]


def _byte_fallback(folder, prefix=True, bos=True):
    """A tokenizer.json as those made from SentencePiece, with a few merges."""
    pieces = ["\u2581", "a", "b", "c", "ab", "bc", "abc", "\u2581a", "\u2581ab"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [("b", "c"), ("a", "b"), ("a", "bc"), ("\u2581", "a"), ("\u2581", "ab"), ("\u2581a", "b")]
    vocabulary = {name: i for i, name in enumerate(names)}
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("\u2581")] * prefix + [normalizers.Replace(" ", "\u2581")]
    inner.normalizer = normalizers.Sequence(steps)
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names[:3]])
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.save(str(folder / "tokenizer.json"))
    return inner


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_llamacpp_merges_by_scores_what_the_tokenizer_merges_by_rank(tmp_path, prefix, bos):
    inner = _byte_fallback(tmp_path, prefix, bos)
    assert _write_with(tmp_path, bos_token_id=1, eos_token_id=2) == ()
    with llamacpp.load(tmp_path / "model.gguf") as loaded:
        assert (loaded.bos, loaded.eos, loaded.adds_bos) == (1, 2, bos)
        for text in ("abc", "ab abc  cab", "aabbcc é🔥 bca\n"):
            assert loaded.encode(text) == inner.encode(text, add_special_tokens=False).ids
            assert loaded.encode(text, special=True) == inner.encode(text).ids


def test_a_file_without_a_tokenizer_has_ids_only(tmp_path):
    model = _random(CONFIGS["llama"]())
    fields, tensors = _saved(model, tmp_path)
    assert _gguf.write(tmp_path / "model.gguf", fields, tensors.items(), None, "f16") == ()
    assert _strings(tmp_path / "model.gguf", "tokenizer.ggml.model") == "no_vocab"
    assert _strings(tmp_path / "model.gguf", "llama.vocab_size") == 320
    assert _strings(tmp_path / "model.gguf", "tokenizer.ggml.tokens") is None


def test_names_of_special_tokens_go_before_ids_of_config_json_and_templates_may_be_files(tmp_path):
    _byte_level(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=False))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert _write_with(tmp_path, bos_token_id=7, eos_token_id=[8, 9], pad_token_id=0) == ()
    read = partial(_strings, tmp_path / "model.gguf")
    assert [read(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")] == [1, 2, 0]
    assert read("tokenizer.chat_template") == "{{ messages }}"


def test_notes_of_several_ends_and_of_a_normalizer(tmp_path):
    _byte_level(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC())
    assert _write_with(tmp_path, eos_token_id=[2, 1]) == (
        "the tokenizer normalises text (NFC) and llama.cpp does not",
        "eos_token_id has several ids and a GGUF file one, 2: llama.cpp may not stop at the others",
    )


def _wordpiece(folder):
    Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))


def _no_merges(folder):
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.save(str(folder / "tokenizer.json"))


def _too_many(folder):
    inner = _byte_level(folder, pre_tokenizers.ByteLevel())
    inner.add_tokens([f"<extra{i}>" for i in range(512)])
    inner.save(str(folder / "tokenizer.json"))


def _bad_config(folder):
    _byte_level(folder, pre_tokenizers.ByteLevel())
    (folder / "tokenizer_config.json").write_text("[]")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "tokenizer.json cannot be read"),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{}"),
            r"tokenizer.json is not a tokenizer \(.*\): copy it again, or",
        ),
        (_wordpiece, "is of kind WordPiece, and GGUF files have byte-level or byte-fallback BPE: write the file without"),
        (_no_merges, "has no merges, and llama.cpp refuses such a vocabulary: write the file without"),
        (
            _too_many,
            r"has the token id \d+ and the model's vocab_size is 512: give the tokenizer that the model was trained with",
        ),
        (_bad_config, "tokenizer_config.json is not a JSON object: copy it again, or write the file without"),
    ],
)
def test_tokenizers_that_are_refused(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        _write_with(tmp_path)


# --- Numbers and tensors


@given(heads=st.integers(1, 5), half=st.integers(1, 6), width=st.integers(0, 3))
def test_the_permutation_undoes_that_of_llama2c(heads, half, width):
    shape = (heads * half * 2, width) if width else (heads * half * 2,)
    weight = torch.arange(math.prod(shape)).view(shape)
    moved = _gguf.to_neighbours("q", weight, heads)
    if width:
        assert torch.equal(_llama2c._halves(moved, 2 * half), weight)
    rows = [head * 2 * half + i for head in range(heads) for pair in range(half) for i in (pair, pair + half)]
    assert torch.equal(moved, weight[rows])
    if half <= 2:  # a square table of pairs is transposed twice
        assert torch.equal(_gguf.to_neighbours("q", moved, heads), weight)


TINY = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}


def _tiny(dtype=torch.float32, **fields):
    """config.json and tensors of a small model, without transformers' help."""
    values = TINY | fields
    width, inner = values["hidden_size"], values["intermediate_size"]
    shapes = {"model.embed_tokens.weight": (40, width), "model.norm.weight": (width,)}
    for layer in range(2):
        block = f"model.layers.{layer}."
        shapes |= {block + f"self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {block + f"{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        if values["model_type"] == "mixtral":
            shapes[block + "block_sparse_moe.gate.weight"] = (2, width)
            for expert in range(2):
                name = block + f"block_sparse_moe.experts.{expert}."
                shapes |= {
                    name + "w1.weight": (inner, width),
                    name + "w2.weight": (width, inner),
                    name + "w3.weight": (inner, width),
                }
        else:
            shapes |= {block + f"mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
            shapes[block + "mlp.down_proj.weight"] = (width, inner)
    generator = torch.Generator().manual_seed(3)
    return values, {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def _read(path):
    reader = gguf.GGUFReader(path)
    return {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_whole_blocks_is_f16_and_a_note_says_so(tmp_path, kind):
    fields, tensors = _tiny()
    notes = _gguf.write(tmp_path / "model.gguf", fields, tensors.items(), None, kind)
    types = {name: tensor.tensor_type.name for name, tensor in _read(tmp_path / "model.gguf").items()}
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == kind.upper()
    blocks = kind in ("q8_0", "q4_0")
    assert types["blk.0.ffn_down.weight"] == ("F16" if blocks else kind.upper())  # rows of 48
    shown = "blk.0.ffn_down.weight, blk.1.ffn_down.weight"
    assert notes == ((f"{shown}: f16 instead of {kind}, because their rows are no multiple of 32",) if blocks else ())
    assert _strings(tmp_path / "model.gguf", "general.file_type") == {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}[kind]


def test_a_long_list_in_a_note_is_cut(tmp_path):
    fields, tensors = _tiny(hidden_size=48)
    (note,) = _gguf.write(tmp_path / "model.gguf", fields, tensors.items(), None, "q8_0")
    assert note.startswith("token_embd.weight, ") and " and 12 more: f16 instead of q8_0" in note


def test_every_dtype_is_read_and_tables_and_tied_heads_are_passed_over(tmp_path):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        fields, tensors = _tiny(dtype)
        extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16), "lm_head.weight": torch.zeros(40, 64)}
        _gguf.write(tmp_path / "model.gguf", fields, (tensors | extra).items(), None, "f32")
        read = _read(tmp_path / "model.gguf")
        np.testing.assert_array_equal(read["token_embd.weight"].data, tensors["model.embed_tokens.weight"].float().numpy())
        assert len(read) == len(tensors)


def test_experts_come_in_any_order(tmp_path):
    fields, tensors = _tiny(model_type="mixtral", num_local_experts=2, num_experts_per_tok=1)
    _gguf.write(tmp_path / "model.gguf", fields, reversed(tensors.items()), None, "f32")
    found = _read(tmp_path / "model.gguf")["blk.1.ffn_down_exps.weight"].data
    own = [tensors[f"model.layers.1.block_sparse_moe.experts.{i}.w2.weight"] for i in range(2)]
    np.testing.assert_array_equal(found, torch.stack(own).numpy())


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    fields, tensors = _tiny(model_type="mixtral", num_local_experts=2, num_experts_per_tok=1)
    given = []

    def stream():
        for name, tensor in tensors.items():
            assert sum(past() is not None for past in given) <= 1  # the one before, which the loop still names
            copy = tensor.clone()
            given.append(weakref.ref(copy))
            yield name, copy
            del copy

    _gguf.write(tmp_path / "model.gguf", fields, stream(), None, "f32")


def test_a_failed_export_leaves_the_old_file_and_nothing_else(tmp_path):
    fields, tensors = _tiny()
    path = tmp_path / "model.gguf"
    path.write_text("old")

    def stream():
        yield next(iter(tensors.items()))
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        _gguf.write(path, fields, stream(), None, "f32")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# --- Errors


def _changed(**tensors):
    """A change of the small model's tensors: None takes one away."""

    def change(old):
        names = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        return {name: tensor for name, tensor in (old | names).items() if tensor is not None}

    return change


Q = "model__layers__0__self_attn__q_proj__weight"
W1 = "model__layers__{}__block_sparse_moe__experts__{}__w1__weight"
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}


@pytest.mark.parametrize(
    ("fields", "change", "kind", "message"),
    [
        (
            {},
            _changed(adapter__weight=torch.ones(2)),
            "f32",
            "tensor 'adapter.weight' has no place in a GGUF file of llama with 2",
        ),
        (
            {},
            _changed(model__layers__2__mlp__up_proj__weight=torch.ones(2)),
            "f32",
            "has no place in a GGUF file of llama with 2",
        ),
        (
            {},
            _changed(**{Q: torch.ones(64, 64, dtype=torch.int8)}),
            "f32",
            "is of torch.int8 and must be floating: write the unq",
        ),
        (
            {},
            _changed(transformer__wte__weight=torch.ones(40, 64)),
            "f32",
            "tensors 'model.embed_tokens.weight' and 'transformer.wte",
        ),
        ({}, _changed(**{Q: torch.ones(63, 64)}), "f32", "q_proj.weight' has 63 rows, which are not 2 heads of even width"),
        ({}, _changed(model__embed_tokens__weight=torch.ones(39, 64)), "f32", "has 39 rows and vocab_size is 40: copy"),
        (
            {},
            _changed(**{Q: torch.full((64, 64), 7e4)}),
            "f16",
            "q_proj.weight' holds up to 70000 and f16 ends at 65504: use f32",
        ),
        ({}, _changed(**{Q: torch.full((64, 64), 1e6)}), "q4_0", "holds up to 1e\\+06 and q4_0 ends at 524032: use f32"),
        ({}, _changed(**{Q: torch.full((64, 64), 1e7)}), "q8_0", "holds up to 1e\\+07 and q8_0 ends at 8.31901e\\+06: use f32"),
        ({}, _changed(**{Q: torch.full((64, 64), float("nan"))}), "f32", "q_proj.weight' holds nan: its training went wrong"),
        ({}, _changed(**{Q: torch.full((64, 64), float("inf"))}), "f32", "q_proj.weight' holds inf: its training went wrong"),
        ({}, _changed(**{Q: None}), "f32", r"no tensor for blk.0.attn_q.weight \(GGUF names\): copy"),
        ({}, _changed(model__norm__weight=None), "f32", r"no tensor for output_norm.weight \(GGUF names\)"),
        ({"tie_word_embeddings": False}, _changed(), "f32", r"no tensor for output.weight \(GGUF names\)"),
        ({}, lambda tensors: {}, "f32", r"no tensor for token_embd.weight, output_norm.weight \(GGUF names\)"),
        (
            {"tie_word_embeddings": False},
            _changed(**{Q: None, Q.replace("q_", "k_"): None, "model__norm__weight": None}),
            "f32",
            "1 more",
        ),
        (MIXTRAL, _changed(**{W1.format(1, 0): None}), "f32", "no tensor for expert 0 of blk.1.ffn_gate_exps.weight"),
        (MIXTRAL, _changed(**{W1.format(1, 2): torch.ones(48, 64)}), "f32", "is of expert 2 and there are 2: copy"),
        (
            MIXTRAL,
            _changed(**{W1.format(1, 1): torch.ones(47, 64)}),
            "f32",
            "experts '.*0.w1.weight' and '.*1.w1.weight' have different",
        ),
    ],
)
def test_tensors_that_are_refused(tmp_path, fields, change, kind, message):
    values, tensors = _tiny(**fields)
    with pytest.raises(CheckpointError, match=message):
        _gguf.write(tmp_path / "model.gguf", values, change(tensors).items(), None, kind)
    assert list(tmp_path.iterdir()) == []


GEMMA2 = {"model_type": "gemma2", "query_pre_attn_scalar": 32, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
QWEN_MOE = {"model_type": "qwen3_moe", "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
PHI3 = {"model_type": "phi3", "original_max_position_embeddings": 8}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "bert"},
            r"model_type 'bert' has no GGUF form here; there are llama, mistral, .*, gpt2: export it with --to hf$",
        ),
        ({"model_type": "qwen"}, r"model_type 'qwen' has no GGUF form here; .*; did you mean 'qwen3'\?"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', which is not supported for llama as GGUF"),
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, "hidden_activation is 'gelu', which is not supported for gemma2"),
        ({"model_type": "gpt2", "activation_function": "gelu"}, "activation_function is 'gelu', which is not supported for gpt2"),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights is False, which is not supported for gpt2"),
        (
            {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is True, which is not",
        ),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is True, which is not supported for qwen3 as GGUF"),
        ({"hidden_size": None}, "config.json lacks 'hidden_size', which a llama as GGUF needs"),
        (
            {"model_type": "qwen2", "head_dim": 16},
            r"head_dim is 16, and a qwen2 as GGUF has heads of hidden_size .* = 64 / 2: llama",
        ),
        (GEMMA2 | {"tie_word_embeddings": False}, "tie_word_embeddings is false, and a gemma2 as GGUF is tied: llama.cpp cannot"),
        (
            GEMMA2 | {"query_pre_attn_scalar": 30},
            r"query_pre_attn_scalar is 30, .* a gemma2 with 2 layers by 1/sqrt\(32\): llama.cpp",
        ),
        (
            GEMMA2 | {"final_logit_softcapping": None},
            "attn_logit_softcapping is 50.0 and final_logit_softcapping None, and a gemma2",
        ),
        (
            GEMMA2 | {"layer_types": ["full_attention"] * 2},
            "layer_types has no sliding_attention, and a gemma2 as GGUF has: llama.cpp",
        ),
        (
            GEMMA2 | {"use_bidirectional_attention": True},
            "use_bidirectional_attention is True, which is not supported for gemma2",
        ),
        (
            GEMMA2 | {"model_type": "gemma3_text"},
            "attn_logit_softcapping is 50.0, which is not supported for gemma3_text as GGUF",
        ),
        (
            QWEN_MOE,
            "llama.cpp normalises the gates: llama.cpp cannot run this model as it is; export it with --to hf",
        ),
        (
            QWEN_MOE | {"norm_topk_prob": True, "mlp_only_layers": [1]},
            "mlp_only_layers or decoder_sparse_step makes layers without",
        ),
        (
            QWEN_MOE | {"norm_topk_prob": True, "decoder_sparse_step": 2},
            "mlp_only_layers or decoder_sparse_step makes layers without",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5, and a llama as GGUF has 1: llama.cpp",
        ),
        ({"rope_parameters": LONG}, "rope_type is 'longrope', which a llama as GGUF has not: llama.cpp cannot run this model"),
        ({"model_type": "qwen2", "rope_parameters": LLAMA3}, "rope_type is 'llama3', which a qwen2 as GGUF has not: llama.cpp"),
        ({"rope_parameters": YARN | {"beta_fast": 8}}, "beta_fast is 8, which is not supported for rope_type 'yarn'"),
        ({"rope_parameters": YARN | {"beta_slow": 2}}, "beta_slow is 2, which is not supported for rope_type 'yarn'"),
        ({"rope_parameters": YARN | {"truncate": False}}, "truncate is False, which is not supported for rope_type 'yarn'"),
        ({"rope_parameters": YARN | {"mscale": 0.7}}, "mscale is 0.7, which is not supported for rope_type 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "config.json lacks 'factor', which a rope_type 'linear' needs"),
        (
            PHI3 | {"rope_scaling": {"type": "su", "short_factor": [1], "long_factor": [1]}},
            r"long_factor must be 16 numbers and is \[1\]",
        ),
    ],
)
def test_models_that_llamacpp_would_compute_otherwise_are_refused(tmp_path, fields, message):
    with pytest.raises(CheckpointError, match=message):
        _gguf.write(tmp_path / "model.gguf", TINY | fields, [], None, "f32")


def test_an_unknown_kind(tmp_path):
    with pytest.raises(ConfigError, match=r"kind \('q8'\) must be one of f32, f16, bf16, q8_0, q4_0; did you mean 'q8_0'\?"):
        _gguf.write(tmp_path / "model.gguf", TINY, [], None, "q8")


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"package gguf, which is not installed: pip install 'athanor-lm\[gguf\]'"):
        _gguf.write(tmp_path / "model.gguf", TINY, [], None, "f32")


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"model_type": "mistral"}, 16),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mixtral"}, 16),
        ({"model_type": "phi3"}, 16),
        ({"model_type": "llama"}, None),
        ({"model_type": "qwen2", "use_sliding_window": False}, None),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, 16),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2}, None),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}, 16),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention"] * 2}, None),
    ],
)
def test_windows_that_llamacpp_lacks_shorten_the_context(fields, window):
    written = {}
    writer = _Recorder(written)
    values = TINY | {"sliding_window": 16, "num_local_experts": 2, "num_experts_per_tok": 1} | fields
    _, notes = _gguf_fields.describe(writer, values, _gguf_fields.form(values))
    assert written["add_context_length"] == (window or 32)
    name = values["model_type"]
    note = (
        f"llama.cpp has no sliding window for {name}: within 16 tokens it computes the same, so the file's context_length is 16"
    )
    assert notes == ([note + " instead of 32"] if window else [])


def test_a_mixtral_that_does_not_say_its_base_has_that_of_transformers():
    values = TINY | MIXTRAL
    assert "rope_theta" not in values and "rope_parameters" not in values
    _gguf_fields.describe(_Recorder(written := {}), values, _gguf_fields.form(values))
    assert written["add_rope_freq_base"] == 1_000_000.0


class _Recorder:
    """Stands for a writer: keeps what its methods are given."""

    def __init__(self, written):
        self._written = written

    def __getattr__(self, name):
        return lambda value: self._written.__setitem__(name, value)


def test_old_fields_say_what_new_fields_say():
    new = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}, "sliding_attention": LOCAL}
    old = {"rope_theta": 5e5, "rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    common = TINY | {"model_type": "gemma3_text", "query_pre_attn_scalar": 32, "head_dim": 32}
    seen = []
    for fields in (
        {"rope_parameters": new, "layer_types": ["sliding_attention", "full_attention"]},
        old | {"sliding_window_pattern": 2},
    ):
        _gguf_fields.describe(_Recorder(written := {}), common | fields, _gguf_fields.form(common))
        seen.append(written)
    assert seen[0] == seen[1]
    assert (seen[0]["add_rope_freq_base"], seen[0]["add_rope_freq_base_swa"]) == (5e5, 100.0)
    assert seen[0]["add_sliding_window_pattern"] == [True, False]


def test_notes_of_positions_that_are_scaled_otherwise():
    for fields, note in (
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type 'dynamic' is unscaled within 32 tokens, and llama.cpp never sc",
        ),
        (
            PHI3 | {"rope_scaling": {"type": "su", "short_factor": [1] * 16, "long_factor": [2] * 16}},
            "llama.cpp takes the long rotary factors when its context size is above 8, the model when the text is",
        ),
    ):
        values = TINY | fields
        _, (found,) = _gguf_fields.describe(_Recorder({}), values, _gguf_fields.form(values))
        assert found.startswith(note)
