"""Show what a model is made of and what it costs: parameters, FLOPs of a token, memory, and a picture of its layers.

    athanor inspect runs/first --picture layers.svg
    athanor inspect llama:llama-3-8b --context 8192
    athanor inspect deepseek_v3:deepseek-v3 --json

Weights are not read: a model of any size takes a second. `family:preset` means a published shape that no file is needed for.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from athanor.compress import formats
from athanor.core.errors import ConfigError, PluginError, nearest
from athanor.core.runs import resolve
from athanor.core.weights import open_weights
from athanor.models import io as models
from athanor.models._profile import Profile, profile
from athanor.models.base import LanguageModel, Quantised
from athanor.report import architecture, words

COMMAND = "inspect"
POSITIONAL = ("model",)


@dataclass(frozen=True)
class Config:
    model: str
    """A checkpoint folder, a run folder (its last checkpoint), or `family:preset` such as gpt2:gpt2-xl."""
    checkpoint: str | None = None
    """Which checkpoint of a run folder: base, sft, rl, int8, int4 ...; by default the run's own choice."""
    context: int | None = None
    """Tokens of a sequence, for attention and cache; the model's longest by default, 2048 at most."""
    picture: Path | None = None
    """File for the picture of the layers: .svg, .png or .pdf."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights, for memory; as in the files by default, float32 for `family:preset`."""
    pickled: bool = False
    """Whether to read pytorch_model.bin where there are no safetensors."""
    json: bool = False
    """Print the figures as JSON."""


def main(config: Config) -> None:
    name, model, stored = _model(config)
    if config.dtype:
        model = model.to(getattr(torch, config.dtype))
    if config.context is not None and not 1 <= config.context <= model.config.max_positions:
        raise ConfigError(f"context ({config.context}) must lie between 1 and {model.config.max_positions}, the longest it takes")
    found = profile(model, config.context)
    if config.picture:
        layers = f"{model.config.n_layers} layers" if model.config.n_layers > 1 else "1 layer"
        subtitle = f"{model.model_type}, {words.parameters(found.parameters)} parameters, {layers}, width {model.config.d_model}"
        architecture.draw(name, subtitle, found.parts, config.picture)
    if config.json:
        shape = {k: v for k, v in vars(model.config).items() if isinstance(v, (int, float, str, bool, type(None)))}
        print(
            json.dumps({"model": name, "family": model.model_type, "kind": model.kind, "config": shape} | asdict(found), indent=1)
        )
        return
    _show(name, model, found, stored)
    if config.picture:
        print(f"picture: {config.picture}")


def _model(config: Config) -> tuple[str, LanguageModel, int | None]:
    """Its name, the model, and bytes of its weights' files."""
    family, colon, preset = config.model.partition(":")
    if not colon or Path(config.model).exists():
        folder = resolve(Path(config.model), config.checkpoint)
        name = f"{folder.resolve().parent.name}/{folder.resolve().name}"
        model: LanguageModel = models.skeleton(folder, formats.prepare, pickled=config.pickled)
        return name, model, open_weights(folder, pickled=config.pickled).nbytes
    if config.checkpoint is not None:
        raise ConfigError(f"checkpoint ({config.checkpoint!r}) is of run folders, and {config.model} is a preset: leave it out")
    try:
        module = models.architecture(family)
    except PluginError as error:
        raise ConfigError(str(error)) from error
    presets = getattr(module, "PRESETS", {})
    if preset not in presets:
        raise ConfigError(f"{family} has no preset {preset!r}{nearest(preset, presets)}; it has {', '.join(presets) or 'none'}")
    return config.model, models.build(family, presets[preset]), None


def _show(name: str, model: LanguageModel, p: Profile, stored: int | None) -> None:
    table = Table(title=f"{name} ({model.model_type})")
    for column in ("part", "x", "parameters", "share", "FLOPs of a token", "made of"):
        table.add_column(column, overflow="fold", no_wrap=column in ("x", "parameters", "share"))
    for part in p.parts:
        inside = ", ".join(f"{n} {words.parameters(size)}" for n, size in part.inside)
        share = words.share(part.parameters / p.parameters)
        table.add_row(part.name, str(part.count), f"{part.parameters:,}", share, _flops(part.flops), inside)
    Console().print(table)
    for what, value in _lines(model, p, stored):
        print(f"{what:<24}{value}")


def _lines(model: LanguageModel, p: Profile, stored: int | None) -> list[tuple[str, Any]]:
    lines = [("parameters", f"{p.parameters:,}")]
    if p.active != p.parameters:
        lines.append(("active for a token", f"{p.active:,} ({words.share(p.active / p.parameters)})"))
    tokens = "a token of source and one of answer" if model.kind == "encoder_decoder" else "a token"
    dtypes = [f"int{m.bits}" for m in model.modules() if isinstance(m, Quantised)]
    dtypes += [str(x.dtype).removeprefix("torch.") for x in model.parameters()]
    files = "" if stored is None or stored == p.weights_bytes else f"; {words.size(stored)} in files"
    lines += [
        (f"FLOPs of {tokens}", ""),
        ("  forward", f"{_flops(p.flops_forward)} at a context of {p.context}"),
        ("  backward", _flops(p.flops_backward)),
        ("weights", f"{words.size(p.weights_bytes)} in {' and '.join(dict.fromkeys(dtypes))}{files}"),
    ]
    if p.cache_per_token:
        kept = f"{p.cache_per_token:,} bytes in float32, {p.cache_per_token // 2:,} in bfloat16"
        lines.append(("cache of a token", kept + (", of source and answer" if model.kind == "encoder_decoder" else "")))
    if p.cache_per_sequence:
        lines.append(("state of a sequence", f"{p.cache_per_sequence:,} bytes"))
    lines.append(
        ("memory to answer", f"{words.size(p.inference_bytes)}, a float32 cache of one context of {p.context} tokens included")
    )
    lines.append(("memory to train", f"{words.size(p.training_bytes)} in float32 with AdamW, and activations with the batch"))
    return lines


def _flops(value: float) -> str:
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}FLOP"
    return f"{value:.0f} FLOP"
