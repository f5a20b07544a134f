"""Speculative decoding: next tokens are guessed cheaply, and one step of the model checks all of them (Leviathan et al. 2023).

A guess is right when it is the token that would have been drawn anyway: the random number of a token depends on its seed and
index alone (`sampling.py`), so what follows each guess is drawn with the number that it would have had. The answer is token for
token the one without guesses, greedy or sampled: nothing is rejected that has to be drawn again from another distribution.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as TokenSequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from athanor.core.device import Precision, autocast
from athanor.core.errors import ConfigError
from athanor.infer.runner import Part, Runner
from athanor.infer.sampling import Row, sample
from athanor.infer.sequence import Sequence
from athanor.models.base import CausalLM
from athanor.nn.paged import Paged, PagedCache


class Guesser(Protocol):
    """Says what may come next."""

    def plan(self, sequence: Sequence, most: int) -> list[int]:
        """Guesses for one sequence, `most` at most, as far as they are known before the step; their number is final."""
        ...

    def fill(self, sequences: TokenSequence[Sequence]) -> None:
        """Make the guesses of sequences whose blocks are held now."""
        ...


def by(guess: int | Literal["heads"]) -> Guesser | None:
    """What the option `guess` names: n-grams that guess so many tokens, the model's own heads, or nothing (0)."""
    if guess == "heads":
        return Heads()
    if guess < 0:
        raise ConfigError(f"guess is {guess}, but must be 0 (nothing is guessed), a number of tokens, or heads")
    return NGram(guess) if guess else None


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
            for s, _ in going:
                if s.slot in self._runner.spoilt:  # its guesses will be wrong, those of whoever gets its blocks need not be
                    self._runner.clear(s.table, s.slot or 0)
            for (s, _), token in zip(going, tokens_.tolist(), strict=True):
                s.draft.append(token)
            going = [(s, n) for s, n in going if len(s.draft) < n]


class _Piece(NamedTuple):
    """Positions of one sequence that the heads read: hidden states (n, D) of the model, the first of position `start`."""

    sequence: Sequence
    start: int
    hidden: Tensor


class _Seen(NamedTuple):
    """What is kept of a sequence whose first `end` positions the heads have read.

    last     hidden states of its last positions, which are read once more when the tokens after them are known
    guesses  what comes after its last token
    """

    end: int
    last: Tensor
    guesses: list[int]


