"""Exact duplicates: against a set of texts."""

from hypothesis import given
from hypothesis import strategies as st

from athanor.data.dedup import ExactDedup


@given(texts=st.lists(st.sampled_from(["", "a", "b", "ab", "你", "é", "e\u0301"])))
def test_first_of_each_is_kept_and_the_rest_counted(texts: list[str]) -> None:
    dedup = ExactDedup()
    kept = [text for text in texts if dedup.is_new(text)]
    assert kept == list(dict.fromkeys(texts))
    assert dedup.duplicates == len(texts) - len(kept)
    assert dedup.duplicate_bytes == sum(len(t.encode()) for t in texts) - sum(len(t.encode()) for t in kept)
