"""Token ids from outside, as a tensor. Legend: B batch, T time, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from athanor.core.errors import ConfigError


def token_ids(given: Any, name: str, *, longest: int, vocab_size: int, device: torch.device) -> Tensor:
    """(B, T) int64 of sequences of one length.

    Raises ConfigError, which calls them `name`, for what is no whole numbers, of another shape, longer than `longest` or outside
    [0, V).
    """
    try:
        tensor = torch.as_tensor(given, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        if _ragged(given):
            raise ConfigError(f"{name} must be sequences of one length ({error}): give those of another length apart") from error
        raise _no_ids(given, name) from error
    if not tensor.numel() or (tensor.ndim != 2 and _whole(tensor)):
        raise ConfigError(f"{name} has shape {tuple(tensor.shape)} and must be (batch, time): wrap one sequence in a list")
    if not _whole(tensor) or (isinstance(given, Sequence) and any(isinstance(x, bool) for row in given for x in row)):
        raise _no_ids(given, name)
    tensor = tensor.long()
    if tensor.shape[1] > longest:
        raise ConfigError(f"{name} has {tensor.shape[1]} tokens and the context holds {longest}: shorten it")
    wrong = ((tensor < 0) | (tensor >= vocab_size)).nonzero()
    if len(wrong):
        i, j = wrong[0].tolist()
        raise ConfigError(
            f"{name}[{i}][{j}] is {int(tensor[i, j])} and must lie in [0, {vocab_size}): it was made by another tokenizer"
        )
    return tensor


def _whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _ragged(given: Any) -> bool:
    rows = given if isinstance(given, (list, tuple)) else ()
    return all(isinstance(row, (Sequence, Tensor)) for row in rows) and len({len(row) for row in rows}) > 1


def _no_ids(given: Any, name: str) -> ConfigError:
    said = f"a tensor of {given.dtype}" if isinstance(given, Tensor) else repr(given)
    shown = said if len(said) <= 60 else said[:57] + "..."
    return ConfigError(f"{name} is {shown} and must be token ids, whole numbers in rows such as [[1, 2, 3]]: encode a text first")
