"""Quantise a language model into a folder, and prove the folder (law L7)."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from athanor.compress import formats
from athanor.compress.apply import compress, weight_error
from athanor.core import io
from athanor.core.errors import AthanorError, ConfigError, VerificationError
from athanor.models.base import LanguageModel

_TOLERANCE = 1e-5  # of logits, between the model in memory and the one read back
_PROBE = (2, 64)  # sequences and tokens that are compared


class Loaded(Protocol):
    """What this asks of an `athanor.lm.LM`."""

    model: LanguageModel
    path: Path | None

    def logits(self, ids: Tensor, /) -> Tensor:
        """(B, T) -> (B, T, V)."""
        ...

    def save(self, path: Path, **lineage: Any) -> Path:
        """Write a folder."""
        ...


Whole = TypeVar("Whole", bound=Loaded)


def run(lm: Whole, bits: int, group: int | None, out: Path, parent: str | None, load: Callable[[Path], Whole]) -> dict[str, Any]:
    """Quantise `lm`, save it to `out` and read it back.

    Args:
        lm: the model with its tokenizer; stays as it is.
        bits: 8 or 4.
        group: see `compress.apply.compress`.
        out: new folder, or that of a quantised model, which is replaced.
        parent: name of the checkpoint that `lm` is, for the lineage.
        load: reads such a folder (`athanor.load`).

    Returns:
        bits, group, parent, bytes_before and bytes_after (of all weights in a file), max_error and mean_error (|w - q scale|
        over quantised weights), logit_difference (between the model in memory and the one read back).

    Raises:
        ConfigError: what cannot be quantised so; an `out` that is something else and would be lost.
        VerificationError: the folder does not give the same logits; it is removed.
    """
    _check_replaceable(out, lm.path)
    small = copy.copy(lm)
    small.model = compress(lm.model, bits, group)
    layer = formats.describe(small.model)["quantization_config"]["config_groups"]["group_0"]["weights"]
    how = {"bits": bits, "group": layer["group_size"]}
    small.save(out, parent=parent, quantisation=how)
    difference = _difference(small, out, load)
    if not difference <= _TOLERANCE:
        shutil.rmtree(out)
        raise VerificationError(
            f"{out} read back gives logits that differ by {difference:.1e} from those of the model it was saved from, and only"
            f" {_TOLERANCE:.0e} is allowed (law L7): the folder was removed; the disk or this installation is at fault"
        )
    largest, mean = weight_error(lm.model, small.model)
    return how | {
        "parent": parent,
        "bytes_before": _bytes(lm.model),
        "bytes_after": _bytes(small.model),
        "max_error": largest,
        "mean_error": mean,
        "logit_difference": difference,
    }


def _difference(small: Whole, out: Path, load: Callable[[Path], Whole]) -> float:
    config = small.model.config
    shape = (_PROBE[0], min(_PROBE[1], config.max_positions))
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    try:
        again = load(out)
    except AthanorError as error:
        shutil.rmtree(out)
        raise VerificationError(f"{out} cannot be read back and was removed: {error}") from error
    return float((small.logits(ids) - again.logits(ids).to(small.model.device)).abs().max())


def _bytes(model: LanguageModel) -> int:
    layout, tensors = formats.layout(model), model.to_hf(model.state_dict())
    return sum(t.nbytes for t in (layout.encode(tensors) if layout else tensors).values())


def _check_replaceable(out: Path, source: Path | None) -> None:
    if source is not None and out.resolve() == source.resolve():
        raise ConfigError(f"out ({out}) is the folder of the model itself: choose another")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    config = out / "config.json"
    fields = io.read_json(config) if config.is_file() else None
    if not isinstance(fields, dict) or "quantization_config" not in fields:
        raise ConfigError(f"out ({out}) exists and is not the folder of a quantised model: choose another, or move it away")
