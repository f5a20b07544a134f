"""Compressors: their output decompresses, and the number is its size."""

import random
import shutil
import subprocess

import pytest

from athanor.core.errors import DataError
from athanor.data.compressors import bits_per_byte


def test_noise_cannot_be_compressed_and_repetition_can() -> None:
    noise = random.Random(0).randbytes(100_000)
    assert all(8.0 < bits < 8.1 for bits in bits_per_byte(noise).values())
    assert all(0.0 < bits < 0.05 for bits in bits_per_byte(b"athanor " * 100_000).values())
    assert list(bits_per_byte(b"x")) == ["gzip", "bz2", "xz"]


@pytest.mark.parametrize(("name", "command"), [("gzip", ["gzip", "-9n"]), ("bz2", ["bzip2", "-9"]), ("xz", ["xz", "-9e", "-T1"])])
def test_numbers_are_those_of_the_programs(name: str, command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    words = random.Random(0).choices([b"one", b"steady", b"heat", b"\n"], k=20_000)
    data = b" ".join(words)
    theirs = subprocess.run([*command, "-c"], input=data, capture_output=True, check=True).stdout
    assert bits_per_byte(data)[name] == pytest.approx(8 * len(theirs) / len(data), rel=0.02)


def test_nothing_has_no_bits_per_byte() -> None:
    with pytest.raises(DataError, match=r"data is empty \(0 bytes\).*: give at least one byte"):
        bits_per_byte(b"")
