"""Weights of llama2.c (https://github.com/karpathy/llama2.c): one file of float32 values, as a Hugging Face LLaMA.

Version 0 starts with seven int32; version 1 with a magic number and a header of 256 bytes. The layouts are those of its
`export.py`. The rotary tables of version 0 are passed over, as its own program does: the base is always 10000.

Legend: D width, F feed-forward width, L layers, H query heads, G key/value heads, K head width, V vocabulary, S positions.
"""

from __future__ import annotations

import math
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from athanor.core.errors import CheckpointError

_MAGIC = 0x616B3432  # "ak42"
_HEADER_1 = 256  # bytes
_REMEDY = "give a float32 file that llama2.c's export.py wrote (--version 0 or 1), whole"


@dataclass(frozen=True)
class _Shape:
    """What the header says; `tied`: the output embedding is the input embedding."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    def __str__(self) -> str:
        return f"({', '.join(f'{name} {value}' for name, value in asdict(self).items())})"


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The model in `path`: fields of a Hugging Face config.json, and its tensors under Hugging Face's names.

    llama2.c turns the pairs (2i, 2i+1) of a head by an angle, Hugging Face the pairs (i, i + K/2): rows of the query and key
    projections are put in that order.

    Raises:
        CheckpointError: no such file; a header that describes no model; a file not as long as its header says (checked
            before memory is taken); the int8 version 2, or an unknown one.
    """
    try:
        with path.open("rb") as file:
            version, shape = _read_header(file, path)
            start = file.tell()
            parts = _parts(version, shape)
            counts = [math.prod(sizes) * (shape.n_layers if "{}" in name else 1) for name, sizes in parts]
            needed, size = start + 4 * sum(counts), path.stat().st_size
            if needed != size:
                raise CheckpointError(f"{path} has {size} bytes and its header {shape} asks for {needed}: {_REMEDY}")
            tensors = _read_parts(file, parts, shape, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check the path") from error
    return _config(shape), tensors


def _read_header(file: BinaryIO, path: Path) -> tuple[int, _Shape]:
    """Version and shape; leaves `file` at the first weight."""
    head = file.read(_HEADER_1)
    other = _other(head)
    if other is not None:
        raise CheckpointError(f"{path} is no llama2.c file but seems to be {other}")
    version = 0
    if len(head) >= 8 and struct.unpack_from("<I", head)[0] == _MAGIC:
        version = struct.unpack_from("<i", head, 4)[0]
        if version != 1:
            what = "quantised to int8" if version == 2 else "unknown here"
            raise CheckpointError(f"{path} is a llama2.c file of version {version}, which is {what}: {_REMEDY}")
    length = _HEADER_1 if version else 28
    if len(head) < length:
        raise CheckpointError(f"{path} has {len(head)} bytes and a llama2.c header has {length}: {_REMEDY}")
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len = struct.unpack_from("<7i", head, 8 if version else 0)
    tied = head[36] != 0 if version else vocab_size > 0
    vocab_size = vocab_size if version else abs(vocab_size)  # version 0 marks an output embedding of its own by the sign
    shape = _Shape(dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len, tied)
    if min(dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len) < 1:
        raise CheckpointError(f"{path}: every number of its header {shape} must be at least 1: {_REMEDY}")
    if dim % n_heads or shape.head_dim % 2 or n_heads % n_kv_heads:
        raise CheckpointError(
            f"{path}: in its header {shape} n_heads must divide dim into heads of even width, and n_kv_heads n_heads: {_REMEDY}"
        )
    file.seek(length)
    return version, shape


def _other(head: bytes) -> str | None:
    """Which other file begins like that, and what to give instead; None for what may be a llama2.c file."""
    folder = "give the folder that it belongs to, which has the config.json"
    if head[8:10] == b'{"':
        return f"a safetensors file: {folder}"
    if b"\0" in head[:4]:  # a width of less than 2**24, such as 640, which begins like a pickle
        return None
    if head.startswith(b"GGUF"):
        return "a GGUF file, which is written here and not read: give the Hugging Face folder that it was made from"
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return f"a pickle or an archive of them: {folder}, with --pickled if you trust its source"
    if head.lstrip()[:1] in (b"{", b"["):
        return f"a JSON file: {folder}"
    return None


def _parts(version: int, shape: _Shape) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of the file's parts in their order; one with {} is there once per layer, a nameless one is passed over."""
    block, d = "model.layers.{}.", shape.dim
    kv = shape.n_kv_heads * shape.head_dim
    embedding = [("model.embed_tokens.weight", (shape.vocab_size, d))]
    norms_1, norms_2 = [(block + "input_layernorm.weight", (d,))], [(block + "post_attention_layernorm.weight", (d,))]
    attention = [
        (block + "self_attn.q_proj.weight", (d, d)),
        (block + "self_attn.k_proj.weight", (kv, d)),
        (block + "self_attn.v_proj.weight", (kv, d)),
        (block + "self_attn.o_proj.weight", (d, d)),
    ]
    feed_forward = [
        (block + "mlp.gate_proj.weight", (shape.hidden_dim, d)),
        (block + "mlp.down_proj.weight", (d, shape.hidden_dim)),
        (block + "mlp.up_proj.weight", (shape.hidden_dim, d)),
    ]
    norm = [("model.norm.weight", (d,))]
    head = [] if shape.tied else [("lm_head.weight", (shape.vocab_size, d))]
    if version == 1:
        return [*norms_1, *norms_2, *norm, *embedding, *attention, *feed_forward, *head]
    rotary = [("", (2, shape.seq_len, shape.head_dim // 2))]  # cosines, then sines
    return [*embedding, *norms_1, *attention, *norms_2, *feed_forward, *norm, *rotary, *head]


def _read_parts(file: BinaryIO, parts: list[tuple[str, tuple[int, ...]]], shape: _Shape, path: Path) -> dict[str, Tensor]:
    tensors = {}
    for name, sizes in parts:
        if not name:
            file.seek(4 * math.prod(sizes), 1)
            continue
        for layer in range(shape.n_layers if "{}" in name else 1):
            tensor = torch.empty(sizes, dtype=torch.float32, device="cpu")
            raw = tensor.view(-1).view(torch.uint8).numpy()
            if file.readinto(raw) != raw.nbytes:  # type: ignore[attr-defined]
                raise CheckpointError(f"{path} became shorter while it was read: {_REMEDY}")
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                tensor = _halves(tensor, shape.head_dim)
            tensors[name.format(layer)] = tensor
    return tensors


def _halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows (2i, 2i+1) of each head to rows (i, i + K/2): [heads*K, D] -> [heads*K, D]."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _config(shape: _Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.hidden_dim,
        "max_position_embeddings": shape.seq_len,
        "rope_theta": 10_000.0,
        "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
