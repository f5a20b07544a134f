"""Recurrent layers that a context scans. Legend: B batch, T time, D width of the input, H hidden width, W width of the state."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

CELLS = ("rnn", "lstm", "gru")
_KERNELS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class Recurrent(nn.Module):
    """One layer, run by PyTorch's kernels; called as a `Cell` of `context.py`.

    With s(z) = 1 / (1 + exp(-z)), products of vectors elementwise, and W, U and b of each gate its own:

    | cell | computes                                                                      | source                       |
    | ---- | ----------------------------------------------------------------------------- | ---------------------------- |
    | rnn  | h' = tanh(W x + U h + b)                                                      | Elman 1990                   |
    | lstm | c' = f c + i tanh(W x + U h + b), h' = o tanh(c'), i, f, o = s(W x + U h + b) | Hochreiter, Schmidhuber 1997 |
    | gru  | h' = (1 - z) tanh(W x + b + r (U h + b')) + z h, r, z = s(W x + U h + b)      | Cho et al. 2014              |

    Args:
        cell: one of CELLS.
        dim: D.
        hidden: H.
        both_ways: whether a second cell reads each sequence from its end; its outputs stand after the first one's.
    """

    def __init__(self, cell: str, dim: int, hidden: int, both_ways: bool = False) -> None:
        super().__init__()
        self.cell = cell
        self.kernel: nn.RNNBase = _KERNELS[cell](dim, hidden, batch_first=True, bidirectional=both_ways)

    @property
    def state_width(self) -> int:
        """W: H, and twice that for an LSTM, whose state is (h, c)."""
        return self.kernel.hidden_size * (2 if self.cell == "lstm" else 1)

    def forward(self, x: Tensor, lengths: Tensor | None = None, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Read every sequence to its end.

        Args:
            x: (B, T, D); sequences begin at the first step, and what stands after their end is not read.
            lengths: (B,) tokens of each; T by default. One of 0 counts as 1.
            state: (B, W) to go on from; zeros by default. A layer that reads both ways takes none.

        Returns:
            outputs (B, T, H), or (B, T, 2 H) both ways, zero after a sequence's end; states (B, W) after each sequence's last
            token, or (B, 2 W) both ways.
        """
        before = None
        if state is not None:
            assert not self.kernel.bidirectional, "who reads from the end cannot go on from a state"
            parts = tuple(part.unsqueeze(0).contiguous() for part in state.split(self.kernel.hidden_size, dim=1))
            before = parts if self.cell == "lstm" else parts[0]
        time = x.shape[1]
        # The kernels want lengths on the CPU, and are faster without them where no sequence is shorter than another.
        sizes = None if lengths is None else lengths.detach().cpu().clamp(min=1)
        if sizes is None or int(sizes.min()) == time:
            out, after = self.kernel(x, before)
        else:
            packed = pack_padded_sequence(x, sizes, batch_first=True, enforce_sorted=False)
            rows, after = self.kernel(packed, before)
            out, _ = pad_packed_sequence(rows, batch_first=True, total_length=time)
        last = torch.cat(after, dim=2) if self.cell == "lstm" else after  # (directions, B, W)
        return out, last.transpose(0, 1).flatten(1)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Matrices uniform in +-1/sqrt(H), biases zero, that of an LSTM's forget gate one (Jozefowicz et al. 2015)."""
        h = self.kernel.hidden_size
        for name, p in self.kernel.named_parameters():
            if name.startswith("weight"):
                p.uniform_(-(h**-0.5), h**-0.5, generator=generator)
                continue
            p.zero_()
            if self.cell == "lstm" and name.startswith("bias_ih"):
                p[h : 2 * h] = 1.0
