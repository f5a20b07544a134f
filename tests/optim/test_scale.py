"""Scaled losses as torch scales them, and precisions that are refused."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from athanor.core.errors import CheckpointError, ConfigError, NonFiniteLossError
from athanor.optim.scale import LossScale, check_precision


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 5))
def test_it_goes_as_torchs_scaler(finite, every):
    ours = LossScale(every=every)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=every)
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=1.0)
    theirs.scale(torch.zeros(1))  # makes its state
    for good in finite[: 30 if not all(finite) else 60]:
        before = p.item()
        p.grad = torch.tensor([1.0 if good else torch.inf]) * theirs.get_scale()
        theirs.step(optimizer)
        theirs.update()
        assert ours.update(good) == good == (p.item() != before)
        assert ours.scale == theirs.get_scale()


def test_it_doubles_after_2000_good_steps_and_is_resumed():
    scale = LossScale()
    assert scale.scale == 65536
    for _ in range(1999):
        assert scale.update(True)
    assert scale.scale == 65536
    other = LossScale()
    other.load(scale.state())
    assert other == scale
    other.update(True)
    assert (other.scale, other.good) == (131072, 0)
    assert not other.update(False)
    assert (other.scale, other.good) == (65536, 0)


def test_gradients_that_are_never_finite_are_told():
    scale = LossScale()
    with pytest.raises(NonFiniteLossError, match=re.escape("gradients are not finite even where losses are scaled by 2^-24")):
        for _ in range(100):
            scale.update(False)
    assert 2.0**-26 < scale.scale < 2.0**-24


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": 0.0}, "the scale of losses (0.0) must be positive: 65536 is usual"),
        ({"every": 0}, "every (0), after how many good steps the scale of losses doubles, must be at least 1"),
    ],
)
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        LossScale(**fields)


def test_a_state_without_its_fields_is_refused():
    with pytest.raises(CheckpointError, match=re.escape("the scale of losses lacks good in this checkpoint: start without it")):
        LossScale().load({"scale": torch.tensor(1.0)})


def test_precisions():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for precision in ("fp32", "bf16", "bf16-pure"):
        check_precision(precision, cpu)
        check_precision(precision, cuda)
    check_precision("fp16", cuda)
    with pytest.raises(ConfigError, match=re.escape("precision ('fp16') does not go with a CPU, which multiplies float16")):
        check_precision("fp16", cpu)
    with pytest.raises(
        ConfigError, match=re.escape("precision ('bf61') must be one of fp32, bf16, bf16-pure, fp16; did you mean")
    ):
        check_precision("bf61", cpu)
