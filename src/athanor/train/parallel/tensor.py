"""Tensor parallelism with sequence parallelism (Shoeybi et al. 2019; Korthikanti et al. 2022), by surgery on a model's blocks.

Within a block every process holds N / R of the tokens and, of each matrix, the rows (what reads the block's input) or the columns
(what adds to its output) of its heads or inner units. Before the former tokens are gathered, after the latter sums are scattered:

    x (1, N/R, D) -> norm -> gather -> rows (1, N, O/R) -> attention or activation -> columns -> scatter -> (1, N/R, D)

What stands outside of blocks (embeddings, last norm, output) every process computes alike. Parameters of blocks that are not
split see a part of the tokens or heads each, so their gradients are summed over the group afterwards (`Tensors.partial`).

Legend: N tokens, D width, O outputs, R processes of the group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from athanor.core.errors import ConfigError
from athanor.models.base import LanguageModel
from athanor.nn.attention import Attention
from athanor.nn.feedforward import FeedForward, GatedFeedForward
from athanor.nn.linear import Linear, linear
from athanor.train.parallel.base import local
from athanor.train.parallel.comm import gather, merge, scatter, split


@dataclass(frozen=True)
class Split:
    """How a parameter is dealt out.

    parts  its rows come in parts (queries, keys and values, say), and a process has its share of each; () for columns
    """

    parts: tuple[int, ...] = ()


@dataclass
class Tensors:
    """What was done to a model.

    splits   by parameter name
    partial  names of the parameters whose gradients are to be summed over the group
    """

    splits: dict[str, Split]
    partial: list[str]


class _Rows(Linear):
    """A process's outputs of all tokens: (1, N / R, D) -> (1, N, O / R)."""

    group: td.ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else local(self.bias)
        return linear(gather(x, self.group), local(self.weight), bias)


class _Columns(Linear):
    """A process's tokens of all outputs: (1, N, I / R) -> (1, N / R, O)."""

    group: td.ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        y = scatter(linear(x, local(self.weight)), self.group)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def reason(model: LanguageModel, size: int) -> str:
    """Why a model cannot be split so, or ""."""
    blocks = getattr(model, "blocks", None)
    if model.kind not in ("decoder", "encoder") or not isinstance(blocks, nn.ModuleList):
        return f"tensor parallelism splits decoders and encoders, and {model.model_type} is neither or has no plain blocks"
    for block in blocks:
        for name, module in block.named_children():
            if type(module) not in (Attention, GatedFeedForward, FeedForward) and any(
                isinstance(m, nn.Linear) or p.ndim > 2 for m in module.modules() for p in m.parameters(recurse=False)
            ):
                kind = f"{type(module).__name__} ({name})"
                return f"tensor parallelism splits plain attention and feed-forward, and {model.model_type} has a {kind}"
            if isinstance(module, Attention) and (module.n_heads % size or module.n_kv_heads % size):
                return f"tp ({size}) must divide n_heads ({module.n_heads}) and n_kv_heads ({module.n_kv_heads})"
            width = module.down.in_features if isinstance(module, (GatedFeedForward, FeedForward)) else size
            if width % size:
                return f"tp ({size}) must divide the inner width of the feed-forward block ({width})"
    return ""


def apply(model: LanguageModel, mesh: DeviceMesh) -> Tensors:
    """Split a model in place over the processes of `mesh`.

    Raises ConfigError for a model that cannot be split so.
    """
    why = reason(model, mesh.size())
    if why:
        raise ConfigError(f"{why}: use ddp or fsdp, or another tp")
    group = mesh.get_group()
    blocks: Any = model.blocks
    done = Tensors({}, [])
    for i, block in enumerate(blocks):
        for name, module in block.named_modules():
            at = f"blocks.{i}.{name}."
            if isinstance(module, Attention):
                q, kv = module.n_heads * module.head_dim, module.n_kv_heads * module.head_dim
                _rows(module.qkv, (q, kv, kv), mesh, f"{at}qkv.", done)
                _columns(module.out, mesh, f"{at}out.", done)
                module.n_heads //= mesh.size()
                module.n_kv_heads //= mesh.size()
            elif isinstance(module, GatedFeedForward):
                half = module.gate_up.out_features // 2
                _rows(module.gate_up, (half, half), mesh, f"{at}gate_up.", done)
                _columns(module.down, mesh, f"{at}down.", done)
            elif isinstance(module, FeedForward):
                _rows(module.up, (module.up.out_features,), mesh, f"{at}up.", done)
                _columns(module.down, mesh, f"{at}down.", done)
        done.partial += [f"blocks.{i}.{n}" for n, _ in block.named_parameters() if f"blocks.{i}.{n}" not in done.splits]
    blocks[0].register_forward_pre_hook(lambda _, args: (split(args[0], group), *args[1:]))
    blocks[-1].register_forward_hook(lambda _, args, out: merge(out, group))
    return done


def _rows(module: nn.Linear, parts: tuple[int, ...], mesh: DeviceMesh, at: str, done: Tensors) -> None:
    for leaf, p in list(module.named_parameters(recurse=False)):
        mine = [part.chunk(mesh.size())[mesh.get_local_rank()] for part in p.detach().split(parts)]
        _replace(module, leaf, torch.cat(mine), 0, mesh)
        done.splits[at + leaf] = Split(parts)
    _become(module, _Rows, mesh)


def _columns(module: nn.Linear, mesh: DeviceMesh, at: str, done: Tensors) -> None:
    mine = module.weight.detach().chunk(mesh.size(), dim=1)[mesh.get_local_rank()]
    _replace(module, "weight", mine.contiguous(), 1, mesh)
    done.splits[at + "weight"] = Split()
    _become(module, _Columns, mesh)


def _replace(module: nn.Module, leaf: str, mine: Tensor, dim: int, mesh: DeviceMesh) -> None:
    whole: Any = DTensor.from_local(mine, mesh, [Shard(dim)], run_check=False)
    setattr(module, leaf, nn.Parameter(whole, requires_grad=getattr(module, leaf).requires_grad))


def _become(module: nn.Linear, kind: type[Linear], mesh: DeviceMesh) -> None:
    assert isinstance(module, Linear)
    module.__class__ = kind  # the same layer, computed otherwise
    vars(module)["group"] = mesh.get_group()
