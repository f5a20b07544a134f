"""Beam search: of many answers the most probable one, as far as a few beams find it.

Each step extends the B most probable unfinished answers by one token; answers that end are kept apart, scored by their
log-probability divided by length^penalty (Wu et al. 2016, arXiv 1609.08144, section 7, with the simpler penalty that is usual
now), and the search stops when no unfinished answer can overtake the worst that is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from athanor.core.errors import ConfigError, RequestError
from athanor.infer.rows import Rows
from athanor.models.base import CausalLM, EncoderDecoder


@dataclass(frozen=True)
class Beams:
    """How to search.

    beams           answers that are followed at once
    max_tokens      new tokens at most
    length_penalty  the power of the length by which log-probabilities are divided: 0 favours short answers, more than 1 long ones
    early_stopping  whether to stop as soon as `beams` answers have ended, even if a better one may come
    """

    beams: int = 4
    max_tokens: int = 128
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self) -> None:
        for name in ("beams", "max_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise RequestError(f"{name} ({value}) must be a whole number of at least 1", name)


@dataclass(frozen=True)
class Answer:
    """One answer: its tokens, the end included, the log-probability of each, and its score."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    score: float = 0.0

    @property
    def total(self) -> float:
        """Its log-probability, in nats."""
        return sum(self.logprobs)


def beam_search(model: CausalLM | EncoderDecoder, prompt: Sequence[int], how: Beams, eos: Collection[int]) -> Answer:
    """The best answer that beam search finds.

    Args:
        model: that generates.
        prompt: ids that the answer goes on from; of an encoder-decoder, what it answers.
        how: to search.
        eos: ids that end an answer.

    Raises:
        ConfigError: an encoder-decoder whose files do not say what answers begin with.
        RequestError: no prompt, or one that does not fit the context with its answer; more beams than the vocabulary holds.
    """
    start, sources = list(prompt), None
    if isinstance(model, EncoderDecoder):
        start = list(model.token_ids.start)
        if not start:
            raise ConfigError(
                "the model's config.json names no decoder_start_token_id, with which an encoder-decoder's answers begin: add it"
            )
        sources = [list(prompt)] * how.beams
    _check(model, prompt, start, how)
    kept = max(2, 1 + len(eos)) * how.beams  # so many that even if all beams end, as many go on
    if how.beams > model.config.vocab_size - len(eos):
        raise RequestError(f"beams ({how.beams}) is too many for a vocabulary of {model.config.vocab_size}: use fewer", "beams")
    runner = Rows(model)
    logits = runner.prefill([start] * how.beams, 0, sources)
    running, finished = [Answer()] * how.beams, list[Answer]()
    # All beams begin equal: only the first may be extended.
    scores = torch.full((how.beams,), -1e9, device=logits.device)
    scores[0] = 0.0
    while True:
        logprobs = torch.log_softmax(logits, -1)
        best, index = (logprobs + scores[:, None]).flatten().topk(min(kept, logprobs.numel()))
        rows, tokens = (x.tolist() for x in (index // logprobs.shape[1], index % logprobs.shape[1]))
        own = logprobs.flatten()[index].tolist()
        length = len(running[0].ids) + 1
        following, parents = list[Answer](), list[int]()
        for rank, (row, token, score) in enumerate(zip(rows, tokens, best.tolist(), strict=True)):
            parent = running[row]
            answer = Answer((*parent.ids, token), (*parent.logprobs, own[rank]), score)
            if token in eos or length >= how.max_tokens:
                if rank < how.beams:
                    finished.append(Answer(answer.ids, answer.logprobs, score / length**how.length_penalty))
            elif len(following) < how.beams:
                following.append(answer)
                parents.append(row)
        finished = sorted(finished, key=lambda a: -a.score)[: how.beams]
        full = len(finished) == how.beams
        if not following or (full and (how.early_stopping or not _can_improve(following[0], finished[-1], how))):
            return finished[0]
        runner.move([(row, i) for i, row in enumerate(parents) if row != i], len(start) + length - 1)
        running, scores = following, torch.tensor([a.score for a in following], device=logits.device)
        logits = runner.decode([a.ids[-1] for a in running], [len(start) + length - 1] * how.beams)


def _can_improve(best: Answer, worst: Answer, how: Beams) -> bool:
    """Whether an unfinished answer, ended now, would overtake a finished one: longer ones only lose probability."""
    return best.score / len(best.ids) ** how.length_penalty > worst.score


def _check(model: CausalLM | EncoderDecoder, prompt: Sequence[int], start: Sequence[int], how: Beams) -> None:
    context: int = getattr(model.config, "cached_positions", model.config.max_positions)
    if not prompt:
        raise RequestError("the prompt is empty: give at least one token", "prompt")
    if not all(0 <= i < model.config.vocab_size for i in prompt):
        raise RequestError(
            f"the prompt holds token ids outside [0, {model.config.vocab_size}): it was made by another tokenizer", "prompt"
        )
    if len(prompt) > context or len(start) + how.max_tokens > context:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens and max_tokens is {how.max_tokens}, and the context holds {context}: shorten"
            " the prompt, or ask for fewer tokens",
            "max_tokens",
        )
