"""Optimisers, averaged weights and the scale of losses go through a checkpoint: resumed = uninterrupted, bit by bit (law L4)."""

import pytest
import torch

from athanor.objectives import next_token
from athanor.optim.build import OptimConfig, build
from athanor.optim.ema import EMA
from athanor.optim.scale import LossScale
from athanor.train.state import Progress, StateStore
from athanor.train.step import train_step
from athanor.types import Batch


def batch(step):
    ids = torch.randint(0, 320, (48,), generator=torch.Generator().manual_seed(step))
    return Batch(ids, ids.roll(-1), torch.tensor([20, 28]), origin=f"step {step}")


class Run:
    """Everything of a run that lives in memory."""

    def __init__(self, tiny, optim, dtype):
        self.model = tiny().to(dtype).train()
        self.optimizers = build(self.model, optim)
        self.ema, self.scale = EMA(self.model, 0.9), LossScale(every=2)

    def extra(self):
        own = {f"ema.{name}": value for name, value in self.ema.state().items()}
        return own | {f"scale.{name}": value for name, value in self.scale.state().items()}

    def train(self, first, last):
        for step in range(first, last):
            options = {"lr_factor": 1.0, "clip": 1.0, "precision": "fp32"}
            train_step(self.model, next_token.loss, [batch(step)], self.optimizers, **options)
            self.ema.update(self.model)
            self.scale.update(True)

    def load(self, store):
        extra = self.extra()
        store.resume(self.model, self.optimizers, extra_tensors=extra)
        self.ema.load({name.removeprefix("ema."): v for name, v in extra.items() if name.startswith("ema.")})
        self.scale.load({name.removeprefix("scale."): v for name, v in extra.items() if name.startswith("scale.")})

    def tensors(self):
        found = dict(self.model.state_dict()) | self.extra()
        for name, p in self.model.named_parameters():
            for optimizer in self.optimizers:
                found |= {
                    f"optimizer.{name}.{k}": torch.as_tensor(v) for k, v in optimizer.state.get(p, {}).items() if v is not None
                }
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16-pure"])
@pytest.mark.parametrize("name", ["adamw", "muon", "sgd", "adafactor"])
def test_resumed_is_uninterrupted(tiny, tmp_path, name, dtype):
    optim = OptimConfig(name, lr=0.01, layer_decay=0.8)
    whole, first, second = (Run(tiny, optim, dtype) for _ in range(3))
    whole.train(0, 5)
    first.train(0, 3)
    store = StateStore(tmp_path, {})
    store.save(Progress(step=3), first.model, first.optimizers, extra_tensors=first.extra())
    store.wait()
    second.load(store)
    second.train(3, 5)
    expected, found = whole.tensors(), second.tensors()
    assert expected.keys() == found.keys()
    assert (dtype == torch.bfloat16) == any(key.endswith(".master") for key in found)
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key
