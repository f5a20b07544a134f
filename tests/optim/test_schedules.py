"""The schedule: its values, and where it begins and ends."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from athanor.core.errors import ConfigError
from athanor.optim.schedules import warmup_cosine


def test_its_values():
    factor = warmup_cosine(11, 4, final=0.1)
    assert [factor(i) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(7) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 3 / 6)))
    assert factor(10) == pytest.approx(0.1)
    assert factor(500) == pytest.approx(0.1)


@given(steps=st.integers(2, 200), data=st.data(), final=st.floats(0, 1))
def test_it_rises_then_falls_to_its_final_value(steps, data, final):
    warmup = data.draw(st.integers(0, steps - 2))
    values = [warmup_cosine(steps, warmup, final)(i) for i in range(steps)]
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup] == pytest.approx(1.0)
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    assert values[-1] == pytest.approx(final, abs=1e-9)


def test_one_step_is_at_the_full_rate():
    assert warmup_cosine(1, 0)(0) == warmup_cosine(1, 1)(0) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 11), "warmup (11) must lie between 0 and steps (10)"),
        ((10, -1), "warmup (-1) must lie between 0 and steps (10)"),
        ((10, 1, 1.5), "final (1.5) is the last fraction of the learning rate: it must lie between 0 and 1"),
        ((10, 1, float("nan")), "final (nan) is the last fraction"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        warmup_cosine(*arguments)
