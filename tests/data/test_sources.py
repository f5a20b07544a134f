"""Sources: what is text is read, what is not is named, what cannot be read is an error."""

from __future__ import annotations

import json
import os
import re
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from athanor.core.errors import DataError
from athanor.data import sources
from athanor.data.sources import Skipped, default_corpus, read_documents, read_texts, standard_library_files, user_files
from athanor.types import Document


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_folder_is_read_with_what_lies_below_sorted(tmp_path: Path) -> None:
    write(tmp_path / "b.md", "B")
    write(tmp_path / "a" / "c.rst", "C")
    write(tmp_path / "a" / "no_suffix", "你好 🎉")
    write(tmp_path / "z.json", '{"kept": "as text"}')
    write(tmp_path / "bom.txt", b"\xef\xbb\xbfmarked")
    assert list(read_texts(tmp_path)) == [
        Document("C", "a/c.rst"),
        Document("你好 🎉", "a/no_suffix"),
        Document("B", "b.md"),
        Document("marked", "bom.txt"),
        Document('{"kept": "as text"}', "z.json"),
    ]
    assert list(read_texts(tmp_path / "b.md")) == [Document("B", "b.md")]
    assert list(read_texts(str(tmp_path / "b.md"))) == [Document("B", "b.md")]


def test_what_is_no_text_is_named_with_the_reason(tmp_path: Path) -> None:
    write(tmp_path / "good.txt", "good")
    write(tmp_path / "image.png", b"\x89PNG\r\n\x1a\n\0\0")
    write(tmp_path / "latin.txt", "café".encode("latin-1"))
    write(tmp_path / "utf16.txt", "wide".encode("utf-16"))
    write(tmp_path / "empty.txt", "")
    write(tmp_path / ".git" / "HEAD", "ref")
    os.mkfifo(tmp_path / "pipe.jsonl")
    skipped: Skipped = {}
    assert list(read_texts(tmp_path, skipped)) == [Document("good", "good.txt")]
    assert skipped == {
        "hidden": [".git"],
        "empty": ["empty.txt"],
        "binary": ["image.png", "utf16.txt"],
        "not UTF-8": ["latin.txt"],
        "not a regular file": ["pipe.jsonl"],
    }


def test_python_files_are_decoded_as_they_declare(tmp_path: Path) -> None:
    write(tmp_path / "a.py", "# coding: latin-1\ns = 'café'\n".encode("latin-1"))
    write(tmp_path / "b.py", "# coding: no_such_codec\n")
    write(tmp_path / "c.py", b"s = '\xff'\n")
    write(tmp_path / "d.py", "# coding: rot13\nx\n")
    skipped: Skipped = {}
    assert list(read_texts(tmp_path, skipped)) == [Document("# coding: latin-1\ns = 'café'\n", "a.py")]
    assert skipped == {"not UTF-8": ["b.py", "c.py", "d.py"]}


def test_records_are_documents(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", '{"text": "a", "source": "x"}\n\n{"text": "b", "other": 1}\n')
    assert list(read_texts(tmp_path)) == [Document("a", "r.jsonl:1"), Document("b", "r.jsonl:3")]
    assert list(read_documents(path)) == [Document("a", "x"), Document("b", "r.jsonl:3")]


def test_lone_surrogates_in_a_source_cannot_break_writing(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", r'{"text": "a", "source": "\ud800"}')
    assert [d.source for d in read_documents(path)] == ["?"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON (Expecting property name"),
        (b"\xff", "is not JSON ('utf-8' codec"),
        ("[" * 100_000, "is not JSON ("),
        ("[]", 'must be an object with a string field "text": correct it, or give the text as a .txt file'),
        ('"text"', "must be an object"),
        ("{}", "must be an object"),
        ('{"text": 3}', "must be an object"),
        ('{"text": null}', "must be an object"),
        ('{"text": "a", "source": 3}', 'field "source" (3) must be a string: correct it or leave it out'),
    ],
)
def test_bad_records_are_named_by_file_and_line(tmp_path: Path, line: str | bytes, message: str) -> None:
    data = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "r.jsonl", b'{"text": "good"}\n' + data + b"\n")
    for read in (read_documents, read_texts):
        with pytest.raises(DataError, match=f"{re.escape(str(path))}, line 2.*{re.escape(message)}"):
            list(read(path))


def test_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"text '.*/nowhere' does not exist: give a file or a folder"):
        list(read_texts(tmp_path / "nowhere"))


