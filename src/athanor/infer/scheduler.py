"""Which requests run, and how many tokens of each the next step computes. Pure Python, no torch.

A step has room for so many tokens. Requests that run come first, each with the token that it made last; what is left goes to
prompts, which are cut where they do not fit (chunked prefill). When the cache is full, the request that would be served last
gives its blocks back and waits again; what it had is computed once more (preemption by recompute, Kwon et al. 2023, 4.5).
"""

from __future__ import annotations

from bisect import insort
from typing import NamedTuple

from athanor.infer.blocks import Blocks
from athanor.infer.sequence import Sequence


class Work(NamedTuple):
    """What a step does for one sequence: compute so many `tokens` after the `sequence.computed` that are in the cache."""

    sequence: Sequence
    tokens: int


class Scheduler:
    """Waiting and running requests, in the order in which they are served: by priority, then as they came.

    Args:
        blocks: of the cache. A sequence alone must find room in it.
        max_batch: sequences that run at once.
        step_tokens: tokens of one step at most; at least `max_batch`.
    """

    def __init__(self, blocks: Blocks, max_batch: int, step_tokens: int) -> None:
        self.blocks, self.max_batch, self.step_tokens = blocks, max_batch, step_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = self.queries = self.hits = 0
        self._slots = list(range(max_batch - 1, -1, -1))
        self._dropped: list[Sequence] = []  # aborted before they ran
        self._number = 0

    @property
    def has_work(self) -> bool:
        """Whether a sequence is waiting, running or yet to be retired."""
        return bool(self.waiting or self.running or self._dropped)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait."""
        self._number += 1
        sequence.order = (sequence.request.priority, self._number)
        insort(self.waiting, sequence, key=_order)

    def schedule(self) -> list[Work]:
        """What the next step computes. Blocks for it are held already."""
        work: dict[int, Work] = {}  # by slot
        room, preempted = self.step_tokens, False
        for sequence in list(self.running):
            if sequence.slot is None:  # preempted by one before it
                continue
            count = min(sequence.due, room)
            if count < 1:
                continue
            while sequence.slot is not None and not self._hold(sequence, count):
                victim = self.running[-1]
                preempted = True
                assert victim.slot is not None
                room += work.pop(victim.slot, Work(victim, 0)).tokens
                self._preempt(victim)
            if sequence.slot is not None:
                work[sequence.slot] = Work(sequence, count)
                room -= count
        if not preempted:
            for sequence, count in self._admit(room):
                assert sequence.slot is not None
                work[sequence.slot] = Work(sequence, count)
        return list(work.values())

    def _admit(self, room: int) -> list[Work]:
        """Let waiting sequences run, in order, while there are places, blocks and room."""
        admitted: list[Work] = []
        coming = set()  # contents that this step computes: who needs the same one waits a step and reads it
        whole = set()  # texts that it computes from their start: the same one again costs nothing (`Runner.run`)
        for sequence in list(self.waiting):
            if not self._slots or room < 1:
                break
            table, chain = self.blocks.match(sequence.tokens) if sequence.reads_cache else ([], sequence.chain)
            key = self.blocks.next_key(chain, sequence.tokens)
            text = tuple(sequence.tokens)
            if key in coming and text not in whole:
                self.blocks.release(table)
                continue
            cached = len(table) * self.blocks.size
            count = min(sequence.length - cached, room)
            needed = self.blocks.needed(cached + count) - len(table)
            if needed > self.blocks.free:
                self.blocks.release(table)
                break  # nobody overtakes: a long prompt would wait for ever
            self.queries += sequence.length
            self.hits += cached
            if not sequence.ids:
                sequence.cached = cached
            if key is not None and count >= self.blocks.size:
                coming.add(key)
            if not cached:
                whole.add(text)
            sequence.table, sequence.chain, sequence.computed = table + self.blocks.take(needed), chain, cached
            sequence.slot = self._slots.pop()
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=_order)
            admitted.append(Work(sequence, count))
            room -= count
        return admitted

    def _hold(self, sequence: Sequence, count: int) -> bool:
        """Hold blocks for `count` more tokens; False where there are not enough."""
        more = self.blocks.needed(sequence.computed + count) - len(sequence.table)
        if more > self.blocks.free:
            return False
        sequence.table += self.blocks.take(max(0, more))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._leave(sequence)
        insort(self.waiting, sequence, key=_order)

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.running.remove(sequence)
        self._slots.append(sequence.slot)
        self.blocks.release(sequence.table)
        sequence.leave()

    def computed(self, sequence: Sequence, count: int) -> None:
        """Say that the first `count` tokens of a sequence are in the cache: others may read them."""
        sequence.computed = count
        self.blocks.publish(sequence.chain, sequence.table, sequence.tokens, count)

    def retire(self) -> list[Sequence]:
        """Take finished sequences out; their blocks and places are free."""
        finished = [s for s in self.running if s.finish_reason]
        for sequence in finished:
            self._leave(sequence)
        dropped, self._dropped = self._dropped, []
        return finished + dropped

    def drop(self, request_id: str) -> None:
        """Mark a sequence as aborted: the next `retire` takes it out. Unknown ids are no error."""
        for sequence in self.running:
            if sequence.request.id == request_id:
                sequence.finish_reason = sequence.finish_reason or "abort"
                return
        for sequence in self.waiting:
            if sequence.request.id == request_id:
                self.waiting.remove(sequence)
                sequence.finish_reason = "abort"
                self._dropped.append(sequence)
                return


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
