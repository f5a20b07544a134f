"""The scheduler and its blocks: what is in the cache is what was computed, nobody is forgotten and nothing leaks. No torch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from athanor.infer.blocks import Blocks, Chain
from athanor.infer.scheduler import Scheduler
from athanor.infer.sequence import Sequence
from athanor.types import Request, SamplingParams

SIZE = 4


def request(name, prompt=(1,), priority=0, **params):
    return Sequence(Request(str(name), list(prompt), SamplingParams(**params), priority), None)


class Machine:
    """A scheduler and a cache that holds, for each place in a block, the whole text up to there."""

    def __init__(self, count, max_batch, step_tokens, share=True):
        self.blocks = Blocks(count, SIZE, share=share)
        self.scheduler = Scheduler(self.blocks, max_batch, step_tokens)
        self.cache = {}
        self.ended = []

    def step(self, finishing=()):
        self.ended += [s.request.id for s in self.scheduler.retire()]
        work = self.scheduler.schedule()
        assert sum(w.tokens for w in work) <= self.scheduler.step_tokens
        assert len({w.sequence.request.id for w in work}) == len(work)
        for sequence, count in work:
            at = sequence.computed
            for i in range(at):  # what is read
                assert self.cache[sequence.table[i // SIZE], i % SIZE] == tuple(sequence.tokens[: i + 1])
            for i in range(at, at + count):
                self.cache[sequence.table[i // SIZE], i % SIZE] = tuple(sequence.tokens[: i + 1])
        for w in work:
            self.scheduler.computed(w.sequence, w.sequence.computed + w.tokens)
            if w.sequence.computed == w.sequence.length:
                token = hash((w.sequence.request.id, w.sequence.length)) % 5
                w.sequence.ids.append(token)
                w.sequence.tokens.append(token)
                if w.sequence.request.id in finishing or len(w.sequence.ids) >= w.sequence.request.params.max_tokens:
                    w.sequence.finish_reason = "stop"
        self.check()
        return work

    def check(self):
        s, held = self.scheduler, {}
        for sequence in s.running:
            for block in sequence.table:
                held[block] = held.get(block, 0) + 1
        assert 0 not in held
        assert all(self.blocks._holders[b] == n for b, n in held.items())
        assert self.blocks.free == self.blocks.count - len(held)
        assert not set(self.blocks._empty) & set(self.blocks._idle)
        assert len(set(self.blocks._empty)) == len(self.blocks._empty)
        slots = [sequence.slot for sequence in s.running]
        assert None not in slots and sorted(slots + s._slots) == list(range(s.max_batch))
        assert s.running == sorted(s.running, key=lambda x: x.order) and s.waiting == sorted(s.waiting, key=lambda x: x.order)
        for sequence in s.running:  # less than a block of a sequence is empty
            assert len(sequence.table) == self.blocks.needed(max(sequence.computed, 1)) or sequence.finish_reason


ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=14), st.integers(1, 9), st.integers(-1, 1)),
        ),
        st.tuples(st.just("step"), st.sets(st.integers(0, 12))),
        st.tuples(st.just("drop"), st.integers(0, 12)),
        st.tuples(st.just("forget"), st.none()),
    ),
    max_size=40,
)


@given(actions=ACTIONS, count=st.integers(6, 20), max_batch=st.integers(1, 5), extra=st.integers(0, 20), share=st.booleans())
def test_what_is_read_was_computed_and_nobody_is_lost(actions, count, max_batch, extra, share):
    machine = Machine(count, max_batch, max_batch + extra, share)
    added = []
    for action, value in actions:
        if action == "add":
            prompt, tokens, priority = value
            machine.scheduler.add(request(len(added), prompt, priority, max_tokens=tokens))
            added.append(str(len(added)))
        elif action == "drop":
            machine.scheduler.drop(str(value))
        elif action == "forget":
            machine.blocks.forget()
        else:
            machine.step({str(i) for i in value})
        s = machine.scheduler
        everyone = [x.request.id for x in (*s.waiting, *s.running, *s._dropped)] + machine.ended
        assert sorted(everyone) == sorted(added)
    for _ in range(2000):
        if not machine.scheduler.has_work:
            break
        machine.step()
    assert sorted(machine.ended) == sorted(added)
    assert machine.blocks.free == count and machine.blocks.usage == 0


def test_requests_are_served_by_priority_and_then_as_they_came():
    machine = Machine(20, 1, 8)
    for name, priority in (("a", 0), ("b", 0), ("c", -1), ("d", 1)):
        machine.scheduler.add(request(name, [1], priority, max_tokens=1))
    while machine.scheduler.has_work:
        machine.step()
    assert machine.ended == ["c", "a", "b", "d"]


def test_a_long_prompt_is_computed_in_parts_and_nobody_waits_for_it():
    machine = Machine(20, 2, 4)
    machine.scheduler.add(request("short", [1], max_tokens=9))
    machine.step()
    machine.scheduler.add(request("long", [2] * 9, max_tokens=2))
    shares = [{w.sequence.request.id: w.tokens for w in machine.step()} for _ in range(4)]
    assert shares == [{"short": 1, "long": 3}] * 3 + [{"short": 1, "long": 1}]


def test_the_last_gives_way_when_the_cache_is_full_and_is_not_lost():
    machine = Machine(3, 2, 16, share=False)
    machine.scheduler.add(request("a", [1] * 4, max_tokens=8))
    machine.scheduler.add(request("b", [2] * 4, max_tokens=3))
    while machine.scheduler.has_work:
        machine.step()
    assert machine.scheduler.preemptions >= 1 and sorted(machine.ended) == ["a", "b"]


def test_a_beginning_that_was_computed_is_read():
    machine = Machine(20, 2, 64)
    text = [*range(10)]
    machine.scheduler.add(request("a", [*text, 1], max_tokens=1))
    machine.step()
    machine.scheduler.add(request("b", [*text, 2], max_tokens=1))
    assert [w.tokens for w in machine.step() if w.sequence.request.id == "b"] == [11 - 8]
    assert (machine.scheduler.queries, machine.scheduler.hits) == (22, 8)


def test_who_needs_what_is_being_computed_waits_a_step_and_reads_it():
    machine = Machine(20, 4, 64)
    for i in range(3):
        machine.scheduler.add(request(i, [7] * 8 + [i], max_tokens=1))
    assert [[w.tokens for w in machine.step()] for _ in range(2)] == [[9], [1, 1]]


def test_equal_texts_are_computed_in_one_step():
    machine = Machine(20, 4, 64)
    for i in range(3):
        machine.scheduler.add(request(i, [7] * 9, max_tokens=1))
    assert [w.tokens for w in machine.step()] == [9, 9, 9]


def test_log_probabilities_of_a_prompt_need_all_of_it():
    machine = Machine(20, 2, 64)
    for name, asked in (("a", None), ("b", 0)):
        machine.scheduler.add(request(name, [7] * 9, max_tokens=1, prompt_logprobs=asked))
        assert [w.tokens for w in machine.step()] == [9]


def test_what_nobody_holds_goes_first_that_was_left_first_and_ends_before_beginnings():
    blocks = Blocks(4, 2)
    chains = {}
    for text in ((1, 2, 3, 4), (5, 6)):
        table, chain = blocks.match((*text, 0))
        table += blocks.take(len(text) // 2)
        blocks.publish(chain, table, text, len(text))
        chains[text] = table
        blocks.release(table)
    assert blocks.free == 4 and blocks.take(2)  # one that was empty, and the end of the first text
    found, chain = blocks.match((1, 2, 3, 4, 0))
    assert (found, chain.blocks) == (chains[1, 2, 3, 4][:1], 1)
    assert len(blocks.match((5, 6, 0))[0]) == 1
    blocks.forget()
    assert blocks.match((5, 6, 0))[0] == []


def test_two_that_computed_the_same_are_one_for_others():
    blocks = Blocks(6, 2)
    tables = [blocks.take(2) for _ in range(2)]
    for table in tables:
        blocks.publish(Chain(), table, (1, 2, 3, 4), 4)
    assert blocks.match((1, 2, 3, 4, 5))[0] == tables[0]
    for table in tables:
        blocks.release(table)
    assert blocks.free == 4  # two are held by the match


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_blocks_of_a_number_of_tokens(tokens, blocks):
    assert Blocks(3, 4).needed(tokens) == blocks
