"""Runs the model for beam search, whose hypotheses copy each other: prompts into rows of a cache, then one token a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from athanor.core.device import Precision, autocast
from athanor.core.errors import NonFiniteError
from athanor.models.base import CausalLM, EncoderDecoder
from athanor.nn.cache import Decode, KVCache, Prefill
from athanor.nn.context import Memory, Packed

# In bf16, rows that no sequence owns are read along up to a multiple of this: few shapes, for each of which oneDNN
# prepares code.
_ROWS = 16


def _laid_end_to_end(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids (1, N) and lengths (S,)."""
    lengths = torch.tensor([len(s) for s in sequences], device=device)
    return torch.tensor([[token for s in sequences for token in s]], device=device), lengths


def _finite(logits: Tensor) -> Tensor:
    """Logits as they are; NonFiniteError where no probabilities come of them. Single tokens may be forbidden by -inf."""
    if not logits.amax(-1).isfinite().all():
        raise NonFiniteError("logits")
    return logits


class Rows:
    """A model and its cache.

    Args:
        model: in the state in which it answers; the very module that is trained.
        precision: of the matrix products.
    """

    def __init__(self, model: CausalLM | EncoderDecoder, precision: Precision = "fp32") -> None:
        self.model, self.precision = model, precision
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        cross = model.cross_layers() if isinstance(model, EncoderDecoder) else None
        self.cache = KVCache(model.cache_layers(), dtype, model.device, cross)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], first_row: int, sources: Sequence[Sequence[int]] | None = None) -> Tensor:
        """Read prompts into rows `first_row`, `first_row` + 1, ...; equal ones are computed once.

        Args:
            prompts: what each answer goes on from.
            first_row: row of the first.
            sources: what an encoder-decoder's answers are to, one for each prompt.

        Returns:
            logits of the token that follows each prompt, (prompts, V) float32.
        """
        device = self.model.device
        longest = max(len(p) for p in prompts)
        whole = [(tuple(p), tuple(s)) for p, s in zip(prompts, sources or [()] * len(prompts), strict=True)]
        unique: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        which = [unique.setdefault(w, len(unique)) for w in whole]
        self.cache.reserve(first_row + len(prompts), longest, max(len(s) for _, s in whole))
        owner = {u: row for row, u in reversed(list(enumerate(which)))}  # first row of each unique prompt
        rows = torch.tensor([first_row + owner[u] for u in range(len(unique))], device=device)
        ids, lengths = _laid_end_to_end([p for p, _ in unique], device)
        with autocast(device, self.precision):
            memory = None
            if isinstance(self.model, EncoderDecoder):
                source, source_lengths = _laid_end_to_end([s for _, s in unique], device)
                memory = Memory(self.model.encode(source, Packed(source_lengths, causal=False)), source_lengths)
            hidden = self.model.hidden(ids, Prefill(self.cache, rows, lengths, memory))[0]
            last = hidden.index_select(0, lengths.cumsum(0) - 1)
            logits = self.model.logits(last).float()
        copies = [(first_row + owner[u], first_row + i) for i, u in enumerate(which) if owner[u] != i]
        if copies:
            source_rows, target_rows = torch.tensor(copies, device=device).unbind(1)
            self.cache.copy_rows(source_rows, target_rows, longest)
        return _finite(logits)[torch.tensor(which, device=device)]

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Read one token into each of the first R rows, which hold `lengths` tokens: logits of the next, (R, V) float32."""
        device, rows = self.model.device, len(tokens)
        idle = -rows % _ROWS if rows > _ROWS and self.precision == "bf16" else 0
        self.cache.reserve(rows + idle, max(lengths) + 1)
        ctx = Decode(self.cache, torch.tensor([*lengths, *[0] * idle], device=device))
        with autocast(device, self.precision):
            hidden = self.model.hidden(torch.tensor([*tokens, *[0] * idle], device=device).unsqueeze(1), ctx)
            return _finite(self.model.logits(hidden[:, 0])[:rows].float())

    @torch.inference_mode()
    def move(self, moves: Sequence[tuple[int, int]], positions: int) -> None:
        """Follow the scheduler's moves (from row, to row)."""
        if moves:
            source, target = torch.tensor(moves, device=self.model.device).unbind(1)
            self.cache.copy_rows(source, target, positions)
