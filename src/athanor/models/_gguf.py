"""Weights as a GGUF file, which llama.cpp runs (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

The container and the number formats are the package `gguf`'s. What is ours: which tensor goes where, and what must be done to
it, because llama.cpp turns other pairs of a head than Hugging Face, keeps the factors of Gemma's norms whole, has GPT-2's
matrices as [out, in] and the experts of a layer in one tensor.

Legend: D width, H heads of queries or of keys, K head width, E experts.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from torch import Tensor

from athanor.core import io
from athanor.core.errors import CheckpointError, ConfigError, MissingExtraError, nearest
from athanor.models import _gguf_fields, _gguf_vocab
from athanor.models._gguf_fields import Form, Shape

if TYPE_CHECKING:
    import gguf

Kind = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
# Largest magnitude by kind: a float16 holds 65504, and in a block's scale it stands for 127 or 8 steps.
_LARGEST: dict[Kind, float] = {"f32": float("inf"), "f16": 65504.0, "bf16": 3.3895e38, "q8_0": 65504.0 * 127, "q4_0": 65504.0 * 8}
_BLOCKS = ("q8_0", "q4_0")
_FILE_TYPES: dict[Kind, str] = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}
# Tables that follow from config.json, in old files.
_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|h\.\d+\.attn\.(bias|masked_bias))")
_EXPERT = re.compile(r"(?<=\.experts)\.(\d+)(?=\.)")
_AGAIN = "copy the model again, or save it anew"
_SHOWN = 3  # names in a note before it says how many more there are


def write(
    path: Path, fields: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]], tokenizer: Path | None, kind: Kind
) -> tuple[str, ...]:
    """Write a model as one GGUF file, atomically; return notes on what llama.cpp will do otherwise than the model.

    Matrices become `kind`: values of "f32", "f16" or "bf16", or blocks of 32 neighbours as "q8_0" (a float16 scale and 8 bits
    each) or "q4_0" (a scale and 4 bits each). Vectors, the router of a mixture of experts and learned positions stay float32,
    as llama.cpp has them; rows that are no multiple of 32 become float16 in the two block formats, and a note says so.

    One tensor is in memory at a time: converted ones wait in a nameless file beside `path`, so twice the file's size must be
    free on that disk for a while.

    Args:
        path: of the new file.
        fields: of a Hugging Face config.json.
        tensors: names and values as in Hugging Face's files, in any order; read once.
        tokenizer: folder with tokenizer.json and, if there is one, tokenizer_config.json; without it the file has no
            vocabulary and llama.cpp takes and gives token ids.
        kind: of the matrices.

    Raises:
        MissingExtraError: the package gguf is not installed.
        ConfigError: an unknown `kind`.
        CheckpointError: a model_type without a GGUF form; a field whose value llama.cpp does not compute; a tensor too many,
            too few, of the wrong shape or dtype, or with values that `kind` cannot hold; a tokenizer that it cannot have.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "GGUF files are written with the package gguf, which is not installed: pip install 'athanor-lm[gguf]'"
        ) from error
    if kind not in _LARGEST:
        raise ConfigError(f"kind ({kind!r}) must be one of {', '.join(_LARGEST)}{nearest(str(kind), _LARGEST)}")
    form = _gguf_fields.form(fields)
    with (
        io.atomic_file(Path(path)) as temporary,
        tempfile.TemporaryFile(dir=temporary.parent) as scratch,
        closing(gguf.GGUFWriter(temporary, form.arch)) as writer,
    ):
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
        if kind in _BLOCKS:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        shape, notes = _gguf_fields.describe(writer, fields, form)
        notes += _gguf_vocab.add(writer, fields, tokenizer, shape.vocab_size)
        converter = _Converter(writer, form, shape, kind, scratch)
        for name, tensor in tensors:
            converter.add(name, tensor.detach())
        notes += converter.finish()
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return tuple(notes)


