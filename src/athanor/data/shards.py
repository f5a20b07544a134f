"""Token shards: `<|bos|>` document `<|end|>` one after another, as plain numbers on disk.

NAME.bin   tokens, little-endian uint16 (uint32 when the vocabulary has more than 65,536)
NAME.idx   where each document starts, in tokens, little-endian int64
NAME.json  counts, dtype, SHA-256 of both, the tokenizer's hash; written last: without it there is no shard
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from athanor.core import io
from athanor.core.errors import ConfigError, DataError, TokenizerError
from athanor.data.sources import read_documents
from athanor.tokenizer.bpe import Tokenizer
from athanor.types import Document

_BATCH_CHARACTERS = 1 << 20
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_STARTS = np.dtype("<i8")
_REMEDY = "write the shard again"


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What a shard holds; the content of its .json file.

    dtype          "uint16" or "uint32"
    tokens         T, control tokens included
    documents      how many
    bytes          UTF-8 bytes of their texts, so tokens per byte is known
    limit_reached  whether `limit_tokens` ended it; then documents may be left over
    vocab_size, tokenizer_hash   of the tokenizer that wrote it
    sha256_bin, sha256_idx       of the two files
    """

    dtype: str
    tokens: int
    documents: int
    bytes: int
    limit_reached: bool
    vocab_size: int
    tokenizer_hash: str
    sha256_bin: str
    sha256_idx: str


def write_tokens(
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    path: str | os.PathLike[str],
    limit_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> ShardReport:
    """Encode `documents` into the shard `path` (its .bin file, or the name without suffix).

    Encoding runs on all cores unless the environment has TOKENIZERS_PARALLELISM=false; the result is the same. The document that
    reaches `limit_tokens` is written whole and is the last. `progress` is called with the tokens written so far.
    Raises DataError when there are no documents, ConfigError when `limit_tokens` is below 1.
    """
    if limit_tokens is not None and limit_tokens < 1:
        raise ConfigError(f"limit_tokens ({limit_tokens}) must be at least 1: leave it out for no limit")
    bin_path, idx_path, json_path = _paths(path)
    bin_path.parent.mkdir(parents=True, exist_ok=True)
    json_path.unlink(missing_ok=True)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    tokens = text_bytes = 0
    starts: list[int] = []
    limit_reached = False
    with bin_path.open("wb") as out:
        for batch in _batches(documents):
            for document, ids in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
                out.write(np.array([tokenizer.bos_id, *ids, tokenizer.end_id], dtype=_DTYPES[dtype]).tobytes())
                starts.append(tokens)
                tokens += len(ids) + 2
                text_bytes += len(document.text.encode("utf-8"))
                limit_reached = limit_tokens is not None and tokens >= limit_tokens
                if limit_reached:
                    break
            if progress is not None:
                progress(tokens)
            if limit_reached:
                break
        _sync(out)
    if not starts:
        bin_path.unlink()
        raise DataError(f"no documents to write to {bin_path}: give at least one")
    with idx_path.open("wb") as out:
        out.write(np.array(starts, dtype=_STARTS).tobytes())
        _sync(out)
    report = ShardReport(
        dtype=dtype,
        tokens=tokens,
        documents=len(starts),
        bytes=text_bytes,
        limit_reached=limit_reached,
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        sha256_bin=io.sha256_file(bin_path),
        sha256_idx=io.sha256_file(idx_path),
    )
    io.write_json(json_path, asdict(report))
    return report


def ensure(folder: Path, tokenizer: Tokenizer, tokens: int, documents: str = "train.jsonl") -> TokenShard:
    """The shard of a corpus folder's `documents` with `tokens` tokens (or all that there are), written unless it is there."""
    path = (folder / documents).with_suffix(".bin")
    if path.with_suffix(".json").exists():
        report = io.read_json(path.with_suffix(".json"))
        enough = report["tokens"] >= tokens or not report["limit_reached"]
        if report["tokenizer_hash"] == tokenizer.hash and enough:
            return TokenShard(path, tokenizer)
    write_tokens(tokenizer, read_documents(folder / documents), path, limit_tokens=tokens)
    return TokenShard(path, tokenizer)


class TokenShard:
    """A shard, read through memory mapping.

    Attributes:
        tokens: (T,) uint16 or uint32, read-only, on disk until touched.
        starts: (documents,) int64, first token of each document; starts[0] is 0.
        report: the ShardReport it was written with.
    """

    def __init__(self, path: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
        """Open the shard `path`; sizes and starts are checked, contents by `verify`.

        Raises CheckpointError when its .json file is missing or malformed, DataError when a file is missing, of the wrong size or
        inconsistent, TokenizerError when `tokenizer` is given and is not the one that wrote it.
        """
        self._bin, self._idx, json_path = _paths(path)
        self.report = _report(io.read_json(json_path), json_path)
        dtype = _DTYPES[self.report.dtype]
        _check_size(self._bin, self.report.tokens * dtype.itemsize)
        _check_size(self._idx, self.report.documents * _STARTS.itemsize)
        self.starts: NDArray[np.int64] = np.fromfile(self._idx, dtype=_STARTS)
        ends = np.append(self.starts[1:], self.report.tokens)
        if self.starts[0] != 0 or not (ends - self.starts >= 2).all():
            raise DataError(f"{self._idx} must rise from 0 to {self.report.tokens} (all tokens), it does not: {_REMEDY}")
        if tokenizer is not None and tokenizer.hash != self.report.tokenizer_hash:
            raise TokenizerError(
                f"{self._bin} was written with tokenizer {self.report.tokenizer_hash[:16]}, this one is {tokenizer.hash[:16]}:"
                " encode the corpus again"
            )
        self.tokens: NDArray[Any] = np.memmap(self._bin, dtype=dtype, mode="r")

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.starts)

    def __getitem__(self, index: int) -> NDArray[Any]:
        """Tokens of document `index`, `<|bos|>` and `<|end|>` included."""
        index = range(len(self))[index]
        end = self.starts[index + 1] if index + 1 < len(self) else self.report.tokens
        return self.tokens[self.starts[index] : end]

    def verify(self) -> None:
        """Compare contents with their SHA-256. Raises DataError naming the file that is damaged."""
        for path, expected in ((self._bin, self.report.sha256_bin), (self._idx, self.report.sha256_idx)):
            if (found := io.sha256_file(path)) != expected:
                raise DataError(f"{path} has SHA-256 {found[:16]} and was written with {expected[:16]}: {_REMEDY}")


def _paths(path: str | os.PathLike[str]) -> tuple[Path, Path, Path]:
    path = Path(path)
    base = path.name.removesuffix(".bin")
    return path.with_name(base + ".bin"), path.with_name(base + ".idx"), path.with_name(base + ".json")


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _report(content: Any, path: Path) -> ShardReport:
    try:
        report = ShardReport(**content)
        if report.dtype not in _DTYPES or not (report.tokens >= 2 and report.documents >= 1):
            raise ValueError(f"dtype {report.dtype!r}, {report.tokens} tokens, {report.documents} documents")
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} does not describe a token shard ({error}): {_REMEDY}") from error
    return report


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): {_REMEDY}") from error
    if size != expected:
        raise DataError(f"{path} has {size} bytes and must have {expected}: it is truncated or damaged, {_REMEDY}")


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
