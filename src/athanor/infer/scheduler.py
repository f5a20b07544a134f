"""Who runs in which row: first come first served, rows kept dense. Pure Python, no torch."""

from __future__ import annotations

from collections import deque

from athanor.infer.sequence import Sequence


class Scheduler:
    """Waiting requests and running rows.

    Rows 0 .. len(running)-1 of the cache are always in use and no others: a decoding step then reads one dense slice.

    Args:
        max_batch: rows at most.
    """

    def __init__(self, max_batch: int) -> None:
        self.max_batch = max_batch
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._dropped: list[Sequence] = []  # aborted before they ran

    @property
    def has_work(self) -> bool:
        """Whether a sequence is waiting, running or yet to be retired."""
        return bool(self.waiting or self.running or self._dropped)

    def admit(self) -> list[Sequence]:
        """Move waiting sequences into free rows, in order of arrival; returns those that were moved."""
        count = min(len(self.waiting), self.max_batch - len(self.running))
        admitted = [self.waiting.popleft() for _ in range(count)]
        self.running += admitted
        return admitted

    def retire(self) -> tuple[list[Sequence], list[tuple[int, int]]]:
        """Take finished sequences out and close the gaps with the last rows.

        Returns:
            the finished, and the moves (from row, to row) by which the cache has to follow.
        """
        finished = [s for s in self.running if s.finish_reason]
        dropped, self._dropped = self._dropped, []
        if not finished:
            return dropped, []
        kept = len(self.running) - len(finished)
        gaps = [row for row in range(kept) if self.running[row].finish_reason]
        movers = [row for row in range(kept, len(self.running)) if not self.running[row].finish_reason]
        moves = list(zip(movers, gaps, strict=True))
        for source, target in moves:
            self.running[target] = self.running[source]
        del self.running[kept:]
        return finished + dropped, moves

    def drop(self, request_id: str) -> None:
        """Mark a sequence as aborted: the next `retire` takes it out. Unknown ids are no error."""
        for sequence in self.running:
            if sequence.request.id == request_id:
                sequence.finish_reason = "abort"
                return
        for sequence in self.waiting:
            if sequence.request.id == request_id:
                self.waiting.remove(sequence)
                sequence.finish_reason = "abort"
                self._dropped.append(sequence)
                return
