"""Speculative decoding: next tokens are guessed cheaply, and one step of the model checks all of them (Leviathan et al. 2023).

A guess is right when it is the token that would have been drawn anyway: the random number of a token depends on its seed and
index alone (`sampling.py`), so what follows each guess is drawn with the number that it would have had. The answer is token for
token the one without guesses, greedy or sampled: nothing is rejected that has to be drawn again from another distribution.
"""

from __future__ import annotations

from collections.abc import Sequence as TokenSequence
from typing import Protocol

from athanor.core.device import Precision
from athanor.core.errors import ConfigError
from athanor.infer.runner import Part, Runner
from athanor.infer.sampling import Row, sample
from athanor.infer.sequence import Sequence
from athanor.models.base import CausalLM


class Guesser(Protocol):
    """Says what may come next."""

    def plan(self, sequence: Sequence, most: int) -> list[int]:
        """Guesses for one sequence, `most` at most, as far as they are known before the step; their number is final."""
        ...

    def fill(self, sequences: TokenSequence[Sequence]) -> None:
        """Make the guesses of sequences whose blocks are held now."""
        ...


class NGram:
    """What followed when the last tokens stood together before: prompt look-up (Saxena 2023), for texts that repeat themselves.

    Args:
        count: tokens that are guessed.
        longest: tokens that must stand together; fewer, down to 2, where so many did not.
    """

    def __init__(self, count: int = 5, longest: int = 4) -> None:
        if count < 1 or longest < 2:
            raise ConfigError(f"count ({count}) must be at least 1 and longest ({longest}) at least 2")
        self.count, self.longest = count, longest

    def plan(self, sequence: Sequence, most: int) -> list[int]:
        tokens, seen = sequence.tokens, sequence.seen
        # What ends before the last token is known with what follows it.
        for end in range(sequence.n_seen + 1, len(tokens)):
            for n in range(2, min(self.longest, end) + 1):
                seen[tuple(tokens[end - n : end])] = end
        sequence.n_seen = max(sequence.n_seen, len(tokens) - 1)
        for n in range(min(self.longest, len(tokens)), 1, -1):
            at = seen.get(tuple(tokens[-n:]))
            if at is not None:
                guesses: list[int] = []
                for i in range(at, at + min(self.count, most)):  # what repeats itself goes on to do so
                    guesses.append(tokens[i] if i < len(tokens) else guesses[i - len(tokens)])
                return guesses
        return []

    def fill(self, sequences: TokenSequence[Sequence]) -> None:
        """They are made already."""


class Draft:
    """A smaller model with the same vocabulary, which reads and writes a cache of its own in the blocks of the large one's.

    Args:
        model: the small one.
        count: tokens that are guessed.
        precision: of its matrix products.
    """

    def __init__(self, model: CausalLM, count: int = 4, precision: Precision = "fp32") -> None:
        if count < 1:
            raise ConfigError(f"count ({count}) must be at least 1")
        self.model, self.count, self.precision = model, count, precision
        self._runner: Runner | None = None

    def attach(self, blocks: int, size: int, slots: int, vocab_size: int, max_len: int) -> None:
        """Make room for the blocks of an engine. Raises ConfigError for a model that does not go with the engine's."""
        if self.model.config.vocab_size != vocab_size:
            raise ConfigError(
                f"the draft model has {self.model.config.vocab_size} tokens and the model {vocab_size}: take one with the same"
                " vocabulary"
            )
        context = getattr(self.model.config, "cached_positions", self.model.config.max_positions)
        if context < max_len:
            raise ConfigError(f"the draft model reads {context} tokens and the engine {max_len}: lower max_len, or take another")
        self._runner = Runner(self.model, blocks, size, slots, self.precision)

    def plan(self, sequence: Sequence, most: int) -> list[int]:
        return [0] * min(self.count, most)

    def fill(self, sequences: TokenSequence[Sequence]) -> None:
        assert self._runner is not None
        going = [(s, len(s.draft)) for s in sequences if s.draft]
        for s, _ in going:
            s.draft = []
            s.drafted = min(s.drafted, s.length - 1)
        while going:
            parts = []
            for s, _ in going:
                tokens = [*s.tokens, *s.draft]
                parts.append(Part(tokens[s.drafted :], s.drafted, s.table, s.slot or 0, 1))
                s.drafted = len(tokens)
            rows = [Row(s.request.params, prompt=s.request.prompt_ids, ids=[*s.ids, *s.draft]) for s, _ in going]
            tokens_, _ = sample(self._runner.logits(self._runner.run(parts)), rows)
            for (s, _), token in zip(going, tokens_.tolist(), strict=True):
                s.draft.append(token)
            going = [(s, n) for s, n in going if len(s.draft) < n]
