"""Reading the fields of a config.json: every field that is read has a type, and what is not computed is refused."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from athanor.core.errors import CheckpointError

_MISSING = object()
_LARGEST = 2**31 - 1  # of whole numbers: what is greater is no size that a memory holds
_MANY = 10_000  # layers, heads or experts: each of them takes time, even where nothing is allocated
_WIDE = 2**24  # tables are computed over a width


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
        """Refuse a value that this version does not compute; an absent field is the first of `known`, and so is null unless that
        is true, for null is false to transformers."""
        value = self._values.get(name, known[0])
        if value not in known and (value is not None or known[0] is True):
            raise CheckpointError(
                f"config.json: {name} is {value!r}, which is not supported for {self._type} (only"
                f" {' and '.join(map(repr, known))} {'is' if len(known) == 1 else 'are'}): use another checkpoint"
            )

    def rope(self, theta: float = 10_000.0) -> dict[str, Any]:
        """Rotary settings of new files (`rope_parameters`) and old (`rope_theta`, `rope_scaling`), always with a `rope_type`.

        A file may have both tables if they say the same: transformers takes all of `rope_scaling` and nothing of the other.

        Args:
            theta: `rope_theta` of files that do not say.
        """
        new, old = self._rotary("rope_parameters"), self._rotary("rope_scaling")
        outside = {"rope_theta": self.get("rope_theta", theta), "partial_rotary_factor": self.get("partial_rotary_factor", None)}
        if new and old and outside | new != outside | old:
            raise CheckpointError(
                f"config.json: rope_scaling ({old}) and rope_parameters ({new}) disagree: remove the one that is wrong"
            )
        table = old or new or {"rope_type": "default"}
        base = {"rope_theta": table.get("rope_theta", outside["rope_theta"])}
        return table | {"rope_theta": Fields(base, self._type).float("rope_theta")}

    def _rotary(self, name: str) -> dict[str, Any]:
        """One of the two tables, its type by the name of today; {} where there is none."""
        table = dict(self.table(name, {}))
        if not table:
            return table
        old = table.pop("type", None)
        kind = table["rope_type"] = next((x for x in (table.get("rope_type"), old) if x is not None), "default")
        if not isinstance(kind, str):
            raise CheckpointError(f"config.json: rope_type in {name} is {kind!r} and must be a text: copy it again")
        if table.get("rope_theta", 0) is None:
            del table["rope_theta"]
        return table

    def int(self, name: str, default: Any = _MISSING, *, most: int = _LARGEST) -> Any:
        """A whole number of at most `most`."""
        value = self._typed(name, default, (int,), "a whole number")
        if value is not default and value > most:
            raise CheckpointError(f"config.json: {name} is {value} and must be at most {most}: copy it again")
        return value

    def int_or_none(self, name: str, default: Any) -> Any:
        """A whole number, or None where the field is null; `default` where it is absent."""
        return self.int(name, None) if name in self._values else default

    def count(self, name: str, default: Any = _MISSING) -> Any:
        """How many layers, heads or experts there are."""
        return self.int(name, default, most=_MANY)

    def width(self, name: str, default: Any = _MISSING) -> Any:
        """Of hidden states or heads."""
        return self.int(name, default, most=_WIDE)

    def float(self, name: str, default: Any = _MISSING) -> Any:
        """A number, as float."""
        value = self._typed(name, default, (int, float), "a number")
        try:
            return float(value) if isinstance(value, int) else value
        except OverflowError as error:
            raise CheckpointError(f"config.json: {name} is {value} and must be a number below 1.8e308: copy it again") from error

    def bool(self, name: str, default: Any = _MISSING) -> Any:
        """true or false; null, which is false to transformers, is refused where an absent field is true."""
        if default is True and self._values.get(name, True) is None:
            raise CheckpointError(f"config.json: {name} is None and must be true or false: write which, or leave it out")
        return self._typed(name, default, (bool,), "true or false")

    def str(self, name: str, default: Any = _MISSING) -> Any:
        """A text."""
        return self._typed(name, default, (str,), "a text")
