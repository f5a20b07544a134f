"""Linear-chain conditional random fields (Lafferty et al. 2001): a distribution over whole sequences of tags.

    score(y) = start[y_1] + sum_t emission[t, y_t] + sum_t transition[y_t, y_t+1] + end[y_n],    p(y) = exp(score(y)) / Z

Legend: S sequences, T steps, K tags.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from athanor.core.errors import ConfigError, DataError
from athanor.nn.derivatives import first_only


class Allowed(NamedTuple):
    """Which tags may follow which; true is allowed."""

    transitions: Tensor  # (K, K) bool, from row to column
    start: Tensor  # (K,) bool
    end: Tensor  # (K,) bool


def iob2(names: Sequence[str]) -> Allowed:
    """I-x only after B-x or I-x (IOB2; Tjong Kim Sang and Veenstra 1999). Every sequence may end with any tag.

    Args:
        names: "O", and "B-x" and "I-x" of each kind x.

    Raises ConfigError for a name of another form, or an I-x without its B-x.
    """
    for name in names:
        kind = name[2:]
        if name != "O" and not (name[:2] in ("B-", "I-") and kind):
            raise ConfigError(f"tag {name!r} must be 'O', 'B-x' or 'I-x' for transitions constrained to IOB2: rename it")
        if name[:2] == "I-" and f"B-{kind}" not in names:
            raise ConfigError(f"tag {name!r} can follow nothing without {f'B-{kind}'!r}: add that tag, or remove this one")
    after = [[name[:2] != "I-" or before[2:] == name[2:] for name in names] for before in names]
    # On the CPU explicitly: no file holds them, and a model about to be loaded is built without a device.
    start = torch.tensor([name[:2] != "I-" for name in names], device="cpu")
    return Allowed(torch.tensor(after, device="cpu"), start, torch.ones_like(start))


def _finite(top: Tensor) -> Tensor:
    """A maximum to subtract: of what is all -inf, 0."""
    return top.masked_fill(top == -torch.inf, 0.0)


def _sum(x: Tensor, dim: int) -> Tensor:
    """logsumexp, exact where all of it is -inf too."""
    top = _finite(x.amax(dim, keepdim=True))
    return (x - top).exp_().sum(dim).log_() + top.squeeze(dim)


class _LogPartition(torch.autograd.Function):
    """log Z, whose gradient is what the forward-backward algorithm computes: expected counts of tags and transitions.

    That costs one pass back over time and keeps (S, T, K); the graph of the forward algorithm would keep (S, T, K, K). Weights of
    paths are kept relative to the largest of their step, so that long sequences and large scores cost no digits.
    """

    @staticmethod
    def forward(ctx: Any, emissions: Tensor, lengths: Tensor, transitions: Tensor, start: Tensor, end: Tensor) -> Tensor:
        inside = torch.arange(emissions.shape[1], device=lengths.device) < lengths[:, None]
        alpha = start + emissions[:, 0]  # (S, K): log of the summed weights of all paths that end there, but for `total`
        total = torch.zeros_like(alpha[:, 0])
        alphas = []
        for t in range(emissions.shape[1]):
            if t:
                onward = _sum(alpha.unsqueeze(2) + transitions, 1) + emissions[:, t]
                alpha = torch.where(inside[:, t, None], onward, alpha)
            top = _finite(alpha.amax(1))
            alpha, total = alpha - top[:, None], total + top
            alphas.append(alpha)
        ctx.save_for_backward(emissions, inside, transitions, end, torch.stack(alphas, 1))
        return _sum(alpha + end, 1) + total

    @staticmethod
    @first_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        emissions, inside, transitions, end, alphas = ctx.saved_tensors
        upstream = grads[0][:, None]
        d_emissions = torch.zeros_like(emissions)
        d_transitions = torch.zeros_like(transitions)
        beta = end.expand_as(alphas[:, 0])
        last = ((alphas[:, -1] + end).softmax(1) * upstream).sum(0)
        for t in range(emissions.shape[1] - 1, 0, -1):
            here = inside[:, t, None]
            d_emissions[:, t] = torch.where(here, (alphas[:, t] + beta).softmax(1) * upstream, 0.0)
            ahead = transitions + (emissions[:, t] + beta).unsqueeze(1)  # (S, K, K)
            pairs = (alphas[:, t - 1].unsqueeze(2) + ahead).flatten(1).softmax(1) * upstream
            d_transitions += torch.where(here, pairs, 0.0).sum(0).view_as(transitions)
            onward = _sum(ahead, 2)
            beta = torch.where(here, onward - _finite(onward.amax(1, keepdim=True)), beta)
        d_emissions[:, 0] = (alphas[:, 0] + beta).softmax(1) * upstream
        return d_emissions, None, d_transitions, d_emissions[:, 0].sum(0), last


class CRF(nn.Module):
    """Scores of transitions, of first and of last tags, and what follows from them exactly. Everything is computed in float32
    at least; what is forbidden has the score -inf.

    Args:
        n_tags: K.
        allowed: which tags may follow which; all by default.

    Raises ConfigError when `allowed` is of another size.
    """

    no_transitions: Tensor | None
    no_start: Tensor | None
    no_end: Tensor | None

    def __init__(self, n_tags: int, allowed: Allowed | None = None) -> None:
        super().__init__()
        self.n_tags = n_tags
        self.transitions = nn.Parameter(torch.zeros(n_tags, n_tags))
        self.start = nn.Parameter(torch.zeros(n_tags))
        self.end = nn.Parameter(torch.zeros(n_tags))
        shapes = {"transitions": (n_tags, n_tags), "start": (n_tags,), "end": (n_tags,)}
        for name, shape in shapes.items():
            given = None if allowed is None else getattr(allowed, name)
            if given is not None and given.shape != shape:
                raise ConfigError(f"allowed.{name} has shape {tuple(given.shape)} and must be {shape} for {n_tags} tags")
            self.register_buffer(f"no_{name}", None if given is None else ~given, persistent=False)

    def _scores(self, emissions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Emissions, transitions, start and end in one dtype, with -inf for what is forbidden."""
        dtype = torch.promote_types(torch.promote_types(emissions.dtype, self.transitions.dtype), torch.float32)
        out = []
        for name in ("transitions", "start", "end"):
            scores, forbidden = getattr(self, name).to(dtype), getattr(self, f"no_{name}")
            out.append(scores if forbidden is None else scores.masked_fill(forbidden, -torch.inf))
        return emissions.to(dtype), out[0], out[1], out[2]

    def log_partition(self, emissions: Tensor, lengths: Tensor) -> Tensor:
        """log Z of each sequence: the log of the summed exp(score) of all K^n sequences of tags, by the forward algorithm.

        Args:
            emissions: (S, T, K); what stands after a sequence's end is not read.
            lengths: (S,) steps of each, at least 1.

        Returns:
            (S,), differentiable once.

        Raises DataError when the constraints allow no sequence of that length.
        """
        scores, transitions, start, end = self._scores(emissions)
        log_z: Tensor = _LogPartition.apply(scores, lengths, transitions, start, end)
        self._check_possible(log_z, lengths)
        return log_z

    def _check_possible(self, best: Tensor, lengths: Tensor) -> None:
        impossible = (best == -torch.inf).nonzero()
        if len(impossible):
            raise DataError(
                f"the constraints allow no sequence of {int(lengths[impossible[0, 0]])} tags: allow more transitions, first or"
                " last tags"
            )

    def score(self, emissions: Tensor, tags: Tensor, lengths: Tensor) -> Tensor:
        """score(y) of each sequence: emissions (S, T, K), tags (S, T) int64, lengths (S,) -> (S,).

        Raises DataError for a tag that is none, or that may not stand where it does; what stands after the end is not read.
        """
        scores, transitions, start, end = self._scores(emissions)
        inside = torch.arange(tags.shape[1], device=tags.device) < lengths[:, None]
        tags = torch.where(inside, tags, 0)
        wrong = ((tags < 0) | (tags >= self.n_tags)).nonzero()
        if len(wrong):
            row, step = wrong[0].tolist()
            raise DataError(
                f"sequence {row} has tag {int(tags[row, step])} at step {step}, and tags lie in [0, {self.n_tags}): correct it"
            )
        last = tags.gather(1, (lengths - 1)[:, None]).squeeze(1)
        steps = transitions[tags[:, :-1], tags[:, 1:]]  # (S, T-1)
        self._check_allowed(tags, last, inside)
        each = scores.gather(2, tags.unsqueeze(2)).squeeze(2)
        each = torch.where(inside, each, 0.0).sum(1)
        return start[tags[:, 0]] + each + torch.where(inside[:, 1:], steps, 0.0).sum(1) + end[last]

    def _check_allowed(self, tags: Tensor, last: Tensor, inside: Tensor) -> None:
        def refuse(row: int, what: str) -> None:
            raise DataError(f"sequence {row} {what}, which the constraints forbid: correct the tags, or drop the constraints")

        if self.no_start is not None:
            for row in self.no_start[tags[:, 0]].nonzero()[:1, 0].tolist():
                refuse(row, f"begins with tag {int(tags[row, 0])}")
        if self.no_transitions is not None:
            for row, t in (self.no_transitions[tags[:, :-1], tags[:, 1:]] & inside[:, 1:]).nonzero()[:1].tolist():
                refuse(row, f"has tag {int(tags[row, t + 1])} after tag {int(tags[row, t])} at step {t + 1}")
        if self.no_end is not None:
            for row in self.no_end[last].nonzero()[:1, 0].tolist():
                refuse(row, f"ends with tag {int(last[row])}")

    def log_likelihood(self, emissions: Tensor, tags: Tensor, lengths: Tensor) -> Tensor:
        """log p(tags) = score(tags) - log Z of each sequence, in nats: (S,). Raises DataError as both do."""
        # What all tags of a step have in common changes no probability, and would cost digits.
        emissions = emissions - emissions.detach().amax(2, keepdim=True)
        return self.score(emissions, tags, lengths) - self.log_partition(emissions, lengths)

    @torch.no_grad()
    def viterbi(self, emissions: Tensor, lengths: Tensor) -> tuple[list[list[int]], Tensor]:
        """The best sequence of tags of each, and its score: emissions (S, T, K), lengths (S,) -> S lists, (S,).

        Of equal ones, that whose last differing tag is the smallest (Viterbi 1967). Raises DataError as `log_partition` does.
        """
        scores, transitions, start, end = self._scores(emissions)
        inside = torch.arange(scores.shape[1], device=lengths.device) < lengths[:, None]
        best = start + scores[:, 0]
        stay = torch.arange(self.n_tags, device=best.device).expand_as(best)
        pointers = []
        for t in range(1, scores.shape[1]):
            onward, before = (best.unsqueeze(2) + transitions).max(1)
            best = torch.where(inside[:, t, None], onward + scores[:, t], best)
            pointers.append(torch.where(inside[:, t, None], before, stay))
        top, tag = (best + end).max(1)
        self._check_possible(top, lengths)
        path = [tag]
        for pointer in reversed(pointers):
            tag = pointer.gather(1, tag.unsqueeze(1)).squeeze(1)
            path.append(tag)
        rows = torch.stack(path[::-1], 1).tolist()
        return [row[:n] for row, n in zip(rows, lengths.tolist(), strict=True)], top

    @torch.no_grad()
    def marginals(self, emissions: Tensor, lengths: Tensor) -> Tensor:
        """p(y_t = k) of every step: emissions (S, T, K), lengths (S,) -> (S, T, K), zero after a sequence's end.

        It is the gradient of log Z by the emissions. Raises DataError as `log_partition` does.
        """
        with torch.enable_grad():
            scores = self._scores(emissions)[0].detach().requires_grad_()
            return torch.autograd.grad(self.log_partition(scores, lengths).sum(), scores)[0]
