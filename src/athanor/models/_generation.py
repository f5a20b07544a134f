"""Token ids that a model begins, ends and fills texts with, in config.json and generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from athanor.core import io
from athanor.core.errors import CheckpointError
from athanor.models.base import LanguageModel, TokenIds

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")


def fields_of(ids: TokenIds) -> dict[str, Any]:
    """As fields of config.json, those that there are."""
    eos = ids.eos[0] if len(ids.eos) == 1 else list(ids.eos) or None
    fields = dict(zip(TOKENS, (ids.bos, eos, ids.pad, ids.decoder_start, ids.forced_bos), strict=True))
    return {name: value for name, value in fields.items() if value is not None}


def read(fields: Mapping[str, Any]) -> TokenIds:
    """From fields of config.json. Raises CheckpointError for what is no token id."""

    def one(name: str) -> int | None:
        value = fields.get(name)
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
            return value
        if name == "pad_token_id" and value == -1:  # older files say so for none
            return None
        raise CheckpointError(f"config.json: {name} is {value!r} and must be a token id: copy it again")

    eos = fields.get("eos_token_id")
    several = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in several):
        raise CheckpointError(f"config.json: eos_token_id is {eos!r} and must be a token id or a list of them: copy it again")
    return TokenIds(one("bos_token_id"), tuple(several), *(one(name) for name in TOKENS[2:]))


def of_generation(folder: Path) -> dict[str, Any]:
    """What generation_config.json says of token ids: transformers goes by it where it is there.

    Of what it lacks transformers knows nothing, and never stops without an end of text; here config.json is asked.
    """
    path = folder / "generation_config.json"
    fields = io.read_json(path) if path.is_file() else {}
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} must hold a table: copy it again")
    return {name: value for name, value in fields.items() if name in TOKENS and value is not None}


def check(model: LanguageModel, fields: Mapping[str, Any], folder: Path) -> None:
    """Refuse ids outside the vocabulary that every answer begins with.

    Others are harmless, and small models that transformers saved have them by default: no such token is ever generated, and a
    prompt with one is refused.
    """
    if model.kind != "encoder_decoder":
        return
    ids, size = model.token_ids, model.config.vocab_size
    begins = "decoder_start_token_id" if fields.get("decoder_start_token_id") is not None else "pad_token_id"
    for name, value in ((begins, ids.decoder_start), ("forced_bos_token_id", ids.forced_bos)):
        if value is not None and value >= size:
            raise CheckpointError(
                f"{folder}: {name} is {value} and must be below vocab_size ({size}), since text is generated with it: correct it"
                " in config.json and in generation_config.json, or leave it out"
            )
