"""Quantised models in files: the "pack-quantized" layout of compressed-tensors, which transformers and vLLM read.

A quantised matrix (N, K) is three tensors: `weight_packed`, its whole numbers plus 2^(bits - 1) laid into int32 from the lowest
bits up, along K; `weight_scale` (N, K / group) or (N, 1); `weight_shape` [N, K]. config.json says how, in `quantization_config`.
Floating tensors are bfloat16 in the file where that loses nothing; `dtype` in config.json says what they become in memory.

Sources: https://github.com/vllm-project/compressed-tensors (0.20), quantization/quant_config.py and compressors/pack_quantized.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athanor.compress import rtn
from athanor.compress.linear import QuantLinear
from athanor.core.errors import CheckpointError, ConfigError
from athanor.models.base import LanguageModel

_FIELD = "quantization_config"
_HEAD = "lm_head"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What must stand in the config for this file to compute the same, and what may stand there without a meaning for inference.
_MUST = {"quant_method": ("compressed-tensors",), "format": ("pack-quantized",), "quantization_status": ("compressed", "frozen")}
_MAY = ("version", "global_compression_ratio", "config_groups", "ignore")
_WEIGHTS_MUST = {
    "num_bits": rtn.BITS,
    "type": ("int",),
    "symmetric": (True,),
    "dynamic": (False, None),
    "strategy": ("channel", "group"),
    "actorder": (None, False, "weight", "static"),
}
_WEIGHTS_MAY = ("group_size", "observer", "observer_kwargs", "scale_dtype", "zp_dtype")


@dataclass(frozen=True)
class PackQuantized:
    """Between the tensors of a QuantLinear and those of a file, under Hugging Face's names.

    bits   of the whole numbers
    dtype  of everything in memory but codes and scales
    """

    bits: int
    dtype: torch.dtype

    def encode(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a model as the file holds them."""
        out = {}
        for name, tensor in tensors.items():
            module, _, leaf = name.rpartition(".")
            if leaf == "weight_int8":
                out[f"{module}.weight_packed"] = pack8(tensor)
                out[f"{module}.weight_shape"] = torch.tensor(tensor.shape, device="cpu")
            elif leaf == "weight_int4":  # holds the file's very bytes
                out[f"{module}.weight_packed"] = tensor.contiguous().view(torch.int32)
                out[f"{module}.weight_shape"] = torch.tensor((tensor.shape[0], 2 * tensor.shape[1]), device="cpu")
            else:
                narrow = tensor.to(torch.bfloat16)
                out[name] = narrow if tensor.is_meta or torch.equal(narrow.to(tensor.dtype), tensor) else tensor
        return out

    def decode(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a file, whose names and shapes are right, as a model holds them."""
        out = {}
        for name, tensor in tensors.items():
            module, _, leaf = name.rpartition(".")
            if leaf == "weight_packed":
                columns = int(tensors[f"{module}.weight_shape"][1])
                codes = unpack8(tensor, columns) if self.bits == 8 else tensor.view(torch.uint8)
                out[f"{module}.weight_int{self.bits}"] = codes
            elif leaf != "weight_shape":
                out[name] = tensor.to(torch.float32 if leaf == "weight_scale" else self.dtype)
        return out


def pack8(q: Tensor) -> Tensor:
    """int8 (N, K) -> int32 (N, ceil(K / 4)): bytes q + 128, the first column lowest, zeros after the last."""
    return F.pad(q.contiguous().view(torch.uint8) ^ 128, (0, -q.shape[1] % 4)).view(torch.int32)


def unpack8(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack8`."""
    return (packed.contiguous().view(torch.uint8)[:, :columns] ^ 128).view(torch.int8)


def layout(model: LanguageModel) -> PackQuantized | None:
    """How a file holds the model, or None when it is not quantised."""
    layer = next((m for m in model.modules() if isinstance(m, QuantLinear)), None)
    return None if layer is None else PackQuantized(layer.bits, model.output_weight.dtype)


def describe(model: LanguageModel) -> dict[str, Any]:
    """What joins config.json: nothing, or the `quantization_config` that other readers of compressed-tensors understand."""
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    if not layers:
        return {}
    plain = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    weights = {
        "num_bits": layers[0].bits,
        "type": "int",
        "symmetric": True,
        "dynamic": False,
        "strategy": "group" if layers[0].group else "channel",
        "group_size": layers[0].group,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        # Theirs has an output matrix even where it is tied to the embedding.
        "ignore": sorted({_HEAD, *(theirs for name in plain for theirs in _their_names(model, name))}),
    }
    return {_FIELD: config}


def prepare(model: LanguageModel, fields: Mapping[str, Any]) -> PackQuantized | None:
    """Exchange the matrices of a model without weights for what `quantization_config` says of them.

    Returns:
        how to read the file, or None when it is not quantised.

    Raises:
        CheckpointError: a `quantization_config` that is damaged, or of a method that this version does not compute.
    """
    if fields.get(_FIELD) is None:
        return None
    bits, group, ignored = _read(fields[_FIELD])
    name = fields.get("dtype", fields.get("torch_dtype"))
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise CheckpointError(f"config.json: dtype is {name!r} but must be one of {', '.join(_DTYPES)}: {_REMEDY}")
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear):
            continue
        theirs = _their_names(model, name)
        left_out = [their for their in theirs if any(_matches(their, pattern) for pattern in ignored)]
        inside = "blocks" in name.split(".")
        if (left_out and len(left_out) < len(theirs)) or (not left_out and not inside):
            raise CheckpointError(
                f"config.json: {_FIELD}.ignore leaves out {', '.join(left_out) or 'nothing'} of {', '.join(theirs)}, but"
                f" {'these are one matrix here' if inside else 'the output is never quantised here'}: {_REMEDY}"
            )
        if left_out:
            continue
        try:
            rtn.check_width(name, linear.in_features, bits, group)
        except ConfigError as error:
            raise CheckpointError(f"config.json: {_FIELD}: {error}") from error
        parent, _, leaf = name.rpartition(".")
        with torch.device("meta"):
            layer = QuantLinear(linear.in_features, linear.out_features, bits, group, bias=linear.bias is not None)
        setattr(model.get_submodule(parent), leaf, layer)
    return PackQuantized(bits, dtype)


