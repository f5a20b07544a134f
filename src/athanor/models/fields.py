"""Reading the fields of a config.json: every field that is read has a type, and what is not computed is refused."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from athanor.core.errors import CheckpointError

_MISSING = object()


class Fields:
    """The fields of a config.json.

    Args:
        values: as parsed.
        model_type: for messages.
        aliases: other names of fields -> the names that are asked for. transformers lets the other name win, so a file that has
            both must say the same in both; CheckpointError otherwise.
    """

    def __init__(self, values: Mapping[str, Any], model_type: str, aliases: Mapping[str, str] = MappingProxyType({})) -> None:
        self._values, self._type = dict(values), model_type
        for other, name in aliases.items():
            if other not in values:
                continue
            if name in values and values[name] != values[other]:
                raise CheckpointError(
                    f"config.json: {other} is {values[other]!r} and {name}, which means the same in a {model_type}, is"
                    f" {values[name]!r}: remove the one that is wrong"
                )
            self._values[name] = values[other]

    def get(self, name: str, default: Any = _MISSING) -> Any:
        """Whatever is there; null counts as absent. Raises CheckpointError when it is absent and there is no default."""
        value = self._values.get(name)
        if value is not None:
            return value
        if default is _MISSING:
            raise CheckpointError(f"config.json lacks {name!r}, which a {self._type} needs: copy it again")
        return default

    def _typed(self, name: str, default: Any, types: tuple[type, ...], what: str) -> Any:
        value = self.get(name, default)
        if value is default or (isinstance(value, types) and (bool in types or not isinstance(value, bool))):
            return value
        raise CheckpointError(f"config.json: {name} is {value!r} and must be {what}: copy it again")

    def table(self, name: str, default: Any = _MISSING) -> Any:
        """Fields within a field."""
        return self._typed(name, default, (dict,), "a table")

    def only(self, name: str, *known: Any) -> None:
        """Refuse a value that this version does not compute; an absent field is the first of `known`."""
        value = self._values.get(name)
        if value is not None and value not in known:
            raise CheckpointError(
                f"config.json: {name} is {value!r}, which is not supported for {self._type} (only"
                f" {' and '.join(map(repr, known))} {'is' if len(known) == 1 else 'are'}): use another checkpoint"
            )

    def rope(self) -> dict[str, Any]:
        """Rotary settings of new files (`rope_parameters`) and old (`rope_theta`, `rope_scaling`), always with a `rope_type`."""
        new, old = self.table("rope_parameters", {}), self.table("rope_scaling", {})
        both = {**old, **new}
        both["rope_type"] = both.get("rope_type") or both.pop("type", None) or "default"
        theta = both.get("rope_theta") or self.float("rope_theta", 10_000.0)
        if isinstance(theta, bool) or not isinstance(theta, (int, float)):
            raise CheckpointError(f"config.json: rope_theta is {theta!r} and must be a number: copy it again")
        return both | {"rope_theta": float(theta)}

    def int(self, name: str, default: Any = _MISSING) -> Any:
        """A whole number."""
        return self._typed(name, default, (int,), "a whole number")

    def float(self, name: str, default: Any = _MISSING) -> Any:
        """A number, as float."""
        value = self._typed(name, default, (int, float), "a number")
        return float(value) if isinstance(value, int) else value

    def bool(self, name: str, default: Any = _MISSING) -> Any:
        """true or false."""
        return self._typed(name, default, (bool,), "true or false")

    def str(self, name: str, default: Any = _MISSING) -> Any:
        """A text."""
        return self._typed(name, default, (str,), "a text")
