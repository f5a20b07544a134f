"""Parameters of a generation as a caller gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, TypeVar

from athanor.core.config import from_dict
from athanor.core.errors import ConfigError
from athanor.types import Structure

T = TypeVar("T")


def typed(cls: type[T], params: Mapping[str, Any]) -> T:
    """The dataclass of these parameters. Raises ConfigError, which names the field, for one of a wrong type."""
    structure = params.get("structure")
    if structure is not None and not isinstance(structure, Structure):
        raise ConfigError(f"structure is {structure!r} and must be an athanor.types.Structure: make one")
    others = {name: _plain(value) for name, value in params.items() if name != "structure"}
    made = from_dict(cls, others)
    return made if structure is None else replace(made, structure=structure)  # type: ignore[type-var]  # it is a dataclass


def _plain(value: Any) -> Any:
    """Numbers of other libraries as Python's."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)
