from dataclasses import replace

import pytest
import torch

from athanor.core.errors import ConfigError
from athanor.train import plan as planning

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    """Planning on a machine of known speed, without measuring this one."""

    def speed(shape, batch_tokens, precision, device, seconds=1.5):
        return 3e11 / 6 / planning._parameters(shape)

    monkeypatch.setattr(planning, "speed", speed)


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_minutes_must_be_a_length(minutes):
    with pytest.raises(ConfigError, match="must be above 0"):
        planning.make(minutes, CPU)


def test_too_short_a_life_is_refused(quick):
    with pytest.raises(ConfigError, match="give 1 or more"):
        planning.make(0.2, CPU)


@pytest.mark.parametrize("minutes", [1, 3, 10, 60, 600])
def test_the_plan_fills_the_minutes_and_no_more(quick, minutes):
    plan = planning.make(minutes, CPU)
    assert 0.93 * 60 * minutes <= sum(plan.seconds.values()) <= 60 * minutes
    assert min(plan.pretrain_steps, plan.sft_steps, plan.grpo_steps) >= planning.LEAST_STEPS


def test_longer_lives_train_larger_models_on_more_tokens(quick):
    plans = [planning.make(m, CPU) for m in (1, 10, 100, 1000)]
    sizes = [p.parameters for p in plans]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    tokens = [p.tokens()["pretrain"] for p in plans]
    assert tokens == sorted(tokens)


def test_adjusting_fits_a_stage_to_the_time_that_is_left(quick):
    plan = planning.make(10, CPU)
    expected = sum(plan.seconds[s] for s in ("sft", "grpo"))
    late = planning.adjust(plan, "sft", 0.5 * expected)
    assert late.sft_steps == pytest.approx(0.5 * plan.sft_steps, abs=1)
    assert late.pretrain_steps == plan.pretrain_steps
    assert planning.adjust(plan, "sft", expected) == replace(plan, seconds=plan.seconds)
    assert planning.adjust(plan, "grpo", -5.0).grpo_steps >= planning.LEAST_STEPS


def test_speed_is_measured_by_real_steps():
    assert planning.speed(planning.SHAPES[0], 256, "fp32", CPU, seconds=0.01) > 0
