"""OpenAI's embeddings: a vector for each text."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Discriminator, Field, Tag
from torch import Tensor
from typing_extensions import TypedDict

from athanor.core.errors import RequestError
from athanor.serve.body import Fields, Strict
from athanor.serve.sampling import text_or_list
from athanor.serve.shapes import Usage, usage

MAX_INPUTS = 2048
AT_ONCE = 32  # texts between two steps of the engine

_Words = Annotated[str, Field(min_length=1)]


class EmbeddingRequest(Strict):
    """The body of POST /v1/embeddings."""

    INERT = frozenset({"user"})
    UNSUPPORTED: ClassVar[Fields] = {"dimensions": ()}

    model: str
    input: Annotated[
        Annotated[_Words, Tag("<text>")]
        | Annotated[list[_Words], Field(min_length=1, max_length=MAX_INPUTS), Tag("<list>")],
        Discriminator(text_or_list),
    ]  # fmt: skip
    encoding_format: Literal["float", "base64"] = "float"

    @property
    def texts(self) -> list[str]:
        """The texts one by one."""
        return [self.input] if isinstance(self.input, str) else self.input


class Embedding(TypedDict):
    object: str
    index: int
    embedding: list[float] | str  # a text is base64 of float32, little-endian


class Embeddings(TypedDict):
    object: str
    data: list[Embedding]
    model: str
    usage: Usage


def vectors_body(asked: EmbeddingRequest, vectors: Tensor, tokens: int) -> Embeddings:
    """The body for vectors (N, D) of texts that have `tokens` tokens together."""
    rows = vectors.float().numpy().astype("<f4")
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": _written(row, asked.encoding_format)} for i, row in enumerate(rows)
        ],
        "model": asked.model,
        "usage": usage(tokens, 0),
    }


def _written(row: np.ndarray[tuple[int], np.dtype[np.float32]], encoding: str) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(row.tobytes()).decode()
    numbers: list[float] = row.tolist()
    return numbers


def check_lengths(lengths: Sequence[int], longest: int) -> None:
    """Raises RequestError for the first text that the model cannot take whole."""
    for i, length in enumerate(lengths):
        if length > longest:
            raise RequestError(
                f"'input[{i}]' has {length} tokens and the model takes {longest}: split it, and embed the parts", f"input[{i}]"
            )