_REMEDY = "copy the file again, or make the folder anew with `athanor quantize` from the model that was not quantised"


def _their_names(model: LanguageModel, module: str) -> list[str]:
    weight = model.get_submodule(module).get_parameter("weight")
    return [name.removesuffix(".weight") for name in model.to_hf({f"{module}.weight": weight})]


def _matches(name: str, pattern: str) -> bool:
    return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else name == pattern


def _read(config: Any) -> tuple[int, int | None, list[str]]:
    """bits, group and ignored modules of a `quantization_config`."""
    config = _table(_FIELD, config)
    _check_fields(_FIELD, config, _MUST, _MAY)
    groups = _table(f"{_FIELD}.config_groups", config.get("config_groups"))
    if len(groups) != 1:
        raise _wrong(f"{_FIELD}.config_groups", sorted(groups), "exactly one group")
    where = f"{_FIELD}.config_groups.{next(iter(groups))}"
    scheme = _table(where, next(iter(groups.values())))
    _check_fields(where, scheme, {"targets": (["Linear"],), "format": (None, "pack-quantized")}, ("weights",))
    weights = _table(f"{where}.weights", scheme.get("weights"))
    _check_fields(f"{where}.weights", weights, _WEIGHTS_MUST, _WEIGHTS_MAY)
    bits, group, by_group = weights["num_bits"], weights.get("group_size"), weights["strategy"] == "group"
    if by_group and (type(group) is not int or group not in rtn.GROUPS):
        raise _wrong(f"{where}.weights.group_size", group, "32, 64 or 128")
    if not by_group and (bits == 4 or group not in (None, -1)):
        raise _wrong(f"{where}.weights.strategy", "channel", "'group' for 4 bits or where there is a group_size")
    ignored = config.get("ignore") or []
    if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
        raise _wrong(f"{_FIELD}.ignore", ignored, "a list of names")
    for name in ignored:
        try:
            _matches("", name)
        except re.error as error:
            raise _wrong(f"{_FIELD}.ignore", name, f"a name or 're:' and a regular expression ({error})") from error
    return bits, group if by_group else None, ignored


def _check_fields(where: str, table: Mapping[str, Any], must: Mapping[str, tuple[Any, ...]], may: tuple[str, ...]) -> None:
    for field, allowed in must.items():
        value = table.get(field)
        if not any(value == one and type(value) is type(one) for one in allowed):  # 8.0 and True are no numbers of bits
            raise _wrong(f"{where}.{field}", value, " or ".join(map(repr, allowed)))
    for field, value in table.items():
        if field not in must and field not in may and value not in (None, {}, []):
            raise _wrong(f"{where}.{field}", value, "absent, since it means something that is not computed here")


def _table(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(where, value, "a table")
    return value


def _wrong(where: str, value: Any, rule: str) -> CheckpointError:
    return CheckpointError(f"config.json: {where} is {value!r} but must be {rule}: {_REMEDY}")
