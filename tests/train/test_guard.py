"""Jumps and standstill: what is judged, by which threshold, and that a resumed run judges as the uninterrupted one."""

import json
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import median_abs_deviation

from athanor.core.errors import CheckpointError, ConfigError, TrainingError
from athanor.train.guard import EarlyStop, Guard, SpikeConfig, StopConfig, threshold

FINITE = st.floats(-1e6, 1e6)
LOSSES = st.lists(st.tuples(st.floats(-100, 100), st.floats(0, 100)), max_size=60)
CONFIGS = st.builds(
    SpikeConfig, st.sampled_from(["none", "skip", "rollback"]), st.floats(0.5, 20), st.integers(4, 12), st.just(1000)
)


def through_json(state):
    return json.loads(json.dumps(state, allow_nan=False))


@given(st.lists(FINITE, min_size=1, max_size=40), st.floats(0.1, 50))
def test_the_threshold_is_that_of_the_median_absolute_deviation(values, factor):
    deviation = float(median_abs_deviation(values))
    least = max(0.01 * abs(statistics.median(values)), 1e-6)
    assert threshold(values, factor) == pytest.approx(
        statistics.median(values) + factor * max(deviation, least), rel=1e-9, abs=1e-9
    )


def judged(guard, steps, checkpoint=0, first=0):
    return [guard.judge(first + i, loss, norm, checkpoint) for i, (loss, norm) in enumerate(steps)]


@given(CONFIGS, LOSSES, st.integers(0, 60))
def test_a_resumed_guard_judges_as_the_uninterrupted_one(config, steps, cut):
    whole, first, second = Guard(config), Guard(config), Guard(config)
    expected = judged(whole, steps)
    found = judged(first, steps[:cut])
    second.load(through_json(first.state()))
    found += judged(second, steps[cut:], first=min(cut, len(steps)))
    assert found == expected and second.state() == whole.state() and second.record() == whole.record()


@given(CONFIGS, LOSSES)
def test_what_is_judged_is_what_is_above_the_threshold_of_the_steps_that_were_taken(config, steps):
    taken = []
    guard = Guard(config)
    for (loss, norm), found in zip(steps, judged(guard, steps), strict=True):
        last = taken[-config.window :]
        jumped = len(last) == config.window and (
            loss > threshold([x for x, _ in last], config.factor) or norm > threshold([n for _, n in last], config.factor)
        )
        assert found == (config.action if jumped else "none")
        if not jumped:
            taken.append((loss, norm))
    assert guard.skipped + guard.rolled_back == (len(steps) - len(taken) if config.action != "none" else 0)


@given(st.integers(4, 20), st.floats(-1e3, 1e3), st.lists(st.floats(-1e-3, 1e-3), min_size=30, max_size=30))
def test_a_level_loss_never_jumps(window, level, ripples):
    guard = Guard(SpikeConfig("skip", window=window, most=0))
    assert set(judged(guard, [(level * (1 + r), 1.0) for r in ripples])) == {"none"}


def calm(n=8):
    return [(2.0 + 0.01 * (i % 3), 1.0) for i in range(n)]


@pytest.mark.parametrize("jump", [(9.0, 1.0), (2.0, 9.0)], ids=["loss", "norm"])
def test_either_of_loss_and_gradient_norm_counts(jump):
    guard = Guard(SpikeConfig("skip", window=8))
    assert judged(guard, [*calm(), jump, (2.0, 1.0)])[-2:] == ["skip", "none"]
    assert guard.record() == {"skipped": 1, "rolled_back": 0} and guard.shift == 0


def test_none_lets_everything_pass_and_records_nothing():
    guard = Guard(SpikeConfig(window=8))
    assert judged(guard, [*calm(), (1e9, 1e9)]) == ["none"] * 9 and guard.record() == {}


def test_the_factor_and_the_window_change_what_jumps():
    steps = [*calm(), (2.5, 1.0)]
    assert judged(Guard(SpikeConfig("skip", factor=5, window=8)), steps)[-1] == "skip"
    assert judged(Guard(SpikeConfig("skip", factor=50, window=8)), steps)[-1] == "none"
    assert judged(Guard(SpikeConfig("skip", factor=5, window=9)), steps)[-1] == "none"  # not enough seen yet


@given(st.lists(st.integers(1, 6), min_size=1, max_size=10))
def test_after_a_rollback_the_run_meets_data_that_it_has_not_seen(lengths):
    """Steps until the next jump, each time from the checkpoint at 8: the data runs on without a repetition or a gap."""
    guard = Guard(SpikeConfig("rollback", window=8, most=100))
    data = [step + guard.shift for step, _ in enumerate(judged(guard, calm(8)))]
    for length in lengths:
        for step in range(8, 8 + length):
            data.append(step + guard.shift)
            jumped = guard.judge(step, 99.0 if step == 7 + length else 2.0, 1.0, checkpoint=8)
        assert jumped == "rollback"
    assert data == list(range(len(data))) and guard.rolled_back == len(lengths)