class Heads:
    """The model's own heads for the tokens after the next (DeepSeek-AI 2024, section 2.2): as many guesses as it has heads.

    At position i the k-th of K heads reads the state of the head before it (of the model, for the first) and token i + k, and
    says what token i + k + 1 is. When token t has just been chosen, the heads at position t - 1 say tokens t + 1 .. t + K, each
    reading what the one before it has said.

    Their keys lie in a cache of their own, in the blocks of the model's: what others have computed of a prompt is read here too.
    In a block that is shared the last K positions were made with what came next for those who computed it: that costs right
    guesses, never an answer. A guesser belongs to one engine.
    """

    def __init__(self) -> None:
        self.count = 0
        self._runner: Runner | None = None
        self._seen: WeakKeyDictionary[Sequence, _Seen] = WeakKeyDictionary()

    def attach(self, runner: Runner, blocks: int) -> None:
        """Make room for the blocks of an engine. Raises ConfigError for a model without heads, and for a second engine."""
        if self._runner is not None:
            raise ConfigError("these heads guess for another engine already: make new ones for each engine")
        model: Any = runner.model
        if getattr(model, "ahead", None) is None:
            raise ConfigError(
                f"guesses by heads need heads for the tokens after the next, and this {model.model_type} has none: take a"
                " deepseek_v3 that was built with n_ahead above 0 and trained with multi_token, or guess by n-grams (a number)"
            )
        layers = model.mtp_layers()
        self.count, self._runner = len(layers), runner
        self._cache = PagedCache(layers, blocks, runner.cache.size, 0, runner.cache.dtype, model.device)

    def plan(self, sequence: Sequence, most: int) -> list[int]:
        seen = self._seen.get(sequence)
        return [] if seen is None else seen.guesses[:most]

    def fill(self, sequences: TokenSequence[Sequence]) -> None:
        """They are made already."""

    @torch.inference_mode()
    def read(self, news: Iterable[tuple[Sequence, int, Tensor]]) -> None:
        """Read what a step has computed, and guess what comes after the tokens that it has chosen.

        Args:
            news: sequences as they are after the step, the position of the first hidden state that is known of each, and these
                (n, D); those of wrong guesses may be among them.
        """
        few: list[_Piece] = []
        many: list[_Piece] = []
        for s, start, hidden in news:
            seen, hidden = self._seen.pop(s, None), hidden[: max(0, s.computed - start)]
            if not len(hidden):
                continue
            if seen is not None and seen.end == start:
                start, hidden = start - len(seen.last), torch.cat((seen.last, hidden))
            (few if len(hidden) <= 2 * self.count else many).append(_Piece(s, start, hidden))
        # A few tokens stand for themselves each, like those of other sequences: so they are read as fast as in decoding.
        if few:
            self._pass(few, [(p, i, 1) for p in few for i in range(len(p.hidden))])
        if many:
            self._pass(many, [(p, 0, len(p.hidden)) for p in many])

    def _pass(self, pieces: list[_Piece], runs: list[tuple[_Piece, int, int]]) -> None:
        """All heads over some pieces, of which runs (piece, first, tokens) are attended to together."""
        assert self._runner is not None
        model: Any = self._runner.model
        longest = max(len(p.sequence.table) for p in pieces)
        tables = [p.sequence.table + [0] * (longest - len(p.sequence.table)) for p, _, _ in runs]
        numbers = (tables, [p.start + first for p, first, _ in runs], [count for _, _, count in runs])
        tables_, starts, lengths = (torch.tensor(x, device=model.device) for x in numbers)
        ctx = Paged(self._cache, tables_, starts, lengths)
        guesses: list[list[int]] = [[] for _ in pieces]
        ends = accumulate(len(p.hidden) for p in pieces)
        asking = [(p.sequence, g, end - 1) for p, g, end in zip(pieces, guesses, ends, strict=True) if _asks(p.sequence)]
        last = torch.tensor([at for _, _, at in asking], device=model.device, dtype=torch.int64)
        hidden = torch.cat([p.hidden for p in pieces]).unsqueeze(0)
        for k in range(1, self.count + 1):
            pairs = zip(pieces, guesses, strict=True)
            later = [token for p, g in pairs for token in _tokens(p.sequence, g, p.start + k, len(p.hidden))]
            with autocast(model.device, self._runner.precision):
                hidden = model.mtp_state(k, torch.tensor([later], device=model.device), hidden, ctx)
            if asking:
                rows = [Row(s.request.params, prompt=s.request.prompt_ids, ids=[*s.ids, *g]) for s, g, _ in asking]
                tokens, _ = sample(self._runner.logits(hidden[0, last]), rows)
                for (_, g, _), token in zip(asking, tokens.tolist(), strict=True):
                    g.append(token)
        for p, g in zip(pieces, guesses, strict=True):
            count = len(p.hidden)
            # At the last K - 1 positions heads after the first have read guesses.
            self._seen[p.sequence] = _Seen(p.start + count, p.hidden[max(0, count - self.count + 1) :].clone(), g)


def _asks(sequence: Sequence) -> bool:
    """Whether the next step reads its last token, and can check what comes after that."""
    return not sequence.finish_reason and sequence.due == 1


def _tokens(sequence: Sequence, guesses: list[int], first: int, count: int) -> list[int]:
    """Tokens `first` .. `first + count - 1` of a sequence that goes on as guessed; 0 where nobody knows."""
    known = sequence.tokens[first : first + count]
    known += guesses[max(0, first - sequence.length) :][: count - len(known)]
    return known + [0] * (count - len(known))
