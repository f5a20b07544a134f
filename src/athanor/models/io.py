"""Models in and out: Hugging Face style folders (config.json, model.safetensors), strict in both directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from athanor.core import io, plugins
from athanor.core.errors import CheckpointError, PluginError
from athanor.models.base import CausalLM

WEIGHTS = "model.safetensors"
_SHOWN = 6  # names listed in an error before it says how many more there are


class Layout(Protocol):
    """How a file holds the tensors of a model, both under Hugging Face's names, where that is not as they are in memory."""

    def encode(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """From memory to the file. Constants (the same in every such file) come out on a device even when nothing else is."""
        ...

    def decode(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the file, after its names, shapes, kinds and constants were checked, to memory."""
        ...


def build(model_type: str, config: Any, *, seed: int | None = None) -> CausalLM:
    """A model of the architecture `model_type`; with `seed` its weights are initialised, without they are on no device yet."""
    module = plugins.require("models", model_type, "Model", "Config")
    if seed is None:
        with torch.device("meta"):
            model: CausalLM = module.Model(config)
        return model
    model = module.Model(config)
    model.initialise(torch.Generator().manual_seed(seed))
    return model


def save(model: CausalLM, folder: Path, extra: Mapping[str, Any] | None = None, layout: Layout | None = None) -> None:
    """Write config.json and model.safetensors into `folder`, in Hugging Face's names; `extra` joins config.json."""
    tensors = model.to_hf(model.state_dict())
    dtype = str(model.output_weight.dtype).removeprefix("torch.")
    if layout:
        tensors = layout.encode(tensors)
    io.save_tensors(folder / WEIGHTS, {k: v.contiguous() for k, v in tensors.items()}, {"format": "pt"})
    io.write_json(folder / "config.json", model.config.to_hf() | {"dtype": dtype} | dict(extra or {}))


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of config.json. Raises CheckpointError when there is none or it names no model type."""
    fields = io.read_json(folder / "config.json")
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise CheckpointError(f"{folder}/config.json has no 'model_type': it is not the config of a model")
    return fields


def load(folder: Path, prepare: Callable[[CausalLM, dict[str, Any]], Layout | None] | None = None) -> CausalLM:
    """The model in `folder`.

    Args:
        folder: with config.json and model.safetensors.
        prepare: called with the model (no weights yet) and the config fields, to exchange modules before weights are read;
            returns how the file holds them.

    Raises:
        CheckpointError: damaged files; tensors missing, unexpected, misshaped or not what they must be (each is listed);
            an unknown architecture.
    """
    fields = read_config(folder)
    try:
        module = plugins.require("models", fields["model_type"], "Model", "Config")
    except PluginError as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from error
    model = build(fields["model_type"], module.Config.from_hf(fields))
    layout = prepare(model, fields) if prepare else None
    tensors, expected = io.load_tensors(folder / WEIGHTS), model.to_hf(model.state_dict())
    if layout:
        expected = layout.encode(expected)
    _check(tensors, expected, folder)
    if layout:
        tensors = layout.decode(tensors)
    model.load_state_dict(model.from_hf(tensors), assign=True)
    assert not any(x.is_meta for x in (*model.parameters(), *model.buffers())), "a buffer that no file holds has no device"
    return model.eval()


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: Path) -> None:
    problems = []
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        problems.append("missing: " + _listed(missing))
    unexpected = sorted(tensors.keys() - expected.keys())
    if unexpected:
        problems.append("unexpected: " + _listed(unexpected))
    misshaped = [
        f"{k} is {tuple(tensors[k].shape)} and must be {tuple(expected[k].shape)}"
        for k in sorted(expected.keys() & tensors.keys())
        if tensors[k].shape != expected[k].shape
    ]
    if misshaped:
        problems.append("misshaped: " + _listed(misshaped))
    mistyped = [
        f"{k} is {tensors[k].dtype} and must be like {expected[k].dtype}"
        for k in sorted(expected.keys() & tensors.keys())
        if tensors[k].dtype != expected[k].dtype and not (tensors[k].is_floating_point() and expected[k].is_floating_point())
    ]
    if mistyped:
        problems.append("of the wrong kind: " + _listed(mistyped))
    for k in sorted(expected.keys() & tensors.keys()):
        if not expected[k].is_meta and tensors[k].shape == expected[k].shape and not torch.equal(tensors[k], expected[k]):
            problems.append(f"{k} says {tensors[k].tolist()} and must say {expected[k].tolist()}")
    if problems:
        raise CheckpointError(
            f"{folder / WEIGHTS} does not fit {folder / 'config.json'}: {'; '.join(problems)}."
            " Use the two files that were saved together."
        )


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
