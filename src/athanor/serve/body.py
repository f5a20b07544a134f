"""Reading a JSON body into a model, so that no field of it is passed over in silence.

A field falls in one of four classes: it is used, it is known to change nothing (`INERT`), it is known and not supported
(`UNSUPPORTED`: only its default is accepted), or it is an error with the nearest name. null stands for the default, as OpenAI's
clients send it. The JSON schema of a model says all of this too.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, from_json

from athanor.core.errors import RequestError, nearest

_show = reprlib.Repr()
_show.maxstring = _show.maxother = _show.maxlong = 60
show = _show.repr  # a value in a message, short whatever it is


Fields = Mapping[str, Sequence[object]]  # names, and the values that change nothing


class Strict(BaseModel):
    """Strict: no number from a string, no integer from a boolean, nothing unknown."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    INERT: ClassVar[frozenset[str]] = frozenset()
    UNSUPPORTED: ClassVar[Fields] = {}

    def check(self) -> None:
        """Rules over more than one field: raises RequestError."""

    @classmethod
    def names(cls) -> list[str]:
        """The fields as clients write them."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @model_validator(mode="before")
    @classmethod
    def _settle(cls, data: object) -> object:
        """`data` without what changes nothing: nulls, inert fields and defaults of unsupported ones."""
        if not isinstance(data, dict):
            return data
        names, kept = cls.names(), {}
        for key, value in data.items():
            told = {"key": key[:60], "value": show(value)}
            if key in names:
                if value is not None:
                    kept[key] = value
            elif key in cls.UNSUPPORTED:
                # The type too: false is not 0.
                if value is not None and not any(type(value) is type(d) and value == d for d in cls.UNSUPPORTED[key]):
                    raise PydanticCustomError("unsupported", "unsupported", told)
            elif key not in cls.INERT:
                told["hint"] = nearest(key[:60], [*names, *cls.UNSUPPORTED, *cls.INERT])
                raise PydanticCustomError("unknown", "unknown", told)
        return kept

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        target = handler.resolve_ref_schema(schema)
        required = target.get("required", ())
        fields = target.setdefault("properties", {})
        for name, field in fields.items():
            if name not in required and {"type": "null"} not in field.get("anyOf", ()):
                fields[name] = {"anyOf": [field, {"type": "null"}]}
        fields |= {name: {"enum": [*values, None]} for name, values in cls.UNSUPPORTED.items()}
        fields |= {name: {"description": "Changes nothing."} for name in sorted(cls.INERT)}
        return schema


M = TypeVar("M", bound=Strict)


def read(body: bytes, model: type[M]) -> M:
    """Read a body as `model`.

    Raises RequestError with the field at fault in `param`; nothing that stands in the body raises anything else.
    """
    required = _quoted(field.alias or name for name, field in model.model_fields.items() if field.is_required())
    try:
        value = model.model_validate(_object(body, f"a JSON object with {required}" if required else "a JSON object"))
    except ValidationError as error:
        raise _explain(error) from None
    value.check()
    return value


def _quoted(names: Iterable[str]) -> str:
    return " and ".join(f"'{name}'" for name in names)


def _object(body: bytes, wanted: str) -> dict[str, Any]:
    if not body.strip():
        raise RequestError(f"the body is empty: send {wanted}")
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise RequestError(f"the body must be a JSON object, not {show(data)}: send {wanted}")
    return data


def _explain(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False)[0]
    param = ""
    for part in first["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif not part.startswith(("<", "[")):  # tags of a union and the key of a mapping are no fields
            param += f".{part}" if param else part
    told = first.get("ctx", {})
    if first["type"] in ("unknown", "unsupported"):
        param = f"{param}.{told['key']}" if param else told["key"]
        if first["type"] == "unknown":
            return RequestError(f"unknown field {param!r}{told['hint']}: correct it or leave it out", param)
        return RequestError(f"{param!r} is not supported yet (got {told['value']}): leave it out", param)
    param = param[:160]
    if first["type"] == "missing":
        return RequestError(f"{param!r} is missing: it is required", param)
    return RequestError(f"{param!r} is {show(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}", param)
