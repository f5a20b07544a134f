"""The step that decodes as one compiled function: no Python and few calls between the products of matrices."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from athanor.core.device import require_compiler
from athanor.core.errors import ConfigError
from athanor.models.base import CausalLM, EncoderDecoder
from athanor.nn.cache import KV
from athanor.nn.decode import Decode
from athanor.nn.moe import MixtureOfExperts
from athanor.nn.paged import PagedCache
from athanor.nn.positions import Rotary

# Columns of a table of blocks at least, so that they are a number that changes: one of 1 would be compiled apart.
_BLOCKS = 2
EXPERTS = "sends tokens to experts"


def refusal(model: CausalLM | EncoderDecoder) -> str:
    """Why one step of a model is not the same few operations for every token; "" where it is."""
    if isinstance(model, EncoderDecoder):
        return "reads a source"
    if not all(isinstance(layer, KV) for layer in model.cache_layers()):
        return "keeps recurrent states"
    return EXPERTS if any(isinstance(m, MixtureOfExperts) for m in model.modules()) else ""


class Compiled:
    """Hidden states of one new token of each of S sequences.

    Two functions are compiled by `prepare`, for a lone sequence and for many, whose numbers and lengths may be any; a third one
    where products of 4 bits go another way for more than 64.

    Args:
        model: a decoder.
        cache: that it reads and writes.
        max_len: tokens of a sequence at most.
        most: sequences at most.

    Raises:
        ConfigError: a model whose steps cannot be compiled.
        MissingExtraError: there is no C++ compiler, and a CPU needs one.
    """

    def __init__(self, model: CausalLM | EncoderDecoder, cache: PagedCache, max_len: int, most: int) -> None:
        if why := refusal(model):
            raise ConfigError(f"a {model.model_type} {why}, and such steps are not compiled: leave `compile` out")
        require_compiler(model.device, "generate")
        for module in model.modules():
            if isinstance(module, Rotary):
                module.reserve(max_len)
        self._device, self._size, self._most = model.device, cache.size, most

        def hidden(ids: Tensor, tables: Tensor, starts: Tensor) -> Tensor:
            return model.hidden(ids, Decode(cache, tables, starts))[0]

        # A code of its own: what is compiled is kept by it, and of one code not for many models.
        hidden.__code__ = hidden.__code__.replace()
        # Between its loops a step runs on a CPU in C++ too: a fifteenth less than in Python, for a compiling that is as long.
        options: dict[str, Any] | None = {"cpp_wrapper": True} if model.device.type == "cpu" else None
        self._step = torch.compile(hidden, fullgraph=True, options=options)

    def prepare(self) -> None:
        """Compile now: a minute or so for a dozen layers, less where PyTorch finds what it compiled before."""
        from torch._dynamo import mark_dynamic  # takes a second, which most have no use for

        with warnings.catch_warnings():
            # Dynamo asks every tensor for its gradient, and torch warns that some have none.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor", category=UserWarning)
            # As large as usual: by these the compiler sees what pays to be shared by threads. Equal ones it would take for one.
            for count in sorted({1, min(32, self._most), self._most}):
                blocks = max(16, count + 1)
                ids = torch.zeros((1, count), dtype=torch.int64, device=self._device)
                tables, starts = ids.new_zeros(count, blocks), ids.new_zeros(count)  # the block that is nobody's
                mark_dynamic(tables, 1)
                if count > 1:  # a number that is 1 is always compiled apart
                    for given, dimension in ((ids, 1), (tables, 0), (starts, 0)):
                        mark_dynamic(given, dimension)
                self._step(ids, tables, starts)

    def __call__(self, ids: Tensor, tables: Tensor, starts: Tensor) -> Tensor:
        """ids (1, S), tables (S, blocks), starts (S,), all int64, as `Paged` takes them -> (S, D)."""
        tables = tables[:, : max(_BLOCKS, int(starts.max()) // self._size + 1)]
        if tables.shape[1] < _BLOCKS:
            tables = F.pad(tables, (0, _BLOCKS - tables.shape[1]))
        hidden: Tensor = self._step(ids, tables.contiguous(), starts)
        return hidden
