"""An average of the weights over training, which often does better than the last ones (Polyak and Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from athanor.core.errors import CheckpointError, ConfigError
from athanor.optim.sharded import local

_UPDATES = "updates"


class EMA:
    """a_t = sum over i <= t of decay^(t - i) w_i, divided by the sum of the factors: weights of long ago count less and less.

    Because of the division the first weights, which know nothing, do not linger: a_1 = w_1, and early averages are short ones
    (the correction of Adam's moments, Kingma and Ba 2015, section 3). Averages are float32, of trainable parameters only;
    everything is elementwise, so each process averages what it holds.

    Args:
        model: whose weights are averaged.
        decay: in [0, 1); about 1 / (1 - decay) updates are averaged over.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"the decay of averaged weights ({decay}) must lie in [0, 1): 0.999 is usual")
        self.decay, self.updates = decay, 0
        self.averages = {name: p.detach().float().clone() for name, p in _trainable(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Count the model's weights in; after each update of theirs."""
        self.updates += 1
        # The share of the newest weights among the factors: (1 - decay) / (1 - decay^t).
        share = (1 - self.decay) / (1 - self.decay**self.updates)
        weights = _trainable(model)
        averages = [local(self.averages[name]) for name in weights]
        torch._foreach_lerp_(averages, [local(p).float() for p in weights.values()], share)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Within it the model has the averaged weights; after it, whatever happened, its own."""
        weights = _trainable(model)
        own = {name: local(p).detach().clone() for name, p in weights.items()}
        try:
            with torch.no_grad():
                for name, p in weights.items():
                    local(p).copy_(local(self.averages[name]))
            yield
        finally:
            with torch.no_grad():
                for name, p in weights.items():
                    local(p).copy_(own[name])

    def state(self) -> dict[str, Tensor]:
        """What `load` takes: the averages by the names of the weights, and `updates`."""
        return self.averages | {_UPDATES: torch.tensor(self.updates, dtype=torch.int64)}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state. Raises CheckpointError when it is not of this model."""
        expected = {*self.averages, _UPDATES}
        wrong = sorted(expected ^ state.keys())
        wrong += sorted(name for name, a in self.averages.items() if name in state and state[name].shape != a.shape)
        if wrong:
            raise CheckpointError(
                f"these averaged weights are of another model: {wrong[0]} is missing, unknown or of another shape"
                f" ({len(wrong)} such): start without them"
            )
        self.updates = int(state[_UPDATES])
        for name, average in self.averages.items():
            local(average).copy_(local(state[name]))


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
