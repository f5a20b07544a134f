"""What general-purpose compressors make of a text: the yardstick beside a model's bits per byte.

A model that predicts each byte with probability p needs sum(-log2 p) / bytes bits per byte; a compressor's output size is the
same kind of number. Source: Deletang et al. 2024, "Language Modeling Is Compression".
"""

from __future__ import annotations

import bz2
import gzip
import lzma

from athanor.core.errors import DataError


def bits_per_byte(data: bytes) -> dict[str, float]:
    """8 x compressed bytes / bytes for gzip -9, bz2 -9 and xz -9e, headers included. Raises DataError when `data` is empty."""
    if not data:
        raise DataError("data is empty (0 bytes), so it has no bits per byte: give at least one byte of text")
    compressed = {
        "gzip": gzip.compress(data, compresslevel=9, mtime=0),
        "bz2": bz2.compress(data, compresslevel=9),
        "xz": lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    }
    return {name: 8 * len(result) / len(data) for name, result in compressed.items()}
