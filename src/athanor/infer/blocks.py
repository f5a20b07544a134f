"""Who holds which block of the paged cache, and which blocks hold the beginnings of which texts. Pure Python, no torch.

A full block is known by its content: what all tokens up to its end are. A request whose prompt begins as another one did reads
that one's blocks and computes only the rest (prefix cache). A block that nobody holds keeps its content until it is needed for
another one; the one that was left longest ago goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

_Key = tuple[int, tuple[int, ...]]  # the content before a block, and its tokens


class Chain:
    """How far the blocks of one sequence are known by their content.

    content  number of the content of all blocks known so far; 0 is no block
    blocks   how many these are
    """

    __slots__ = ("blocks", "content")

    def __init__(self, content: int = 0, blocks: int = 0) -> None:
        self.content, self.blocks = content, blocks


class Blocks:
    """Blocks 1 .. count; 0 belongs to nobody, for rows that are computed to fill up a batch.

    Contents are numbers that are never used twice, given to (content before, tokens): two texts never meet in one number, as they
    could in a hash.

    Args:
        count: how many can be held.
        size: tokens of one.
        share: whether contents are remembered.
    """

    def __init__(self, count: int, size: int, *, share: bool = True) -> None:
        self.count, self.size, self.share = count, size, share
        self._empty = list(range(count, 0, -1))  # nothing of use in them
        self._idle: OrderedDict[int, None] = OrderedDict()  # held by nobody, with a content; the oldest first
        self._holders = [0] * (count + 1)
        self._block: dict[_Key, int] = {}
        self._key: dict[int, _Key] = {}  # of a block that is known
        self._content: dict[int, int] = {}  # likewise
        self._next = 0

    @property
    def free(self) -> int:
        """Blocks that can be had."""
        return len(self._empty) + len(self._idle)

    @property
    def usage(self) -> float:
        """Share of the blocks that somebody holds."""
        return 1 - self.free / self.count

    def needed(self, tokens: int) -> int:
        """Blocks of so many tokens."""
        return -(-tokens // self.size)

    def match(self, tokens: Sequence[int]) -> tuple[list[int], Chain]:
        """Hold the blocks of the longest known beginning of `tokens` that leaves one of them to be computed."""
        found: list[int] = []
        chain = Chain()
        for start in range(0, (len(tokens) - 1) // self.size * self.size, self.size):
            block = self._block.get((chain.content, tuple(tokens[start : start + self.size])))
            if block is None:
                break
            if not self._holders[block]:
                del self._idle[block]
            self._holders[block] += 1
            found.append(block)
            chain.content = self._content[block]
        chain.blocks = len(found)
        return found, chain

    def next_key(self, chain: Chain, tokens: Sequence[int]) -> _Key | None:
        """What the first block after those of `chain` will be known by; None where `tokens` do not fill one."""
        start = chain.blocks * self.size
        piece = tuple(tokens[start : start + self.size])
        return (chain.content, piece) if self.share and len(piece) == self.size else None

    def take(self, count: int) -> list[int]:
        """Hold `count` blocks with nothing in them; there must be as many (`free`)."""
        taken = []
        for _ in range(count):
            block = self._empty.pop() if self._empty else self._forget_oldest()
            self._holders[block] = 1
            taken.append(block)
        return taken

    def publish(self, chain: Chain, table: Sequence[int], tokens: Sequence[int], computed: int) -> None:
        """Make the full blocks of a sequence known, whose first `computed` tokens are in the cache."""
        if not self.share:
            return
        while (chain.blocks + 1) * self.size <= computed:
            start = chain.blocks * self.size
            key = (chain.content, tuple(tokens[start : start + self.size]))
            known = self._block.get(key)
            if known is None:  # two that computed the same at once: the first one is found, the other's goes when it is left
                known = table[chain.blocks]
                self._next += 1
                self._block[key], self._key[known], self._content[known] = known, key, self._next
            chain.content = self._content[known]
            chain.blocks += 1

    def release(self, table: Sequence[int]) -> None:
        """Let a sequence's blocks go. The end of a text is of less use than its beginning, so it is what will be reused first."""
        for block in reversed(table):
            self._holders[block] -= 1
            if not self._holders[block]:
                if block in self._key:
                    self._idle[block] = None
                else:
                    self._empty.append(block)

    def forget(self) -> None:
        """Know no content any more: the weights have changed."""
        self._empty += self._idle
        self._idle.clear()
        self._block.clear()
        self._key.clear()
        self._content.clear()

    def _forget_oldest(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._block[self._key.pop(block)], self._content[block]
        return block
