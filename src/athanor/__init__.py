"""Athanor: one numerical core that carries a language model from raw text to a served, aligned, compressed assistant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from athanor.lm import LM, load

__version__ = "0.1.0"
__all__ = ["LM", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """`load` and `LM` come from `athanor.lm` on first use: importing `athanor` alone must not import torch."""
    if name in ("LM", "load"):
        import athanor.lm

        return getattr(athanor.lm, name)
    raise AttributeError(f"module 'athanor' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
