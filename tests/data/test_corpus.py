"""The corpus: every byte is accounted for, nothing stands on both sides, the same input gives the same files."""

from __future__ import annotations

import hashlib
import json
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from athanor import cli
from athanor.core.errors import CheckpointError, ConfigError, DataError
from athanor.data import corpus
from athanor.data.corpus import CorpusReport, build, read_documents
from athanor.types import Document

KIB, MIB = 1 << 10, 1 << 20
FILES = ["heldout.jsonl", "heldout.txt", "manifest.json", "train.jsonl"]


def documents(out: Path, name: str) -> list[Document]:
    return list(read_documents(out / f"{name}.jsonl"))


def size(found: list[Document]) -> int:
    return sum(len(document.text.encode()) for document in found)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def check(out: Path, report: CorpusReport) -> tuple[list[Document], list[Document]]:
    """What holds for every corpus; its training and held-out documents."""
    train, heldout = documents(out, "train"), documents(out, "heldout")
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert (report.train_documents, report.train_bytes) == (len(train), size(train))
    assert (report.heldout_documents, report.heldout_bytes) == (len(heldout), size(heldout))
    assert train
    assert heldout
    assert (out / "heldout.txt").read_bytes().decode() == "\n".join(document.text for document in heldout)
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    names = manifest.pop("skipped_names")
    assert manifest == asdict(report)
    assert {reason: len(found) for reason, found in names.items()} == report.skipped
    for name in ("train.jsonl", "heldout.jsonl", "heldout.txt"):
        assert report.sha256[name] == hashlib.sha256((out / name).read_bytes()).hexdigest()
    total = report.train_bytes + report.heldout_bytes
    assert report.heldout_bytes <= 2 * MIB
    assert report.heldout_bytes >= min(64 * KIB, total // 4)
    sources = [document.source for document in (*train, *heldout)]
    assert len(set(sources)) == len(sources)
    return train, heldout


def test_whole_files_are_held_out(texts: Path, tmp_path: Path) -> None:
    report = build(tmp_path / "out", text=texts)
    train, heldout = check(tmp_path / "out", report)
    originals = {str(path.relative_to(texts)): path.read_text("utf-8") for path in texts.glob("*.txt")}
    found = {document.source: document.text for document in (*train, *heldout)}
    assert found.pop("below/code.py") == "# -*- coding: latin-1 -*-\nname = 'café'\n"
    assert found == originals
    assert 64 * KIB <= report.heldout_bytes <= 80 * KIB
    assert report.files == report.documents_read == 41
    assert report.cut == report.empty == report.duplicates == report.beyond_limit == 0


def test_the_same_text_gives_the_same_files(texts: Path, tmp_path: Path) -> None:
    first = build(tmp_path / "a", text=texts)
    second = build(tmp_path / "b", text=texts)
    assert first == second
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    again = build(tmp_path / "a", text=texts)
    assert again == first
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_another_seed_holds_out_other_files_in_another_order(texts: Path, tmp_path: Path) -> None:
    build(tmp_path / "a", text=texts)
    build(tmp_path / "b", text=texts, seed=1)
    held = [{d.source for d in documents(tmp_path / name, "heldout")} for name in "ab"]
    order = [[d.source for d in documents(tmp_path / name, "train")] for name in "ab"]
    assert held[0] != held[1]
    assert order[0] != sorted(order[0])
    assert order[0] != order[1]


def test_a_larger_fraction_holds_out_more_and_the_same_files_first(texts: Path, tmp_path: Path) -> None:
    small = build(tmp_path / "a", text=texts)
    large = build(tmp_path / "b", text=texts, heldout_fraction=0.5)
    total = large.train_bytes + large.heldout_bytes
    assert total * 0.5 <= large.heldout_bytes <= total * 0.63
    held = [{d.source for d in documents(tmp_path / name, "heldout")} for name in "ab"]
    assert held[0] < held[1]
    assert small.heldout_bytes < large.heldout_bytes


def test_what_cleaning_does_is_counted(texts: Path, tmp_path: Path) -> None:
    (texts / "dirty.txt").write_bytes("a\r\nb\x1b \t\ncafe\u0301\n".encode())
    (texts / "blank.txt").write_bytes(b" \n\n\t\n")
    (texts / "image.png").write_bytes(b"\x89PNG\0")
    before = build(tmp_path / "a", text=texts, exclude=[texts / "below"])
    assert (before.newlines, before.control, before.trailing, before.composed, before.empty) == (1, 1, 4, 1, 1)
    assert before.skipped == {"binary": 1, "output of athanor": 1}
    found = {d.source: d.text for d in (*documents(tmp_path / "a", "train"), *documents(tmp_path / "a", "heldout"))}
    assert found["dirty.txt"] == "a\nb\ncafé\n"
    assert "blank.txt" not in found
    # Every byte read is written or was removed: "\r", escape, four spaces, one byte of e + accent, and three empty lines.
    assert before.bytes_read == before.train_bytes + before.heldout_bytes + 1 + 1 + 4 + 1 + 3


def test_duplicates_are_dropped_after_cleaning(texts: Path, tmp_path: Path) -> None:
    original = (texts / "00.txt").read_bytes()
    (texts / "copy.txt").write_bytes(original)
    (texts / "copy_dos.txt").write_bytes(original.replace(b"\n", b"\r\n"))
    report = build(tmp_path / "out", text=texts)
    train, heldout = check(tmp_path / "out", report)
    assert report.duplicates == 2
    assert report.duplicate_bytes == 2 * len(original)
    assert len({d.source for d in (*train, *heldout)} & {"00.txt", "copy.txt", "copy_dos.txt"}) == 1


def test_one_big_file_is_held_out_in_part(tmp_path: Path, prose: Callable[..., str]) -> None:
    text = prose(400_000)
    path = tmp_path / "book.txt"
    path.write_text(text, encoding="utf-8")
    report = build(tmp_path / "out", text=path)
    train, heldout = check(tmp_path / "out", report)
    assert 64 * KIB <= report.heldout_bytes <= 80 * KIB
    assert report.cut == 1
    parts = {int(d.source.removeprefix("book.txt#")): d.text for d in (*train, *heldout)}
    assert "".join(parts[i] for i in sorted(parts)) == text
    assert len(heldout) > 3  # from several places of the file
    borders = [d.text.endswith("\n\n") for d in (*train, *heldout)]
    assert borders.count(False) <= 1  # the end of the file


def test_files_too_large_to_be_held_out_are_cut(tmp_path: Path, prose: Callable[..., str]) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(prose(150_000, seed=ord(name)), encoding="utf-8")
    report = build(tmp_path / "out", text=tmp_path)
    _, heldout = check(tmp_path / "out", report)
    assert report.cut == 3
    assert {d.source.split("#")[0] for d in heldout} == {"a.txt", "b.txt", "c.txt"}


def test_long_documents_are_cut_for_memory_and_stay_on_one_side(texts: Path, tmp_path: Path, prose: Callable[..., str]) -> None:
    (texts / "long.txt").write_text(prose(700_000), encoding="utf-8")
    report = build(tmp_path / "out", text=texts)
    train, heldout = check(tmp_path / "out", report)
    assert report.cut == 1
    assert [d.source for d in train if "#" in d.source] == ["long.txt#0", "long.txt#1", "long.txt#2"]
    assert not [d for d in heldout if "#" in d.source]


def test_text_without_any_border_is_cut_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "line.txt").write_text("🎉" * 30_000, encoding="utf-8")
    check(tmp_path / "out", build(tmp_path / "out", text=tmp_path / "line.txt"))


