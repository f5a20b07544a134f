"""Exact duplicates: of equal cleaned texts only the first is kept.

Source: Lee et al. 2022, "Deduplicating Training Data Makes Language Models Better" (exact matches of whole documents).
"""

from __future__ import annotations

import hashlib


class ExactDedup:
    """Remembers texts by SHA-256 (32 bytes each).

    Attributes:
        duplicates: texts that were there before.
        duplicate_bytes: their UTF-8 bytes together.
    """

    def __init__(self) -> None:
        self.duplicates = 0
        self.duplicate_bytes = 0
        self._seen: set[bytes] = set()

    def is_new(self, text: str) -> bool:
        """Whether `text` comes for the first time; counts it as a duplicate when not."""
        data = text.encode("utf-8")
        digest = hashlib.sha256(data).digest()
        if digest in self._seen:
            self.duplicates += 1
            self.duplicate_bytes += len(data)
            return False
        self._seen.add(digest)
        return True
