"""Runs the model for the engine: prompts into the cache, then one token per row and step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from athanor.core.device import Precision, autocast
from athanor.models.base import CausalLM
from athanor.nn.cache import Decode, KVCache, Prefill

# In bf16, rows that no sequence owns are read along up to a multiple of this: few shapes, for each of which oneDNN
# prepares code.
_ROWS = 16


class Runner:
    """A model and its cache.

    Args:
        model: in the state in which it answers; the very module that is trained.
        precision: of the matrix products.
    """

    def __init__(self, model: CausalLM, precision: Precision = "fp32") -> None:
        self.model, self.precision = model, precision
        c = model.config
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.cache = KVCache(c.n_layers, c.n_kv_heads, c.head_dim, dtype, model.device)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], first_row: int) -> Tensor:
        """Read prompts into rows `first_row`, `first_row` + 1, ...; equal prompts are computed once.

        Returns:
            logits of the token that follows each prompt, (prompts, V) float32.
        """
        device = self.model.device
        longest = max(len(p) for p in prompts)
        self.cache.reserve(first_row + len(prompts), longest)
        unique: dict[tuple[int, ...], int] = {}
        which = [unique.setdefault(tuple(p), len(unique)) for p in prompts]
        owner = {u: row for row, u in reversed(list(enumerate(which)))}  # first row of each unique prompt
        rows = torch.tensor([first_row + owner[u] for u in range(len(unique))], device=device)
        lengths = torch.tensor([len(p) for p in unique], device=device)
        ids = torch.tensor([token for p in unique for token in p], device=device)
        ctx = Prefill(self.cache, rows, lengths)
        with autocast(device, self.precision):
            hidden = self.model.hidden(ids.unsqueeze(0), ctx)[0]
            last = hidden.index_select(0, lengths.cumsum(0) - 1)
            logits = self.model.logits(last).float()
        copies = [(first_row + owner[u], first_row + i) for i, u in enumerate(which) if owner[u] != i]
        if copies:
            source, target = torch.tensor(copies, device=device).unbind(1)
            self.cache.copy_rows(source, target, longest)
        return logits[torch.tensor(which, device=device)]

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Read one token into each of the first R rows, which hold `lengths` tokens: logits of the next, (R, V) float32."""
        device, rows = self.model.device, len(tokens)
        idle = -rows % _ROWS if rows > _ROWS and self.precision == "bf16" else 0
        self.cache.reserve(rows + idle, max(lengths) + 1)
        ctx = Decode(self.cache, torch.tensor([*lengths, *[0] * idle], device=device))
        with autocast(device, self.precision):
            hidden = self.model.hidden(torch.tensor([*tokens, *[0] * idle], device=device).unsqueeze(1), ctx)
            return self.model.logits(hidden[:, 0])[:rows].float()

    @torch.inference_mode()
    def move(self, moves: Sequence[tuple[int, int]], positions: int) -> None:
        """Follow the scheduler's moves (from row, to row)."""
        if moves:
            source, target = torch.tensor(moves, device=self.model.device).unbind(1)
            self.cache.copy_rows(source, target, positions)