@pytest.mark.parametrize("count", [1, 2])
def test_two_mib_at_most_are_held_out(tmp_path: Path, prose: Callable[..., str], count: int) -> None:
    text = prose(2_500_000)
    for i in range(count):
        (tmp_path / f"{i}.txt").write_text(f"{i}\n{text}", encoding="utf-8")
    report = build(tmp_path / "out", text=tmp_path, heldout_fraction=0.5)
    check(tmp_path / "out", report)
    assert 1.2 * MIB <= report.heldout_bytes <= 2 * MIB


def test_limit_reads_a_part_that_the_whole_starts_with(texts: Path, tmp_path: Path) -> None:
    whole = build(tmp_path / "a", text=texts)
    part = build(tmp_path / "b", text=texts, limit_bytes=128 * KIB)
    check(tmp_path / "b", part)
    assert 128 * KIB <= part.train_bytes + part.heldout_bytes < 137 * KIB
    assert part.documents_read + part.beyond_limit == part.files == whole.files
    sources = [{d.source for s in ("train", "heldout") for d in documents(tmp_path / name, s)} for name in "ab"]
    assert sources[1] < sources[0]


def test_records_are_split_by_record(tmp_path: Path, prose: Callable[..., str]) -> None:
    lines = [json.dumps({"text": prose(3000, seed=i), "source": "the same"}) for i in range(100)]
    (tmp_path / "r.jsonl").write_text("\n".join(lines), encoding="utf-8")
    report = build(tmp_path / "out", text=tmp_path / "r.jsonl")
    train, heldout = check(tmp_path / "out", report)
    assert len(train) + len(heldout) == 100
    assert report.cut == 0


