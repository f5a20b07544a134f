"""What a request may ask of the engine."""

from __future__ import annotations

import math
from collections.abc import Iterable

from athanor.core.errors import RequestError
from athanor.tokenizer.vocabulary import Vocabulary
from athanor.types import Request, SamplingParams


def check(request: Request, max_len: int, vocab_size: int, prompted: bool = True) -> None:
    """Raise RequestError, naming field, value, rule and remedy, for a request that cannot be answered.

    Args:
        request: what was asked.
        max_len: tokens that prompt and answer may have, or a source alone.
        vocab_size: of the model.
        prompted: whether the answer goes on from the prompt, and is not one to a source.
    """
    p, n = request.params, len(request.prompt_ids)
    if n == 0:
        raise RequestError("the prompt is empty: give at least one token (the beginning-of-text token will do)", "messages")
    if n > max_len and not prompted:
        raise RequestError(f"the source has {n} tokens and the model reads {max_len}: shorten it by {n - max_len}", "messages")
    if n >= max_len and prompted:
        raise RequestError(
            f"the prompt has {n} tokens and the context holds {max_len}, with room for one answer token at least:"
            f" shorten it by {n - max_len + 1} tokens",
            "messages",
        )
    if not all(0 <= i < vocab_size for i in request.prompt_ids):
        raise RequestError(f"the prompt holds token ids outside [0, {vocab_size}): it was made by another tokenizer", "messages")
    _check_numbers(p)
    for field in ("logit_bias", "allowed_ids", "stop_ids"):
        given = getattr(p, field) or ()
        for item in given:
            id = item[0] if field == "logit_bias" else item
            if not 0 <= id < vocab_size:
                raise RequestError(f"{field} has the token {id}, which must lie in [0, {vocab_size})", field)
    if p.allowed_ids is not None and not p.allowed_ids:
        raise RequestError("allowed_ids is empty, so that nothing could be said: name tokens, or leave it out", "allowed_ids")
    if p.prompt_logprobs is not None and not prompted:
        raise RequestError(
            "prompt_logprobs are of models that go on from a prompt, and this one answers to it: leave it out", "prompt_logprobs"
        )
    if p.structure is not None:
        _check_structure(p)


def _check_numbers(p: SamplingParams) -> None:
    def of(field: str, rule: str) -> RequestError:
        return RequestError(f"{field} ({getattr(p, field)}) must {rule}", field)

    if p.max_tokens < 1:
        raise of("max_tokens", "be at least 1")
    if not (math.isfinite(p.temperature) and p.temperature >= 0):
        raise of("temperature", "be a finite number, 0 (greedy) or more")
    if not 0 < p.top_p <= 1:
        raise of("top_p", "lie in (0, 1]")
    if p.top_k < 0:
        raise of("top_k", "be 0 (all tokens) or more")
    if not 0 <= p.min_p <= 1:
        raise of("min_p", "lie in [0, 1]")
    if not (math.isfinite(p.repetition_penalty) and p.repetition_penalty > 0):
        raise of("repetition_penalty", "be a finite number above 0: 1 is off")
    for field in ("presence_penalty", "frequency_penalty"):
        if not -2 <= getattr(p, field) <= 2:
            raise of(field, "lie in [-2, 2]")
    if not all(math.isfinite(bias) for _, bias in p.logit_bias):
        raise RequestError(
            "logit_bias must be finite numbers: -100 all but forbids a token, 100 all but demands it", "logit_bias"
        )
    if not 0 <= p.min_tokens <= p.max_tokens:
        raise of("min_tokens", f"lie between 0 and max_tokens ({p.max_tokens})")
    for field in ("logprobs", "prompt_logprobs"):
        if getattr(p, field) is not None and getattr(p, field) < 0:
            raise of(field, "be 0 or more")


def _check_structure(p: SamplingParams) -> None:
    """A structure says which tokens may come: others that do could leave none."""
    others = {"allowed_ids": None, "bad_words": (), "min_tokens": 0, "ignore_eos": False}
    for field, unset in others.items():
        if getattr(p, field) != unset:
            raise RequestError(f"{field} does not go with a structure, which says alone what may come: leave one out", field)


def bad_words(tokenizer: Vocabulary, words: Iterable[str]) -> list[tuple[int, ...]]:
    """Every way in which a word may stand in an answer: at its start, and after a space."""
    found = [tuple(tokenizer.encode(before + word)) for word in words for before in ("", " ")]
    return [ids for ids in dict.fromkeys(found) if ids]
