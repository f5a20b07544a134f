"""What is held out: the target is met for documents of any sizes, and pieces are the document."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from athanor.data.holdout import LARGEST, SMALLEST, choose, order, target_bytes
from athanor.types import Document

SIZES = st.lists(st.integers(1, 4000) | st.integers(1, 40), min_size=1, max_size=30)


@given(
    sizes=SIZES, letters=st.sampled_from(["a", "a b", "a\n", "🎉", "ab\n\n"]), seed=st.integers(0, 3), share=st.floats(0.02, 0.5)
)
def test_target_is_met_for_documents_of_any_size(sizes: list[int], letters: str, seed: int, share: float) -> None:
    found = [Document((letters * size)[:size], str(i)) for i, size in enumerate(sizes)]
    total = sum(len(d.text.encode()) for d in found)
    target = max(int(total * share), min(total, 128))
    held = choose(lambda: found, target, seed)
    pieces = [(text, is_held) for document in found for text, is_held in held.pieces(document)]
    assert "".join(text for text, _ in pieces) == "".join(d.text for d in found)
    assert target <= sum(len(text.encode()) for text, is_held in pieces if is_held) <= 1.25 * target
    if held.part is None:
        assert all(text == d.text for d in found for text, _ in held.pieces(d))
    else:
        flags = [[is_held for _, is_held in held.pieces(d)] for d in found]
        assert all(a != b for each in flags for a, b in pairwise(each))  # runs are joined
    assert choose(lambda: list(reversed(found)), target, seed) == held


def test_target_is_met_whichever_part_comes_first() -> None:
    # Parts of four-byte characters are as large as parts can be; the last one is half as large.
    document = Document("🎉" * (256 * 20 + 128), "x")
    for seed in range(40):
        held = choose(lambda: [document], 4096, seed)
        assert 4096 <= sum(len(text.encode()) for text, is_held in held.pieces(document) if is_held) <= 5120


def test_target() -> None:
    assert target_bytes(10_000_000, 0.05) == 500_000
    assert target_bytes(1_000_000, 0.05) == SMALLEST == 65_536
    assert target_bytes(100_000, 0.05) == 25_000
    assert target_bytes(100_000, 0.5) == 50_000
    assert target_bytes(10**9, 0.05) == LARGEST == 2_097_152


def test_order_is_of_seed_and_name() -> None:
    keys = {order(seed, name) for seed in (0, 1, 11) for name in ("", "1", "1x", "你")}
    assert len(keys) == 12
    assert order(0, "a.txt").hex().startswith("eb32fc64")  # pinned: another order is another corpus
