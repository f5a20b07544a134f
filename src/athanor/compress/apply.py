"""Model -> quantised model, by name pattern, whatever the architecture."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from athanor.compress import rtn
from athanor.compress.linear import QuantLinear
from athanor.core.errors import ConfigError, nearest
from athanor.models.base import LanguageModel


def compress(model: LanguageModel, bits: int, group: int | None = None, skip: Iterable[str] = ()) -> LanguageModel:
    """A new model whose matrices inside the blocks are whole numbers; `model` stays as it is.

    Everything else (embeddings, output, norms, biases) is rounded to bfloat16, which changes bits per byte by less than
    1e-4 (docs/log.md) and halves it in a file; in memory it keeps its dtype, so float32 is computed in float32.

    Args:
        model: not quantised yet.
        bits: 8 or 4.
        group: columns that share a scale: 32, 64 or 128. None is 32 for 4 bits and one scale per row for 8.
        skip: patterns (as in file names: `blocks.0.*`) of matrices to leave out.

    Raises:
        ConfigError: a model that is no decoder; unknown bits or group; a group that does not divide the columns of a matrix;
            a pattern that matches nothing; nothing left to quantise; weights that are not finite; a model that is quantised
            already.
    """
    group, skip = rtn.check(bits, group), tuple(skip)
    if model.kind != "decoder":
        raise ConfigError(f"this {model.model_type} is of the kind {model.kind!r}, and only decoders are quantised: take one")
    done = next((m for m in model.modules() if isinstance(m, QuantLinear)), None)
    if done is not None:
        raise ConfigError(f"the model is quantised to {done.bits} bits already: start from the checkpoint that it was made from")
    inside = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks" in name.split(".")}
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in inside):
            raise ConfigError(
                f"skip pattern {pattern!r} matches no matrix{nearest(pattern, inside)}; there are {', '.join(inside) or 'none'}"
            )
    chosen = {name: m for name, m in inside.items() if not any(fnmatchcase(name, pattern) for pattern in skip)}
    if not chosen:
        raise ConfigError(f"nothing is left to quantise: skip ({', '.join(skip)}) leaves out every matrix; name fewer")
    for name, linear in chosen.items():
        rtn.check_width(name, linear.in_features, bits, group)
    # The memo keeps deepcopy from copying weights that are about to be replaced.
    small = copy.deepcopy(model, {id(m.weight): m.weight for m in chosen.values()})
    for name in chosen:
        parent, _, leaf = name.rpartition(".")
        home = small.get_submodule(parent)
        setattr(home, leaf, QuantLinear.of(getattr(home, leaf), bits, group))
    with torch.no_grad():
        for p in small.parameters():
            p.copy_(p.bfloat16())
    return small


def weight_error(model: LanguageModel, small: LanguageModel) -> tuple[float, float]:
    """Largest and mean |w - q scale| over all quantised weights of `small`, which was made from `model`."""
    largest, total, count = 0.0, 0.0, 0
    for name, layer in small.named_modules():
        if isinstance(layer, QuantLinear):
            weight = model.get_submodule(name).get_parameter("weight").detach()
            error = (weight.float() - layer.dequantised()).abs_()
            largest, total, count = max(largest, float(error.max())), total + float(error.sum()), count + error.numel()
    return largest, total / count
