"""The scheduler: rows stay dense, first come first served, and nobody is forgotten. No torch."""

from hypothesis import given
from hypothesis import strategies as st

from athanor.infer.scheduler import Scheduler
from athanor.infer.sequence import Sequence
from athanor.types import Request

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 4)),
        st.tuples(st.just("step"), st.sets(st.integers(0, 5))),  # rows that finish in this step
        st.tuples(st.just("drop"), st.integers(0, 30)),
    ),
    max_size=40,
)


@given(actions=ACTIONS, max_batch=st.integers(1, 6))
def test_rows_are_dense_requests_are_served_in_order_and_none_is_lost(actions, max_batch):
    scheduler = Scheduler(max_batch)
    cache = {}  # row -> id, as the runner would hold it
    added, started, ended = [], [], []

    def retire():
        finished, moves = scheduler.retire()
        ended.extend(s.request.id for s in finished)
        rows_in_use = len(scheduler.running)
        for source, target in moves:
            assert target < rows_in_use <= source  # no row is both: the moves may happen at once
            cache[target] = cache[source]
        for row in [r for r in cache if r >= rows_in_use]:
            del cache[row]

    for action, value in actions:
        if action == "add":
            for _ in range(value):
                added.append(str(len(added)))
                scheduler.waiting.append(Sequence(Request(added[-1], [1]), None))
        elif action == "drop":
            scheduler.drop(str(value))
        else:
            retire()
            for row in value:
                if row < len(scheduler.running):
                    scheduler.running[row].finish_reason = "stop"
            retire()
            first = len(scheduler.running)
            for row, s in enumerate(scheduler.admit(), first):
                cache[row] = s.request.id
                started.append(s.request.id)
        assert len(scheduler.running) <= max_batch
        assert cache == {row: s.request.id for row, s in enumerate(scheduler.running)}
        everyone = [s.request.id for s in (*scheduler.waiting, *scheduler.running, *scheduler._dropped)] + ended
        assert sorted(everyone) == sorted(added)
    assert started == sorted(started, key=int)
    for _ in added:
        retire()
        for row, s in enumerate(scheduler.admit(), len(scheduler.running) - 0):
            cache[row] = s.request.id
        for s in scheduler.running:
            s.finish_reason = "stop"
    retire()
    assert not scheduler.has_work
    assert sorted(ended) == sorted(added)


def test_a_free_row_is_given_to_the_first_that_waits():
    scheduler = Scheduler(2)
    for name in "abcd":
        scheduler.waiting.append(Sequence(Request(name, [1]), None))
    assert [s.request.id for s in scheduler.admit()] == ["a", "b"]
    assert scheduler.admit() == []
    scheduler.running[0].finish_reason = "stop"
    finished, moves = scheduler.retire()
    assert ([s.request.id for s in finished], moves) == (["a"], [(1, 0)])
    assert [s.request.id for s in scheduler.admit()] == ["c"]
    assert [s.request.id for s in scheduler.running] == ["b", "c"]
