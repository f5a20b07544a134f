"""Placeholder."""

from typing import Any


def describe(model: Any) -> dict[str, Any]:
    return {}


def prepare(model: Any, fields: dict[str, Any]) -> None:
    return None