def test_own_output_is_not_read(texts: Path, tmp_path: Path) -> None:
    first = build(texts / "runs" / "corpus", text=texts)
    again = build(texts / "runs" / "corpus", text=texts)
    assert again.skipped == {"output of athanor": 1}
    assert (again.train_bytes, again.heldout_bytes, again.files) == (first.train_bytes, first.heldout_bytes, first.files)


def test_default_is_the_standard_library(tmp_path: Path) -> None:
    report = build(tmp_path / "out", limit_bytes=2 * MIB)
    train, _ = check(tmp_path / "out", report)
    root = Path(sysconfig.get_paths()["stdlib"])
    assert report.source == "Python standard library"
    assert all((root / document.source.split("#")[0]).is_file() for document in train)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 0.51, float("nan")])
def test_bad_fraction_is_refused(texts: Path, tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"heldout_fraction \(.*\) must be above 0 and at most 0.5: use 0.05"):
        build(tmp_path / "out", text=texts, heldout_fraction=fraction)


def test_bad_limit_is_refused(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"limit_bytes \(1000\) must be at least 65536: use that or leave it out"):
        build(tmp_path / "out", text=texts, limit_bytes=1000)


def test_too_little_text_is_refused_and_leaves_nothing(tmp_path: Path, prose: Callable[..., str]) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / name).write_text("x" * 30_000)
    (folder / "d").write_text("y" * 30_000)
    (folder / "image").write_bytes(b"\0")
    expected = (
        r"texts has 60000 bytes of text after cleaning \(dropped: 2 duplicates; not used: 1 binary\)"
        r" and must have at least 65536 to train and to measure: give more text"
    )
    with pytest.raises(DataError, match=expected):
        build(tmp_path / "out", text=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]
    (folder / "e").write_text("z" * 5_536)
    check(tmp_path / "out", build(tmp_path / "out", text=folder))


@pytest.mark.parametrize("binary", [False, True])
def test_folder_without_text_is_refused(tmp_path: Path, binary: bool) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    if binary:
        (folder / "a.bin").write_bytes(b"\0")
    why = "1 binary" if binary else "the folder is empty"
    with pytest.raises(DataError, match=rf"no text in '.*texts' \({why}\)"):
        build(tmp_path / "out", text=folder)


