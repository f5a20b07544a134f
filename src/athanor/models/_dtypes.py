"""Which dtype the weights of a file get in memory."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from athanor.core.errors import CheckpointError
from athanor.models.base import LanguageModel


def dtypes_of(
    model: LanguageModel, found: Mapping[str, torch.dtype], folder: Path, dtype: torch.dtype | None
) -> Callable[[str], torch.dtype]:  # fmt: skip
    """Of a tensor's name its dtype in memory: one for all that are multiplied with each other, as in transformers.

    Args:
        model: to be filled.
        found: dtypes in the file, by name.
        folder: for messages.
        dtype: that is asked for; None is the file's, of several the one that config.json names, else one that holds them all.

    Raises CheckpointError for float16 where the model leaves its range.
    """
    exact = re.compile("|".join(f"(?:{x})" for x in model.exact) or r"(?!)")
    chosen = dtype
    if chosen is None:
        kinds = {kind for name, kind in found.items() if not exact.fullmatch(name)}
        said = model.fields.get("dtype") or model.fields.get("torch_dtype")
        named = [kind for kind in kinds if str(kind) == f"torch.{said}"]
        chosen = named[0] if named else functools.reduce(torch.promote_types, kinds)
    if chosen == torch.float16 and not model.float16:
        raise CheckpointError(
            f"{folder}: the dtype is float16, whose range the numbers of a {model.model_type} leave: load it with"
            " dtype=torch.bfloat16 or torch.float32 (athanor import --dtype bfloat16)"
        )
    return lambda name: torch.promote_types(chosen, found[name]) if exact.fullmatch(name) else chosen
