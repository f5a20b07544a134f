"""Token shards: the tokens are the documents', and damage of any kind is noticed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from athanor.core.errors import CheckpointError, ConfigError, DataError, TokenizerError
from athanor.data import shards
from athanor.data.shards import TokenShard, write_tokens
from athanor.tokenizer.bpe import Tokenizer
from athanor.types import Document


def docs(*texts: str) -> list[Document]:
    return [Document(text, str(i)) for i, text in enumerate(texts)]


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5), batch=st.integers(1, 8))
def test_a_shard_is_its_documents(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, texts: list[str], batch: int
) -> None:
    path = tmp_path_factory.mktemp("shard") / "train.bin"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_BATCH_CHARACTERS", batch)
        report = write_tokens(tokenizer, docs(*texts), path)
    shard = TokenShard(path, tokenizer)
    shard.verify()
    assert shard.report == report
    assert len(shard) == report.documents == len(texts)
    assert report.bytes == sum(len(text.encode()) for text in texts)
    assert report.tokens == len(shard.tokens)
    for i, text in enumerate(texts):
        assert shard[i].tolist() == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.end_id]
    assert shard[-1].tolist() == shard[len(shard) - 1].tolist()
    assert (shard.tokens == tokenizer.bos_id).sum() == (shard.tokens == tokenizer.end_id).sum() == len(texts)
    with pytest.raises(IndexError):
        shard[len(texts)]


def test_text_of_control_tokens_stays_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_tokens(tokenizer, docs("a<|end|><|bos|>b"), tmp_path / "x")
    tokens = TokenShard(tmp_path / "x").tokens.tolist()
    assert [token for token in tokens if token < 16] == [tokenizer.bos_id, tokenizer.end_id]
    assert tokenizer.decode(tokens) == "a<|end|><|bos|>b"


def test_layout_on_disk(tokenizer: Tokenizer, tmp_path: Path) -> None:
    report = write_tokens(tokenizer, docs("ab", "", "c"), tmp_path / "new" / "train")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["train.bin", "train.idx", "train.json"]
    tokens = np.fromfile(tmp_path / "new" / "train.bin", dtype="<u2").tolist()
    a, c = tokenizer.encode("ab"), tokenizer.encode("c")
    assert tokens == [1, *a, 2, 1, 2, 1, *c, 2]
    assert np.fromfile(tmp_path / "new" / "train.idx", dtype="<i8").tolist() == [0, len(a) + 2, len(a) + 4]
    assert json.loads((tmp_path / "new" / "train.json").read_text())["tokenizer_hash"] == tokenizer.hash == report.tokenizer_hash
    assert (report.dtype, report.vocab_size) == ("uint16", tokenizer.vocab_size)


def test_a_large_vocabulary_takes_uint32(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "vocab_size", (1 << 16) + 1)
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: [[1 << 16] for _ in texts])
    assert write_tokens(tokenizer, docs("x"), tmp_path / "x").dtype == "uint32"
    assert TokenShard(tmp_path / "x").tokens.tolist() == [1, 1 << 16, 2]
    monkeypatch.setattr(Tokenizer, "vocab_size", 1 << 16)
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: [[(1 << 16) - 1] for _ in texts])
    assert write_tokens(tokenizer, docs("x"), tmp_path / "x").dtype == "uint16"
    assert TokenShard(tmp_path / "x").tokens.tolist() == [1, (1 << 16) - 1, 2]


def test_limit_ends_after_the_document_that_reaches_it(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prose: Callable[..., str]
) -> None:
    monkeypatch.setattr(shards, "_BATCH_CHARACTERS", 1000)
    read = 0

    def endless() -> Iterator[Document]:
        nonlocal read
        while True:
            read += 1
            yield Document(prose(300, seed=read), str(read))

    seen: list[int] = []
    report = write_tokens(tokenizer, endless(), tmp_path / "x", limit_tokens=2000, progress=seen.append)
    shard = TokenShard(tmp_path / "x")
    assert report.limit_reached
    assert report.tokens >= 2000 > report.tokens - len(shard[-1])
    assert shard.tokens[-1] == tokenizer.end_id
    assert seen == sorted(set(seen))
    assert len(seen) > 1
    assert seen[-1] == report.tokens
    assert read <= report.documents + 4  # the rest of one batch
    assert not write_tokens(tokenizer, docs("a"), tmp_path / "x", limit_tokens=2000).limit_reached


def test_parallel_encoding_gives_the_same_tokens(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prose: Callable[..., str]
) -> None:
    found = docs(*(prose(2000, seed=i) for i in range(20)))
    reports = []
    for parallel in ("true", "false"):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
        reports.append(write_tokens(tokenizer, found, tmp_path / parallel))
    assert reports[0] == reports[1]


def test_nothing_to_write(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no documents to write to .*x.bin: give at least one"):
        write_tokens(tokenizer, [], tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=r"limit_tokens \(0\) must be at least 1: leave it out for no limit"):
        write_tokens(tokenizer, docs("x"), tmp_path / "x", limit_tokens=0)


@pytest.fixture
def shard(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    write_tokens(tokenizer, docs("one", "two", "three"), tmp_path / "train.bin")
    return tmp_path / "train.bin"


def test_shard_without_its_json_does_not_count(shard: Path) -> None:
    shard.with_suffix(".json").unlink()
    with pytest.raises(CheckpointError, match=r"train.json"):
        TokenShard(shard)


def test_a_writer_that_is_killed_leaves_no_shard(tokenizer: Tokenizer, shard: Path) -> None:
    def killed() -> Iterator[Document]:
        yield Document("one", "1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(tokenizer, killed(), shard)
    with pytest.raises(CheckpointError, match=r"train.json"):
        TokenShard(shard)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("change", [-1, -2, 2])
def test_wrong_length_is_noticed(shard: Path, suffix: str, change: int) -> None:
    path = shard.with_suffix(suffix)
    data = path.read_bytes()
    path.write_bytes((data + b"\0\0")[: len(data) + change])
    expected = (
        rf"{re.escape(str(path))} has {len(data) + change} bytes and must have {len(data)}: .*damaged, write the shard again"
    )
    with pytest.raises(DataError, match=expected):
        TokenShard(shard)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file_is_named(shard: Path, suffix: str) -> None:
    shard.with_suffix(suffix).unlink()
    with pytest.raises(DataError, match=rf"train\{suffix} cannot be read \(No such file.*\): write the shard again"):
        TokenShard(shard)


@pytest.mark.parametrize("starts", [[1, 5, 9], [0, 9, 5], [0, 5, 10**6], [0, 0, 5], [0, 1, 5]])
def test_wrong_starts_are_noticed(shard: Path, starts: list[int]) -> None:
    shard.with_suffix(".idx").write_bytes(np.array(starts, dtype="<i8").tobytes())
    with pytest.raises(DataError, match=r"train.idx must rise from 0 to \d+ \(all tokens\), it does not: write the shard again"):
        TokenShard(shard)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_changed_content_is_noticed_by_verify(shard: Path, suffix: str) -> None:
    path = shard.with_suffix(suffix)
    data = bytearray(path.read_bytes())
    data[8] ^= 1  # the second start, or a token
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"train\{suffix} has SHA-256 \w+ and was written with \w+: write the shard again"):
        TokenShard(shard).verify()


def test_shard_of_another_tokenizer_is_refused(shard: Path) -> None:
    with pytest.raises(
        TokenizerError, match=r"train.bin was written with tokenizer \w+, this one is \w+: encode the corpus again"
    ):
        TokenShard(shard, Tokenizer.train(["another"], 280))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float32"},
        {"dtype": ["uint16"]},
        {"tokens": 0},
        {"tokens": "9"},
        {"documents": 0},
        {"unknown": 1},
        {"tokens": None},
    ],
)
def test_foreign_json_is_refused(shard: Path, change: dict[str, Any]) -> None:
    path = shard.with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=r"train.json does not describe a token shard \(.*\): write the shard again"):
        TokenShard(shard)
    path.write_text("[1]")
    with pytest.raises(DataError, match=r"train.json does not describe a token shard"):
        TokenShard(shard)


def test_tokens_cannot_be_written(shard: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        TokenShard(shard).tokens[0] = 3