def test_without_a_checkpoint_a_rollback_is_a_skip():
    guard = Guard(SpikeConfig("rollback", window=8))
    assert judged(guard, [*calm(), (9.0, 1.0)], checkpoint=None)[-1] == "skip"
    assert guard.record() == {"skipped": 1, "rolled_back": 0}


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_too_many_jumps_end_the_run(action):
    guard = Guard(SpikeConfig(action, window=8, most=2))
    judged(guard, [*calm(), (9.0, 1.0), (9.0, 1.0)])
    with pytest.raises(
        TrainingError, match=r"step 11: its loss is 9, above 2\.\d+, and 2 steps jumped before it, as many as `most`"
    ):
        guard.judge(10, 9.0, 1.0, 0)
    with pytest.raises(TrainingError, match=r"step 11: its gradient norm is 7, above .*: lower the learning rate, look at the d"):
        guard.judge(10, 2.0, 7.0, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"action": "undo"}, "action ('undo') must be 'none', 'skip' or 'rollback': choose one of them"),
        ({"factor": 0.0}, "factor (0.0) must be above 0: 12 lets pass what training usually does"),
        ({"factor": float("nan")}, "factor (nan) must be above 0"),
        ({"window": 3}, "window (3) must be at least 4 steps: a median of fewer says nothing"),
        ({"most": -1}, "most (-1) must be at least 0: 0 ends the run at the first jump"),
    ],
)
def test_spike_config_refuses(fields, message):
    with pytest.raises(ConfigError) as caught:
        SpikeConfig(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patience": 0}, "patience (0) must be at least 1 measurement"),
        ({"least": -0.1}, "least (-0.1) must be at least 0: it is how much better a measurement must be to count"),
        ({"mode": "lower"}, "mode ('lower') must be 'min' or 'max': choose one of them"),
    ],
)
def test_stop_config_refuses(fields, message):
    with pytest.raises(ConfigError) as caught:
        StopConfig(**fields)
    assert message in str(caught.value)


def test_a_state_that_was_altered_is_refused():
    with pytest.raises(CheckpointError, match="the state of guard lacks norms, shift: the checkpoint was altered; delete it"):
        Guard(SpikeConfig()).load({"skipped": 0, "rolled_back": 0, "losses": []})
    with pytest.raises(CheckpointError, match="the state of early stopping lacks known, waited"):
        EarlyStop(StopConfig("loss")).load({"best": None, "best_step": 0})


def stops(config, values, stop=None):
    stop = stop or EarlyStop(config)
    return [stop.see({"step": i + 1, "heldout_loss": value}) for i, value in enumerate(values)]


def test_a_standstill_ends_the_run_and_says_why():
    found = stops(StopConfig("heldout_loss", patience=3), [3.0, 2.0, 2.5, 1.5, 1.5, 1.6, 1.7, 1.0])
    assert found[:6] == [""] * 6
    assert found[6] == (
        "stopped at step 7: heldout_loss has not fallen by more than 0 since step 4, when it was 1.5 (3 measurements)"
    )
    (*_, said) = stops(StopConfig("heldout_loss", patience=1, mode="max", least=0.5), [0.1, 0.5])
    assert said == "stopped at step 2: heldout_loss has not risen by more than 0.5 since step 1, when it was 0.1 (1 measurements)"
    (*_, said) = stops(StopConfig("heldout_loss", patience=2), [float("nan")] * 2)
    assert said == "stopped at step 2: heldout_loss has not ever been a number (2 measurements)"


@given(
    st.lists(st.floats(-5, 5) | st.just(float("nan")), max_size=30),
    st.integers(1, 5), st.floats(0, 2), st.sampled_from(["min", "max"]),
)  # fmt: skip
def test_it_stops_exactly_where_so_many_measurements_brought_nothing(values, patience, least, mode):
    found = stops(StopConfig("heldout_loss", patience, least, mode), values)
    sign = 1 if mode == "min" else -1
    best, since = float("inf"), 0
    for value, said in zip(values, found, strict=True):
        improved = best - sign * value > least  # False for nan
        best, since = (sign * value, 0) if improved else (best, since + 1)
        assert bool(said) == (since >= patience)


@given(st.lists(st.floats(-5, 5), max_size=20), st.integers(0, 20))
def test_a_resumed_early_stop_decides_as_the_uninterrupted_one(values, cut):
    config = StopConfig("heldout_loss", patience=2)
    whole, first, second = EarlyStop(config), EarlyStop(config), EarlyStop(config)
    expected = stops(config, values, whole)
    stops(config, values[:cut], first)
    second.load(through_json(first.state()))
    found = [second.see({"step": i + 1, "heldout_loss": v}) for i, v in enumerate(values) if i >= cut]
    assert found == expected[cut:] and second.state() == whole.state()


def test_records_without_the_metric_are_no_measurement():
    stop = EarlyStop(StopConfig("heldout_loss", patience=2))
    for step in range(1, 9):
        assert stop.see({"step": step, "loss": 1.0} | ({"heldout_loss": 2.0} if step in (1, 4) else {})) == ""
    assert stop.see({"step": 9, "heldout_loss": 2.0}).startswith("stopped at step 9")
    assert EarlyStop(StopConfig()).see({"step": 1, "": 1.0}) == ""


def test_a_metric_that_nobody_logs_is_an_error_at_the_end():
    stop = EarlyStop(StopConfig("heldout_los"))
    stop.see({"step": 1, "loss": 1.0, "heldout_loss": 2.0})
    with pytest.raises(
        ConfigError, match=r"no record has the metric 'heldout_los'; did you mean 'heldout_loss'\? They have: step"
    ):
        stop.finish()
    for quiet in (EarlyStop(StopConfig()), EarlyStop(StopConfig("x"))):  # none asked for; no step taken
        quiet.finish()
    with pytest.raises(ConfigError, match="metric 'note' is 'x', which is no number: name a field that is one"):
        EarlyStop(StopConfig("note")).see({"step": 1, "note": "x"})