def test_a_folder_of_something_else_is_not_replaced(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    build(out, text=texts)  # an empty folder is fine
    shutil.rmtree(out)
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match=r"out is not empty and no corpus .*, so it is not replaced: choose another folder"):
        build(out, text=texts)
    assert (out / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file where a folder is to be written"):
        build(tmp_path / "file", text=texts)


def test_a_failed_build_leaves_the_old_corpus(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(out, text=texts)
    before = contents(out)
    (texts / "bad.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"bad.jsonl, line 1 is not JSON"):
        build(out, text=texts)
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts"]


def test_report_has_a_word_on_every_field() -> None:
    doc: Any = CorpusReport.__doc__
    assert [field.name for field in fields(CorpusReport) if field.name not in doc] == []


def test_beginning_cuts_the_last_document_and_sample_takes_a_share_of_each(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": c * 100, "source": c}) + "\n" for c in "abc"))
    assert [d.text for d in corpus.beginning(path, 150)] == ["a" * 100, "b" * 50]
    assert [len(d.text) for d in corpus.beginning(path, None)] == [100, 100, 100]
    assert [d.text for d in corpus.sample(path, 30)] == ["a" * 10, "b" * 10, "c" * 10]
    assert [len(d.text) for d in corpus.sample(path, 9999)] == [100, 100, 100]


def test_held_out_text_may_be_given(texts: Path, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    (given / "a.txt").write_bytes(b"short and held out \r\n")
    (given / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    shutil.copy(texts / "00.txt", given / "copy.txt")  # stands in the text too: it is taken from there
    report = build(tmp_path / "out", text=texts, heldout=given)
    train, heldout = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "heldout")
    assert {d.source: d.text for d in heldout} == {
        "heldout/a.txt": "short and held out\n",
        "heldout/b.jsonl:1": "one",
        "heldout/b.jsonl:2": "two",
        "heldout/copy.txt": (texts / "00.txt").read_text("utf-8"),
    }
    whole = build(tmp_path / "whole", text=texts)
    both = [*documents(tmp_path / "whole", "train"), *documents(tmp_path / "whole", "heldout")]
    assert {d.source for d in train} == {d.source for d in both} - {"00.txt"}
    assert (report.duplicates, report.files, report.documents_read) == (1, whole.files + 3, whole.documents_read + 4)
    assert (report.heldout, report.heldout_fraction) == (str(given), None)
    assert (whole.heldout, whole.heldout_fraction) == (None, 0.05)
    assert (tmp_path / "out" / "heldout.txt").read_bytes().decode() == "\n".join(document.text for document in heldout)
    assert report == build(tmp_path / "out", text=texts, heldout=given)


def test_a_limit_is_of_the_text_alone(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "given.txt").write_text("held out " * 20_000)
    report = build(tmp_path / "out", text=texts, heldout=tmp_path / "given.txt", limit_bytes=64 * KIB)
    assert report.train_bytes >= 64 * KIB and report.heldout_bytes == 180_000 - 1 and report.beyond_limit > 0


def test_held_out_text_that_is_none_is_refused(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"no text in '.*empty.txt' \(1 empty\)"):
        build(tmp_path / "out", text=texts, heldout=tmp_path / "empty.txt")
    with pytest.raises(DataError, match=r"text '.*nowhere' does not exist"):
        build(tmp_path / "out", text=texts, heldout=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_the_option_of_the_command(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "given.txt").write_text("held out")
    run, given = str(tmp_path / "run"), str(tmp_path / "given.txt")
    assert cli.main(["corpus", run, "--text", str(texts), "--heldout", given]) == 0
    assert "8 held out" in capsys.readouterr().out
    assert [d.text for d in documents(tmp_path / "run" / "corpus", "heldout")] == ["held out"]
    assert cli.main(["corpus", run, "--text", str(texts), "--heldout", given]) == 0
    assert cli.main(["corpus", run, "--text", str(texts)]) == 1
    assert "done with other heldout" in " ".join(capsys.readouterr().err.split())
    arguments = ["corpus", str(tmp_path / "b"), "--text", str(texts), "--heldout", given, "--heldout-fraction", "0.1"]
    assert cli.main(arguments) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"heldout_fraction (0.1) does not go with heldout ({given}), which is held out whole: give one of them" in said


def test_a_corpus_from_before_there_was_the_option_goes_on(texts: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    assert cli.main(["corpus", run, "--text", str(texts)]) == 0
    record = json.loads((tmp_path / "run" / "stages" / "corpus.json").read_text())
    assert "heldout" not in record["settings"]
