from hypothesis import given
from hypothesis import strategies as st

from athanor.align.curriculum import Curriculum


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.floats(0, 1)), max_size=20), st.integers(1, 50), st.integers())
def test_the_draw_is_a_function_of_updates_and_seed(updates, count, seed):
    one, two = Curriculum("abc"), Curriculum("abc")
    for rates in updates:
        one.update(rates)
        two.update(rates)
    drawn = one.draw(count, seed)
    assert drawn == two.draw(count, seed)
    assert sum(drawn.values()) == count
    assert all(n > 0 for n in drawn.values())


def test_what_is_undecided_is_asked_more_often_than_what_is_mastered_or_hopeless():
    curriculum = Curriculum(["mastered", "hopeless", "open"])
    for _ in range(60):
        curriculum.update({"mastered": 1.0, "hopeless": 0.0, "open": 0.5})
    drawn = curriculum.draw(3000, seed=0)
    assert drawn["open"] > 3 * max(drawn["mastered"], drawn["hopeless"])
    assert min(drawn.values()) > 100  # neither is forgotten