def test_folder_without_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no text in '.*' \(the folder is empty\): give files of UTF-8 text"):
        list(read_texts(tmp_path))
    write(tmp_path / "a.bin", b"\0")
    write(tmp_path / "b.bin", b"\0")
    write(tmp_path / "c.txt", "")
    with pytest.raises(DataError, match=r"no text in '.*' \(2 binary, 1 empty\): give files of UTF-8 text"):
        list(read_texts(tmp_path))
    with pytest.raises(DataError, match=r"no text in '.*a.bin' \(1 binary\)"):
        list(read_texts(tmp_path / "a.bin"))


def test_link_to_nothing(tmp_path: Path) -> None:
    write(tmp_path / "good.txt", "good")
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    expected = (
        r"link.txt is a link to nothing \(No such file.*\), and every file must be readable: correct its permissions or remove it"
    )
    for path in (tmp_path, tmp_path / "link.txt"):
        with pytest.raises(DataError, match=expected):
            list(read_texts(path))


def test_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "a")
    with pytest.raises(DataError, match=r"/a cannot be read \(.*symbolic link.*\)"):
        list(read_texts(tmp_path))


def test_folder_loop(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "t.txt", "x")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    with pytest.raises(
        DataError, match=r"/a/b/up is a link to a folder that it lies in, so reading would never end: remove the link"
    ):
        list(read_texts(tmp_path))


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "t.txt", "x")
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "one").symlink_to(tmp_path / "elsewhere")
    (folder / "two.txt").symlink_to(tmp_path / "elsewhere" / "t.txt")
    assert list(read_texts(folder)) == [Document("x", "one/t.txt"), Document("x", "two.txt")]


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = write(tmp_path / name, "x")

    def refuse(*args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    expected = (
        rf"{re.escape(str(path))} cannot be read \(Permission denied\), and every file must be readable: correct its permissions"
    )
    with pytest.raises(DataError, match=expected):
        list(read_texts(tmp_path))


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
        list(read_texts(tmp_path))


def test_excluded_folders_are_named(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "first" / "log.txt", "x")
    write(tmp_path / "t.txt", "x")
    skipped: Skipped = {}
    files = user_files(tmp_path, skipped, exclude=[tmp_path / "runs" / ".." / "runs" / "first"])
    assert [file.name for file in files] == ["t.txt"]
    assert skipped == {"output of athanor": ["runs/first/"]}


def test_file_names_that_are_not_utf8_become_text(tmp_path: Path) -> None:
    try:
        path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
        with open(path, "wb") as file:
            file.write(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert list(read_texts(tmp_path)) == [Document("x", "caf\ufffd.txt")]


def test_default_corpus_is_the_standard_library(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [file.name for file in standard_library_files({})]
    assert names == sorted(names)
    assert {"json/decoder.py", "argparse.py"} <= set(names)
    assert not [n for n in names if "site-packages" in n or "__pycache__" in n or not n.endswith(sources.DEFAULT_SUFFIXES)]
    monkeypatch.setattr(sources, "standard_library_files", lambda skipped: [f for f in _files if f.name.startswith("json/")])
    _files = standard_library_files({})
    import json.decoder

    documents = {document.source: document.text for document in default_corpus()}
    assert documents["json/decoder.py"] == Path(json.decoder.__file__).read_text(encoding="utf-8")


def test_standard_library_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    write(tmp_path / "here" / "site-packages" / "x.py", "x")
    (tmp_path / "here" / "sitecustomize.py").symlink_to("/nowhere/x.py")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "gone")})
    with pytest.raises(
        DataError, match=r"folder .*gone does not exist, so there is no default corpus: give your own text with --text"
    ):
        list(default_corpus())
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "here")})
    with pytest.raises(DataError, match=r"folder .*here has no source files, so there is no default corpus: give your own text"):
        list(default_corpus())
    write(tmp_path / "here" / "x.py", json.dumps("x"))
    skipped: Skipped = {}
    assert list(default_corpus(skipped)) == [Document('"x"', "x.py")]
    assert skipped == {"link to nothing": ["sitecustomize.py"]}
