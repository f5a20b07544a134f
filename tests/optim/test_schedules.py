"""The schedule: its values, and where it begins and ends."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from athanor.core.errors import ConfigError
from athanor.optim.schedules import ScheduleConfig, constant, inverse_sqrt, schedule, warmup_cosine, warmup_stable_decay


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


def theirs(name, warmup, steps, **options):
    """transformers' factor by step. While it rises theirs is one step behind, and 0 in the first."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    made = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps, scheduler_specific_kwargs=options)
    return made.lr_lambdas[0]


STEPS, WARMUP = 40, 8
# Name, theirs, the options of theirs. What falls to its final value has it in our last step, and in theirs one later.
SAME = [
    ("cosine", "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("wsd", "warmup_stable_decay", {"num_decay_steps": 10, "decay_type": "linear", "min_lr_ratio": 0.0}),
    ("linear", "linear", {}),
    ("constant", "constant_with_warmup", {}),
]


@pytest.mark.parametrize(("name", "other", "options"), SAME, ids=[name for name, _, _ in SAME])
def test_they_are_those_of_transformers(name, other, options):
    final = {"constant": None, "cosine": 0.1}.get(name, 0.0)
    ours = schedule(ScheduleConfig(name, WARMUP / STEPS, 11 / STEPS if name == "wsd" else None, final), STEPS)
    factor = theirs(other, WARMUP, STEPS - 1, **options)
    for step in range(STEPS):
        assert ours(step) == pytest.approx(factor(step + 1 if step < WARMUP else step)), step


def test_inverse_sqrt_is_that_of_transformers_and_of_the_paper():
    ours = schedule(ScheduleConfig("inverse_sqrt", WARMUP / STEPS), STEPS)
    factor = theirs("inverse_sqrt", WARMUP, STEPS)
    for step in range(STEPS):
        assert ours(step) == pytest.approx(factor(step + 1)), step
        assert ours(step) == pytest.approx(min((step + 1) ** -0.5, (step + 1) * WARMUP**-1.5) * WARMUP**0.5)
    assert inverse_sqrt(0)(0) == 1.0


@given(
    name=st.sampled_from(["cosine", "linear", "wsd", "inverse_sqrt", "constant"]),
    steps=st.integers(1, 200),
    warmup=st.floats(0, 0.7),
    final=st.floats(0, 1),
)
def test_all_rise_to_1_and_never_rise_again(name, steps, warmup, final):
    falls = name in ("cosine", "linear", "wsd")
    factor = schedule(ScheduleConfig(name, warmup, final=final if falls else None), steps)
    values = [factor(i) for i in range(steps)]
    top = max(1, int(warmup * steps)) - 1 if warmup else 0
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top] == pytest.approx(1.0)
    assert values[top:] == sorted(values[top:], reverse=True)
    assert all(0 <= v <= 1 for v in values)
    if falls and steps > top + 3:
        assert values[-1] == pytest.approx(final, abs=1e-9)


@given(st.integers(1, 100_000))
def test_the_default_is_what_a_life_does(steps):
    ours, before = schedule(ScheduleConfig(), steps), warmup_cosine(steps, max(1, steps // 20), 0.05)
    assert all(ours(step) == before(step) for step in {0, steps // 30, steps // 20, steps // 2, steps - 1})


def test_stable_and_decay():
    factor = schedule(ScheduleConfig("wsd", 0.1, final=0.0), 20)
    assert [factor(i) for i in range(20)] == pytest.approx([0.5] + [1.0] * 16 + [2 / 3, 1 / 3, 0.0])
    assert warmup_stable_decay(5, 1, 0)(4) == 1.0
    # A decay of one step is that to `final`, and not a rate of 0 where it is the only step there is.
    assert [warmup_stable_decay(4, 0, 1)(i) for i in range(4)] == [1.0, 1.0, 1.0, 0.0]
    assert [warmup_stable_decay(2, 1, 1)(i) for i in range(2)] == [1.0, 1.0]
    assert warmup_stable_decay(1, 0, 1)(0) == 1.0
    assert constant(2)(0) == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ScheduleConfig("cosin"),
            "schedule.name ('cosin') must be one of cosine, linear, wsd, inverse_sqrt, constant; did",
        ),
        (lambda: ScheduleConfig(warmup=1.0), "schedule.warmup (1.0) is a share of the steps: it must lie in [0, 1)"),
        (lambda: ScheduleConfig(warmup=-0.1), "schedule.warmup (-0.1) is a share of the steps"),
        (lambda: ScheduleConfig("linear", decay=0.1), "schedule.decay (0.1) is read by wsd only, not by linear: leave it out"),
        (lambda: ScheduleConfig("constant", final=0.1), "schedule.final (0.1) is not read by constant, which ends where it ends"),
        (
            lambda: ScheduleConfig("wsd", 0.5, 0.6),
            "schedule.decay (0.6) is a share of the steps: it must be above 0, and at most",
        ),
        (lambda: ScheduleConfig(final=1.1), "final (1.1) is the last fraction of the learning rate"),
        (lambda: schedule(ScheduleConfig(), 0), "a schedule is over 1 step at least, not 0: raise steps"),
        (lambda: warmup_stable_decay(10, 4, 7), "decay (7) must lie between 0 and what the warmup leaves of the steps (6)"),
        (lambda: inverse_sqrt(-1), "warmup (-1) must not be negative"),
        (lambda: constant(-1), "warmup (-1) must not be negative"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()
