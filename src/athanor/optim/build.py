"""From a model and a few numbers to its optimisers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from athanor.core.errors import ConfigError
from athanor.optim.muon import Muon


@dataclass(frozen=True)
class OptimConfig:
    """How weights are updated.

    name          adamw, or muon (matrices of hidden layers by Muon, everything else by AdamW)
    lr            peak learning rate
    weight_decay  decoupled decay of matrices; vectors and embeddings have none
    beta1         AdamW's decay of the first moment
    beta2         AdamW's decay of the second moment
    """

    name: Literal["adamw", "muon"] = "muon"
    lr: float = 3e-3
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ConfigError(f"optim.name ({self.name!r}) must be 'adamw' or 'muon'")
        if not self.lr > 0:
            raise ConfigError(f"optim.lr ({self.lr}) must be positive")
        if not self.weight_decay >= 0:
            raise ConfigError(f"optim.weight_decay ({self.weight_decay}) must not be negative")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name} ({getattr(self, name)}) must lie in [0, 1)")


def build(model: nn.Module, config: OptimConfig, *, bf16: bool = False) -> list[torch.optim.Optimizer]:
    """The optimisers of `model`; each parameter is in exactly one.

    Hidden matrices are two-dimensional parameters that are neither embeddings nor the output layer.
    """
    matrices, tables, vectors = [], [], []
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim != 2:
            vectors.append(p)
        elif id(p) in embeddings or name.startswith("head"):
            tables.append(p)
        else:
            matrices.append(p)
    adam = [{"params": tables + vectors, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = []
    if config.name == "muon" and matrices:
        dtype = torch.bfloat16 if bf16 else torch.float32
        optimizers.append(Muon(matrices, config.lr, weight_decay=config.weight_decay, dtype=dtype))
    else:
        adam.append({"params": matrices, "weight_decay": config.weight_decay})
    optimizers.append(torch.optim.AdamW(adam, lr=config.lr, betas=(config.beta1, config.beta2), fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers
