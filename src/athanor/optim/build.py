"""From a model and a few numbers to its optimisers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from athanor.core.errors import ConfigError, nearest
from athanor.optim.adafactor import Adafactor
from athanor.optim.groups import heights, kinds
from athanor.optim.master import Masters
from athanor.optim.muon import Muon
from athanor.optim.sharded import is_sharded

Groups = list[dict[str, Any]]
Make = Callable[[Groups], torch.optim.Optimizer]
Name = Literal["adamw", "muon", "sgd", "adafactor"]
# Fields that only some optimisers read.
_READERS = {
    "beta1": ("adamw", "muon"),
    "beta2": ("adamw", "muon"),
    "momentum": ("sgd",),
    "nesterov": ("sgd",),
    "relative": ("adafactor",),
}


@dataclass(frozen=True)
class OptimConfig:
    """How weights are updated.

    name          adamw, muon (matrices of hidden layers by Muon, everything else by AdamW), sgd, or adafactor
    lr            peak learning rate
    weight_decay  decay of matrices (sgd: added to their gradients; else decoupled); vectors and embeddings have none
    beta1         AdamW's decay of the first moment
    beta2         AdamW's decay of the second moment
    momentum      of sgd
    nesterov      of sgd: whether its momentum is Nesterov's
    relative      of adafactor: whether a step is a share of the weights' own size, and at most 1/sqrt(step)
    layer_decay   the rate of block l = 0 .. L-1 of L is lr layer_decay^(L - l), that of what lies below the blocks
                  lr layer_decay^(L + 1), that of what lies above them lr (Howard and Ruder 2018; Clark et al. 2020)
    """

    name: Name = "muon"
    lr: float = 3e-3
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.9
    nesterov: bool = False
    relative: bool = False
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in get_args(Name):
            raise ConfigError(
                f"optim.name ({self.name!r}) must be one of {', '.join(get_args(Name))}{nearest(self.name, get_args(Name))}"
            )
        if not self.lr > 0:
            raise ConfigError(f"optim.lr ({self.lr}) must be positive")
        if not self.weight_decay >= 0:
            raise ConfigError(f"optim.weight_decay ({self.weight_decay}) must not be negative")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name} ({getattr(self, name)}) must lie in [0, 1)")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"optim.layer_decay ({self.layer_decay}) must lie in (0, 1]: 0.75 is usual for tuning, 1 is off")
        for field in fields(self):
            readers = _READERS.get(field.name, get_args(Name))
            if self.name not in readers and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"optim.{field.name} ({getattr(self, field.name)}) is read by {' and '.join(readers)} only, and optim.name is"
                    f" {self.name!r}: leave it at {field.default}"
                )
        if self.nesterov and not self.momentum:
            raise ConfigError("optim.nesterov needs momentum, and optim.momentum is 0: 0.9 is usual")


def build(model: nn.Module, config: OptimConfig, *, bf16: bool = False) -> list[torch.optim.Optimizer]:
    """The optimisers of `model`; each trainable parameter is in exactly one, in one group.

    Each group has its `base_lr`, its peak rate. Weights of 16 bits are updated through float32 copies (`master.py`). Parameters
    that are spread over processes and those that are not have groups of their own.

    Args:
        model: whose parameters; what decays and what Muon takes is said in `groups.py`.
        config: how.
        bf16: whether Muon orthogonalises in bfloat16.

    Raises:
        ConfigError: nothing to train; layer-wise rates for a model without blocks.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ConfigError("the model has no trainable parameter, so there is nothing to build an optimiser for")
    kind = kinds(model)
    height = heights(model) if config.layer_decay != 1 else dict.fromkeys(named, 0)
    order = {"table": 0, "vector": 1, "matrix": 2}
    # By what an optimiser has in common, Muon's first; within it by what a group has.
    places: dict[tuple[bool, bool, bool], dict[tuple[bool, int], list[Tensor]]] = {}
    for name in sorted(named, key=lambda n: order[kind[n]]):
        p, matrix = named[name], kind[name] == "matrix"
        plain = not (matrix and config.name == "muon")
        members = places.setdefault((plain, is_sharded(p), p.dtype.itemsize < 4), {})
        members.setdefault((matrix, height[name]), []).append(p)
    optimizers: list[torch.optim.Optimizer] = []
    for (plain, sharded, half), members in sorted(places.items()):
        groups: Groups = []
        for (matrix, below), params in members.items():
            rate = config.lr * config.layer_decay**below
            decay = config.weight_decay if matrix else 0.0
            groups.append({"params": params, "lr": rate, "base_lr": rate, "weight_decay": decay})
        if plain:
            make = _MAKERS[config.name](config, sharded)
        else:
            make = partial(Muon, lr=config.lr, dtype=torch.bfloat16 if bf16 else torch.float32)
        optimizers.append(Masters(groups, make) if half else make(groups))
    return optimizers


def _counted(kind: type[torch.optim.Optimizer], groups: Groups, **options: Any) -> torch.optim.Optimizer:
    """PyTorch's fused kernels change tensors without counting it (`Tensor._version`), by which an engine knows of new weights."""
    made = kind(groups, **options)
    made.register_step_post_hook(_count)
    return made


def _count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    torch.autograd.graph.increment_version(params)


def _adamw(config: OptimConfig, sharded: bool) -> Make:
    # Fused kernels do not take tensors that are spread over processes on every device.
    betas = config.beta1, config.beta2
    return partial(_counted, torch.optim.AdamW, lr=config.lr, betas=betas, fused=not sharded, foreach=sharded)


def _sgd(config: OptimConfig, sharded: bool) -> Make:
    beta, nesterov = config.momentum, config.nesterov
    return partial(_counted, torch.optim.SGD, lr=config.lr, momentum=beta, nesterov=nesterov, fused=not sharded, foreach=sharded)


def _adafactor(config: OptimConfig, sharded: bool) -> Make:
    return partial(Adafactor, lr=config.lr, relative=config.relative)


_MAKERS = {"adamw": _adamw, "muon": _adamw, "sgd": _sgd, "adafactor": _adafactor}
