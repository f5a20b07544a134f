"""Expert parallelism: experts dealt out to the processes that take different data; tokens travel to them and back.

Legend: N tokens, D width, E experts, k experts of a token, R processes of the group, S choices that a process sends or receives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn

from athanor.core.errors import ConfigError
from athanor.models.base import LanguageModel
from athanor.nn.experts import Experts
from athanor.train.parallel.comm import exchange


class _Dealt(Experts):
    """Experts of which this process holds E / R."""

    group: td.ProcessGroup

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor, whole: bool = True) -> Tensor:
        size, here = td.get_world_size(self.group), self.n_experts
        chosen = experts.flatten()  # (N k,), E for what no expert computes
        order = torch.argsort(chosen, stable=True)[: int((chosen < here * size).sum())]
        at = order // experts.shape[1]  # the token of each choice
        target = chosen[order]
        sent = torch.bincount(target // here, minlength=size)
        received = torch.empty_like(sent)
        td.all_to_all_single(received, sent, group=self.group)
        there, back = sent.tolist(), received.tolist()
        rows = exchange(x.index_select(0, at), there, back, self.group)  # (S, D)
        with torch.no_grad():
            which = exchange((target % here).unsqueeze(1).float(), there, back, self.group).long()  # (S, 1)
        ones = torch.ones(which.shape, dtype=weights.dtype, device=x.device)
        made = super().forward(rows, which, ones) if len(rows) else rows * 1.0 + 0.0 * self._touch()
        result = exchange(made, back, there, self.group) * weights.flatten()[order].unsqueeze(1).to(made.dtype)
        return torch.zeros_like(x, dtype=result.dtype).index_add(0, at, result)

    def _touch(self) -> Tensor:
        """A zero that has all weights in its graph: a process without tokens must take part in the gradients."""
        total: Tensor = sum((p.sum() for p in self.parameters()), torch.zeros(()))
        return total


def apply(model: LanguageModel, group: td.ProcessGroup) -> set[str]:
    """Deal out the experts of a model in place; returns the names of their parameters.

    Raises ConfigError where experts cannot be dealt out evenly.
    """
    size, rank = td.get_world_size(group), td.get_rank(group)
    dealt: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, Experts):
            continue
        if module.n_experts % size:
            raise ConfigError(f"ep ({size}) must divide the experts of a layer ({module.n_experts}): use another ep")
        here = module.n_experts // size
        for path, p in list(module.named_parameters()):
            owner: Any = module.get_submodule(path.rpartition(".")[0])
            mine = p.detach()[rank * here : (rank + 1) * here].clone()
            setattr(owner, path.rpartition(".")[2], nn.Parameter(mine, requires_grad=p.requires_grad))
            dealt.add(f"{name}.{path}")
        module.n_experts = here
        module.__class__ = _Dealt
        vars(module)["group"] = group
    return dealt
