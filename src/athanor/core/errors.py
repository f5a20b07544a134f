"""Everything Athanor raises for its users, as one tree.

    AthanorError
    ├── ConfigError        an option, a value of one, or two that do not fit together
    ├── PluginError        a name that no file answers to, or a file that lacks what its room asks for
    ├── DataError          text, records, or batches that cannot be used
    │   └── NoTargetsError     a batch in which nothing is supervised
    ├── TokenizerError     a vocabulary or chat template that does not fit
    ├── CheckpointError    a checkpoint or run folder that is damaged, foreign, or of another version
    ├── TrainingError      training that cannot go on
    │   └── NonFiniteLossError the loss or its gradient became inf or nan
    ├── NonFiniteError     the model made inf or nan of a request
    ├── RequestError       a generation request out of range (the server answers 400)
    ├── VerificationError  a law of the house does not hold for this model
    └── MissingExtraError  an optional dependency is not installed

A message names the value, the field, the rule and the remedy. `assert` is for invariants of our own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AthanorError(Exception):
    """Base of all errors meant for the user; the command line prints its message without a traceback."""


class ConfigError(AthanorError):
    """An option, a value of one, or two options that do not fit together."""


class PluginError(AthanorError):
    """A plugin name that no file answers to, or a plugin file that lacks what its room asks for."""


class DataError(AthanorError):
    """Text, records or batches that cannot be used."""


class NoTargetsError(DataError):
    """A batch in which nothing is supervised: its loss would be a meaningless 0."""


class TokenizerError(AthanorError):
    """A vocabulary or chat template that does not fit what is asked of it."""


class CheckpointError(AthanorError):
    """A checkpoint or run folder that is damaged, foreign, or written by another version or config."""


class TrainingError(AthanorError):
    """Training that cannot go on."""


class NonFiniteLossError(TrainingError):
    """The loss or its gradient became inf or nan; the weights are those before the update."""


class NonFiniteError(AthanorError):
    """The model made inf or nan of a request: it has no answer. `what` of it, such as its logits after some token."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the model's {what} are not finite: its weights are damaged or have diverged, or their products leave the range of"
            " its precision"
        )


class RequestError(AthanorError):
    """A generation request that is out of range. `param` names the offending field (OpenAI's error shape)."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class VerificationError(AthanorError):
    """A law of the house does not hold for this model."""


class MissingExtraError(AthanorError):
    """An optional dependency is not installed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause `; did you mean 'x'?` with the known name nearest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