def context(file: Path) -> int:
    """Tokens that a GGUF file says its model takes."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    return int(next(field for name, field in fields.items() if name.endswith(".context_length")).contents())


@dataclass(frozen=True)
class _Place:
    """A converted tensor in the scratch file.

    source  the tensor it was made of, or the first of them, for messages
    dtype   of its values
    array   dtype of the array that holds their bytes
    shape   of that array
    offset  of its first byte
    """

    source: str
    dtype: gguf.GGMLQuantizationType
    array: str
    shape: tuple[int, ...]
    offset: int


class _Converter:
    """Takes tensors under Hugging Face's names, one at a time, and hands them to `writer` in the end."""

    def __init__(self, writer: gguf.GGUFWriter, form: Form, shape: Shape, kind: Kind, scratch: IO[bytes]) -> None:
        import gguf

        self.writer, self.form, self.shape, self.kind, self.scratch = writer, form, shape, kind, scratch
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == form.arch)
        self.names = gguf.get_tensor_name_map(arch, shape.n_layers)
        self.places: dict[str, _Place] = {}
        self.experts: dict[str, set[int]] = {}  # those that are there, by tensor
        self.narrow: list[str] = []  # tensors whose rows are no multiple of a block

    def add(self, name: str, tensor: Tensor) -> None:
        """Convert one tensor."""
        if _BUFFERS.fullmatch(name) or (name == "lm_head.weight" and self.shape.tied):
            return
        target = self.names.get_name(_EXPERT.sub("", name), (".weight", ".bias"))
        if target is None:
            raise CheckpointError(
                f"tensor {name!r} has no place in a GGUF file of {self.form.arch} with {self.shape.n_layers} layers:"
                " write a plain model, with adapters merged and weights not quantised"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"tensor {name!r} is of {tensor.dtype} and must be floating: write the unquantised weights")
        expert = _EXPERT.search(name)
        index = int(expert[1]) if expert else None
        if index is None and target in self.places:
            raise CheckpointError(f"tensors {self.places[target].source!r} and {name!r} are both {target!r}: {_AGAIN}")
        values = self._arranged(name, target, tensor).float().cpu().contiguous()
        kind = self._kind(target, values)
        self._check(name, target, values, kind)
        self._put(name, target, values, kind, index)

    def _arranged(self, name: str, target: str, tensor: Tensor) -> Tensor:
        """The tensor as llama.cpp wants it."""
        if self.form.permuted and ".attn_q." in target:
            return to_neighbours(name, tensor, self.shape.n_heads)
        if self.form.permuted and ".attn_k." in target:
            return to_neighbours(name, tensor, self.shape.n_kv_heads)
        if self.form.centred and target.endswith("_norm.weight"):
            return tensor.float() + 1.0
        if self.form.transposed and target.startswith("blk.") and tensor.dim() == 2:
            return tensor.T
        return tensor

    def _kind(self, target: str, values: Tensor) -> Kind:
        if values.dim() < 2 or target == "position_embd.weight" or target.endswith("ffn_gate_inp.weight"):
            return "f32"
        if self.kind in _BLOCKS and values.shape[-1] % 32:
            self.narrow.append(target)
            return "f16"
        return self.kind

    def _check(self, name: str, target: str, values: Tensor, kind: Kind) -> None:
        if target in ("token_embd.weight", "output.weight") and len(values) != self.shape.vocab_size:
            raise CheckpointError(f"tensor {name!r} has {len(values)} rows and vocab_size is {self.shape.vocab_size}: {_AGAIN}")
        largest = values.abs().max().item() if values.numel() else 0.0
        if not largest < float("inf"):
            raise CheckpointError(f"tensor {name!r} holds {largest}: its training went wrong, take an older checkpoint")
        if largest > _LARGEST[kind]:
            raise CheckpointError(f"tensor {name!r} holds up to {largest:g} and {kind} ends at {_LARGEST[kind]:g}: use f32")

    def _put(self, name: str, target: str, values: Tensor, kind: Kind, index: int | None) -> None:
        """Convert `values` and write them to the scratch file: as `target`, or as the expert `index` in it."""
        import gguf

        if index is not None and index >= self.shape.n_experts:
            raise CheckpointError(f"tensor {name!r} is of expert {index} and there are {self.shape.n_experts}: {_AGAIN}")
        dtype = gguf.GGMLQuantizationType[kind.upper()]
        array = gguf.quants.quantize(values.numpy(), dtype)
        shape = array.shape if index is None else (self.shape.n_experts, *array.shape)
        end = self.scratch.seek(0, 2)
        place = self.places.setdefault(target, _Place(name, dtype, array.dtype.str, shape, end))
        if place.shape != shape:
            raise CheckpointError(f"experts {place.source!r} and {name!r} have different shapes: {_AGAIN}")
        if index is not None:
            self.experts.setdefault(target, set()).add(index)
            self.scratch.truncate(max(end, place.offset + array.nbytes * self.shape.n_experts))
        self.scratch.seek(place.offset + array.nbytes * (index or 0))
        self.scratch.write(array.data)

    def finish(self) -> list[str]:
        """Hand all tensors to the writer, which reads them from the scratch file one after the other; return notes."""
        import numpy as np

        self._check_complete()
        self.scratch.flush()
        for target, place in self.places.items():
            array = np.memmap(self.scratch, place.array, "r", place.offset, place.shape)
            self.writer.add_tensor(target, array, raw_dtype=place.dtype)
        for target, values in self.shape.extra.items():
            self.writer.add_tensor(target, np.array(values, dtype=np.float32))
        if not self.narrow:
            return []
        more = f" and {len(self.narrow) - _SHOWN} more" if len(self.narrow) > _SHOWN else ""
        shown = ", ".join(self.narrow[:_SHOWN])
        return [f"{shown}{more}: f16 instead of {self.kind}, because their rows are no multiple of 32"]

    def _check_complete(self) -> None:
        absent = [name for name in ("token_embd.weight", "output_norm.weight") if name not in self.places]
        absent += ["output.weight"] * (not self.shape.tied and "output.weight" not in self.places)
        blocks: list[set[str]] = [set() for _ in range(self.shape.n_layers)]
        for target in self.places:
            if target.startswith("blk."):
                _, layer, rest = target.split(".", 2)
                blocks[int(layer)].add(rest)
        for i, block in enumerate(blocks):
            absent += [f"blk.{i}.{name}" for name in sorted(set().union(*blocks) - block)]
        for target, there in self.experts.items():
            absent += [f"expert {i} of {target}" for i in range(self.shape.n_experts) if i not in there]
        if absent:
            more = f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
            raise CheckpointError(f"no tensor for {', '.join(absent[:_SHOWN])}{more} (GGUF names): {_AGAIN}")


def to_neighbours(name: str, weight: Tensor, n_heads: int) -> Tensor:
    """Rows (i, i + K/2) of each head, which Hugging Face turns together, to (2i, 2i+1), which llama.cpp does: [H*K, ...]."""
    if len(weight) % (2 * n_heads):
        raise CheckpointError(f"tensor {name!r} has {len(weight)} rows, which are not {n_heads} heads of even width: {_AGAIN}")
    return weight.view(n_heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
