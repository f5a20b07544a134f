"""What every decoder-only language model offers. Legend: B batch, T time, D width, V vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from athanor.nn.context import Causal, Context


class ModelConfig(Protocol):
    """What the rest of the house asks of an architecture's config (a frozen dataclass)."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def max_positions(self) -> int: ...

    def to_hf(self) -> dict[str, Any]:
        """The fields of Hugging Face's config.json."""
        ...


class Fused(NamedTuple):
    """One matrix of ours that is several in a file: their modules' names and rows, in the order of our rows."""

    names: tuple[str, ...]
    rows: tuple[int, ...]


class CausalLM(nn.Module):
    """A decoder-only language model: hidden states and logits are separate calls.

    A subclass is built from its config alone and defines `initialise`, `hidden`, `output_weight` and `keys`, the key map of
    its files. Buffers that no file holds it computes on the CPU explicitly (`device="cpu"`), since a model about to be loaded
    is built without a device.
    """

    config: ModelConfig
    model_type: ClassVar[str]

    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights."""
        raise NotImplementedError  # every architecture defines it

    def hidden(self, ids: Tensor, ctx: Context) -> Tensor:
        """Final hidden states, normalised: ids (B, T) int64 -> (B, T, D)."""
        raise NotImplementedError  # every architecture defines it

    @property
    def output_weight(self) -> Tensor:
        """The output embedding (V, D)."""
        raise NotImplementedError  # every architecture defines it

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return nn.functional.linear(hidden, self.output_weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of whole sequences of one length: (B, T) -> (B, T, V)."""
        return self.logits(self.hidden(ids, Causal(ids.shape[0], ids.shape[1], ids.device)))

    def keys(self) -> Mapping[str, str | Fused]:
        """Our modules that hold tensors -> the modules of a Hugging Face file. What a module holds has the same name in both."""
        raise NotImplementedError  # every architecture defines it

    def to_hf(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict, or a part of it, as the tensors of a Hugging Face file. Tensors of fused modules are split by rows."""
        keys, out = self.keys(), {}
        for name, tensor in state.items():
            module, _, leaf = name.rpartition(".")
            theirs = keys[module]
            if isinstance(theirs, str):
                out[f"{theirs}.{leaf}"] = tensor
            else:
                for their, part in zip(theirs.names, tensor.split(theirs.rows), strict=True):
                    out[f"{their}.{leaf}"] = part.contiguous()
        return out

    def from_hf(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `to_hf`."""
        held: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            module, _, leaf = name.rpartition(".")
            held.setdefault(module, {})[leaf] = tensor
        out = {}
        for ours, theirs in self.keys().items():
            if isinstance(theirs, str):
                out.update({f"{ours}.{leaf}": tensor for leaf, tensor in held.get(theirs, {}).items()})
            else:
                for leaf in held.get(theirs.names[0], {}):
                    out[f"{ours}.{leaf}"] = torch.cat([held[their][leaf] for their in theirs.names])
        return out

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def n_parameters(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(p.numel() for p in self.parameters())
