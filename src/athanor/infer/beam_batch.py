"""Beam search of many prompts at once: the answers of `beam.beam_search`, several times as fast.

Legend: P prompts that are searched together, B beams of each, V vocabulary. The beams of the p-th prompt that is still being
answered stand in rows p B to p B + B - 1 of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch

from athanor.core.device import Precision
from athanor.infer.beam import Answer, Beams, _can_improve, _check, beam_search
from athanor.infer.rows import Rows
from athanor.models.base import CausalLM, EncoderDecoder

__all__ = ["beam_search_batch"]


@dataclass
class _Search:
    """One prompt's search.

    number    of the prompt
    before    tokens in the cache before its answers
    limit     tokens of an answer at most
    running   unfinished answers, one for each of its rows
    finished  the best that have ended
    parents   which of its beams each row goes on from
    """

    number: int
    before: int
    limit: int
    running: list[Answer]
    finished: list[Answer] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)

    def extend(self, found: Sequence[tuple[int, int, float, float]], how: Beams, eos: Collection[int]) -> bool:
        """Take the most probable (beam, token, log-probability, score), best first; whether the search goes on."""
        length = len(self.running[0].ids) + 1
        following: list[Answer] = []
        self.parents = []
        for rank, (beam, token, logprob, score) in enumerate(found):
            parent = self.running[beam]
            if token in eos or length >= self.limit:
                if rank < how.beams:
                    ended = score / length**how.length_penalty
                    self.finished.append(Answer((*parent.ids, token), (*parent.logprobs, logprob), ended))
            elif len(following) < how.beams:
                following.append(Answer((*parent.ids, token), (*parent.logprobs, logprob), score))
                self.parents.append(beam)
        self.finished = sorted(self.finished, key=lambda a: -a.score)[: how.beams]
        self.running = following
        full = len(self.finished) == how.beams
        return bool(following) and not (full and (how.early_stopping or not _can_improve(following[0], self.finished[-1], how)))


def beam_search_batch(
    model: CausalLM | EncoderDecoder,
    prompts: Sequence[Sequence[int]],
    how: Beams,
    eos: Collection[int],
    *,
    limits: Sequence[int] | None = None,
    at_once: int = 64,
    precision: Precision = "fp32",
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """The best answer to each prompt, as `beam_search` finds it.

    Args:
        model, how, eos: as there.
        prompts: in any order; those of like length are searched together.
        limits: for each prompt, new tokens at most, where that is less than `how.max_tokens`.
        at_once: prompts.
        precision: of the matrix products.
        progress: told how many prompts are answered.

    Raises:
        ConfigError, RequestError: as `beam_search` does.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    answers: list[Answer] = [Answer()] * len(prompts)
    start = model.token_ids.start if isinstance(model, EncoderDecoder) else ()
    for prompt in prompts:
        if how.beams > model.config.vocab_size - len(eos) or (isinstance(model, EncoderDecoder) and not start):
            beam_search(model, prompt, how, eos)  # raises
        _check(model, prompt, start or prompt, how)
    for first in range(0, len(order), at_once):
        chosen = order[first : first + at_once]
        limit = [how.max_tokens if limits is None else min(limits[i], how.max_tokens) for i in chosen]
        found = _together(model, [prompts[i] for i in chosen], limit, start, how, eos, precision)
        for number, answer in zip(chosen, found, strict=True):
            answers[number] = answer
        if progress is not None:
            progress(min(first + at_once, len(order)))
    return answers


def _together(
    model: CausalLM | EncoderDecoder,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    start: Sequence[int],
    how: Beams,
    eos: Collection[int],
    precision: Precision,
) -> list[Answer]:
    beams, vocabulary = how.beams, model.config.vocab_size
    kept = min(max(2, 1 + len(eos)) * beams, beams * vocabulary)  # so many that even if all beams end, as many go on
    runner = Rows(model, precision)
    each = [list(p) for p in prompts for _ in range(beams)]
    logits = runner.prefill([start] * len(each) if start else each, 0, each if start else None)
    live = [_Search(i, len(start or p), limits[i], [Answer()] * beams) for i, p in enumerate(prompts)]
    done: dict[int, Answer] = {}
    # All beams of a prompt begin equal: only the first may be extended.
    scores = torch.full((len(prompts), beams), -1e9, device=logits.device)
    scores[:, 0] = 0.0
    while True:
        logprobs = torch.log_softmax(logits, -1).view(len(live), beams * vocabulary)  # (P, B V)
        best, index = (logprobs + scores.repeat_interleave(vocabulary, 1)).topk(kept)
        own = logprobs.gather(1, index)
        rows, tokens = (index // vocabulary).tolist(), (index % vocabulary).tolist()
        moves: list[tuple[int, int]] = []
        following: list[_Search] = []
        for at, (search, *found) in enumerate(zip(live, rows, tokens, own.tolist(), best.tolist(), strict=True)):
            if search.extend(list(zip(*found, strict=True)), how, eos):
                to = len(following) * beams
                moves += [(at * beams + parent, to + i) for i, parent in enumerate(search.parents)]
                following.append(search)
            else:
                done[search.number] = search.finished[0]
        if not following:
            return [done[i] for i in range(len(prompts))]
        live = following
        lengths = [s.before + len(s.running[0].ids) - 1 for s in live for _ in range(beams)]
        runner.move([(source, target) for source, target in moves if source != target], max(lengths))
        scores = torch.tensor([[a.score for a in s.running] for s in live], device=logits.device)
        logits = runner.decode([a.ids[-1] for s in live for a in s.running], lengths)
