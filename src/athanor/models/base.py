"""What every decoder-only language model offers. Legend: B batch, T time, D width, V vocabulary."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

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


class CausalLM(nn.Module):
    """A decoder-only language model: hidden states and logits are separate calls.

    A subclass is built from its config alone and defines `initialise`, `hidden`, `output_weight` and the key map of its files
    (`to_hf`, `from_hf`). Buffers that no file holds it computes on the CPU explicitly (`device="cpu"`), since a model about to
    be loaded is built without a device.
    """

    config: ModelConfig
    model_type: ClassVar[str]

    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights."""
        raise NotImplementedError

    def hidden(self, ids: Tensor, ctx: Context) -> Tensor:
        """Final hidden states, normalised: ids (B, T) int64 -> (B, T, D)."""
        raise NotImplementedError

    @property
    def output_weight(self) -> Tensor:
        """The output embedding (V, D)."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return nn.functional.linear(hidden, self.output_weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of whole sequences of one length: (B, T) -> (B, T, V)."""
        return self.logits(self.hidden(ids, Causal(ids.shape[0], ids.shape[1], ids.device)))

    def to_hf(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict as the tensors of a Hugging Face file."""
        raise NotImplementedError

    def from_hf(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a Hugging Face file as our state dict."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def n_parameters(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(p.numel() for p in self.parameters())
