"""Compressed files are read as the text that they hold; damaged ones are named."""

import bz2
import gzip
import lzma

import pytest

from athanor.core.errors import DataError
from athanor.data.compressed import read_text, suffix
from athanor.data.sources import read_texts
from athanor.types import Document

COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, "": bytes}
TEXT = "The heat,\n你好\n"


@pytest.mark.parametrize("end", COMPRESS)
def test_texts_and_records(end, tmp_path):
    (tmp_path / f"a.txt{end}").write_bytes(COMPRESS[end](b"\xef\xbb\xbf" + TEXT.encode()))
    (tmp_path / f"b.jsonl{end}").write_bytes(COMPRESS[end](b'{"text": "one"}\n\n{"text": "two"}\n'))
    (tmp_path / f"c.py{end}").write_bytes(COMPRESS[end]("# coding: latin-1\ns = 'é'\n".encode("latin-1")))
    (tmp_path / f"d.bin{end}").write_bytes(COMPRESS[end](b"\0"))
    assert read_text(tmp_path / f"a.txt{end}") == TEXT
    assert suffix(tmp_path / f"b.jsonl{end}") == ".jsonl"
    skipped = {}
    assert list(read_texts(tmp_path, skipped)) == [
        Document(TEXT, f"a.txt{end}"),
        Document("one", f"b.jsonl{end}:1"),
        Document("two", f"b.jsonl{end}:3"),
        Document("# coding: latin-1\ns = 'é'\n", f"c.py{end}"),
    ]
    assert skipped == {"binary": [f"d.bin{end}"]}


@pytest.mark.parametrize("end", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("kind", ["cut", "other", "bits"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_damage_is_named(end, kind, name, tmp_path):
    whole = COMPRESS[end](b'{"text": "' + bytes(range(48, 80)) * 50 + b'"}\n')
    middle = len(whole) // 2
    content = {"cut": whole[:-9], "other": b"no such thing", "bits": whole[:middle] + b"\xff" * 8 + whole[middle + 8 :]}[kind]
    path = tmp_path / (name + end)
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}{end} cannot be read \(.+\): check the path, or copy the file again"):
        read_text(path)
    # gzip gives out what it has before it comes to the check sum: a record may be seen to be broken earlier.
    with pytest.raises(DataError, match=rf"{name}{end}(, line 1 is not JSON| cannot be read) \(.+\)(:|, and every file)"):
        list(read_texts(tmp_path))


def test_what_is_no_text_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 \(invalid start byte at byte 2\): save it as UTF-8"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"b\.txt cannot be read \(.*No such file.*\): check the path"):
        read_text(tmp_path / "b.txt")
