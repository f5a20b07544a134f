"""Group-relative advantages against the formula of GRPO."""

import re
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from athanor.align.advantages import dead, group_relative
from athanor.core.errors import ConfigError

GROUPS = st.integers(2, 8).flatmap(
    lambda g: st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 1.3]), min_size=g, max_size=g), min_size=1, max_size=5)
)


@given(rewards=GROUPS)
def test_they_are_the_formula(rewards):
    scaled, plain = group_relative(torch.tensor(rewards)), group_relative(torch.tensor(rewards), "none")
    for i, group in enumerate(rewards):
        mean = statistics.fmean(group)
        std = statistics.stdev(group)  # G - 1 in the denominator
        assert plain[i].tolist() == pytest.approx([r - mean for r in group], abs=1e-6)
        if std > 1e-3:
            assert scaled[i].tolist() == pytest.approx([(r - mean) / (std + 1e-4) for r in group], rel=1e-4, abs=1e-5)


@given(rewards=GROUPS, value=st.floats(-3, 3, width=32))
def test_a_dead_group_has_no_advantage_at_all(rewards, value):
    rewards.append([value] * len(rewards[0]))
    tensor = torch.tensor(rewards)
    lifeless = dead(tensor)
    assert lifeless.tolist() == [len(set(group)) == 1 for group in tensor.tolist()]
    for scale in ("std", "none"):
        advantages = group_relative(tensor, scale)
        assert not advantages[lifeless].any()
        assert (advantages[~lifeless] != 0).any(dim=1).all()


@pytest.mark.parametrize(("shape", "shown"), [((3, 1), "(3, 1)"), ((4,), "(4,)")])
def test_a_group_of_one_is_refused(shape, shown):
    with pytest.raises(
        ConfigError, match=re.escape(f"rewards of shape {shown} must be (prompts, group) with a group of 2 or more")
    ):
        group_relative(torch.zeros(shape))
