"""What an engine holds of a model: which tensors its answers come from, which it keeps once more, and how much room is left."""

from __future__ import annotations

import torch
from torch import Tensor

from athanor.core.device import Precision, free_memory
from athanor.models.base import CausalLM, EncoderDecoder
from athanor.nn.experts import Matrices
from athanor.nn.linear import Linear
from athanor.nn.paged import PagedCache


def room(model: CausalLM | EncoderDecoder, precision: Precision, tokens: int) -> int | None:
    """Blocks of so many tokens that half of the free memory holds; None where that is not known, or blocks take none."""
    size = tokens * PagedCache.bytes_per_token(model.cache_layers(), torch.bfloat16 if precision == "bf16" else torch.float32)
    free = torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else free_memory()
    return free // 2 // size if size and free is not None else None


def longest(model: CausalLM | EncoderDecoder, context: int, precision: Precision, cache_tokens: int | None) -> int:
    """Tokens of a sequence: the context, or as much of it as the memory holds where nobody says how much that shall be."""
    fitting = room(model, precision, 1) if cache_tokens is None else None
    return context if fitting is None else max(2, min(context, fitting))


def lasting(model: CausalLM | EncoderDecoder) -> tuple[Tensor, ...]:
    """What answers are made of: parameters, and buffers that files hold; others count what passes through.

    PyTorch does not count changes of what was made in inference mode.
    """
    kept = model.state_dict(keep_vars=True)
    tensors = [*model.parameters(), *(buffer for name, buffer in model.named_buffers() if name in kept)]
    return tuple(tensor for tensor in tensors if not tensor.is_inference())


def products(model: CausalLM | EncoderDecoder) -> list[Tensor]:
    """The matrices that hidden states are multiplied with, those of experts included where they are wider than bfloat16."""
    found = [m.weight for m in model.modules() if type(m) is Linear]
    found += [m.weight for m in model.modules() if isinstance(m, Matrices) and m.weight.dtype != torch.bfloat16]
    return [*found, model.output_weight]
