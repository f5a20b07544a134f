"""Translations and how good they are: beam search over many texts, and BLEU (Papineni et al. 2002) by sacrebleu (Post 2018)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athanor.core import io
from athanor.core.device import Precision
from athanor.core.errors import ConfigError, DataError, MissingExtraError, nearest
from athanor.data.pairs import TextPair
from athanor.infer.beam import Beams
from athanor.infer.beam_batch import beam_search_batch
from athanor.models.base import EncoderDecoder
from athanor.tokenizer.bpe import Tokenizer

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

_RESAMPLES = 1000  # of the bootstrap
_EXAMPLES = 5
_MORE = 10  # tokens


@dataclass(frozen=True)
class Search:
    """How texts are translated and how that is measured.

    beams           translations that are followed at once
    length_penalty  power of the length by which their log-probabilities are divided: more than 1 favours long ones
    ratio           a translation has at most this many times the tokens of its source, and 10 more: weak models find no end
    tokenize        how BLEU finds words: a tokenizer of sacrebleu (13a is usual; intl, zh, char ...)
    """

    beams: int = 5
    length_penalty: float = 1.0
    ratio: float = 2.0
    tokenize: str = "13a"

    def __post_init__(self) -> None:
        if not self.ratio > 0:
            raise ConfigError(f"search.ratio ({self.ratio}) must be positive: 2 is usual")


@dataclass(frozen=True)
class Translations:
    """Texts, one for each source; `cut` sources were too long for the model and lost their ends, `open` answers have no end."""

    texts: list[str]
    cut: int
    open: int


@dataclass(frozen=True)
class Bleu:
    """BLEU of a corpus, 0 to 100, with its 95 % interval by bootstrap (Koehn 2004).

    signature  how it was computed, in sacrebleu's words: figures with other signatures cannot be compared
    brevity    the brevity penalty that is part of it; 1 is none
    """

    value: float
    low: float
    high: float
    signature: str
    brevity: float


def translate(
    model: EncoderDecoder, tokenizer: Tokenizer, texts: Sequence[str], how: Search, *, precision: Precision = "fp32"
) -> Translations:
    """What the model makes of each text, on one line."""
    longest, eos = model.config.max_positions, model.token_ids.eos
    sources = [tokenizer.prompt(text) for text in texts]
    cut = sum(len(source) > longest for source in sources)
    beams = Beams(how.beams, longest - len(model.token_ids.start), how.length_penalty)
    limits = [int(how.ratio * len(source)) + _MORE for source in sources]
    found = beam_search_batch(model, [s[:longest] for s in sources], beams, eos, limits=limits, precision=precision)
    answers = [" ".join(tokenizer.decode(answer.ids).split()) for answer in found]
    return Translations(answers, cut, sum(answer.ids[-1] not in eos for answer in found))


def metric(tokenize: str = "13a", *, lower: bool = False) -> BLEU:
    """sacrebleu's BLEU.

    Args:
        tokenize: as in `Search`.
        lower: whether case is left out of account.

    Raises:
        MissingExtraError: sacrebleu is not installed. ConfigError: it has no such tokenizer.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "BLEU is computed by sacrebleu, which is not installed: pip install 'athanor-lm[eval]'"
        ) from error
    if tokenize not in BLEU.TOKENIZERS:
        known = ", ".join(BLEU.TOKENIZERS)
        raise ConfigError(f"tokenize ({tokenize!r}) must be one of sacrebleu's: {known}{nearest(tokenize, BLEU.TOKENIZERS)}")
    try:
        return BLEU(lowercase=lower, tokenize=tokenize, force=True)
    except Exception as error:  # what sacrebleu raises where a tokenizer of others is missing
        raise MissingExtraError(f"sacrebleu's tokenizer {tokenize!r} does not start: {error}") from error


def bleu(hypotheses: Sequence[str], references: Sequence[str], how: BLEU) -> Bleu:
    """BLEU of translations, each beside its reference. Raises DataError when they differ in number or there are none."""
    if len(hypotheses) != len(references) or not references:
        raise DataError(
            f"there are {len(hypotheses)} translations and {len(references)} references: give one for each, and at least one"
        )
    score = how.corpus_score(hypotheses, [references], n_bootstrap=_RESAMPLES)
    mean, half = score._mean, score._ci
    return Bleu(score.score, max(0.0, mean - half), min(100.0, mean + half), str(how.get_signature()), score.bp)


def measure(
    model: EncoderDecoder, tokenizer: Tokenizer, pairs: Sequence[TextPair], how: Search, metric: BLEU, file: Path
) -> dict[str, Any]:
    """Translate the sources into `file`, a line each, and compare with the targets.

    Returns:
        the fields of `Bleu`; `cut` and `open` of `Translations`; `seconds`; `examples`, up to 5 of (source, translation, target).
    """
    start = time.perf_counter()
    sources, targets = [pair.source for pair in pairs], [pair.target for pair in pairs]
    found = translate(model, tokenizer, sources, how)
    seconds = time.perf_counter() - start
    io.atomic_write(file, "".join(f"{text}\n" for text in found.texts))
    each = list(zip(sources, found.texts, targets, strict=True))[:: -(-len(pairs) // _EXAMPLES)]
    score = asdict(bleu(found.texts, targets, metric))
    return score | {"cut": found.cut, "open": found.open, "seconds": seconds, "examples": each}


def measure_all(
    model: Any, tokenizer: Tokenizer, parts: Mapping[str, Sequence[TextPair]], how: Search, metric: BLEU, folder: Path
) -> dict[str, dict[str, Any]]:
    """`measure` of each part by its name, into a file of that name."""
    return {name: measure(model, tokenizer, pairs, how, metric, folder / f"{name}.txt") for name, pairs in parts.items()}


def told(name: str, record: Mapping[str, Any]) -> str:
    """What a run's record says of the translations of one text, for people."""
    lines = [
        f"  {name}: BLEU {record['value']:.2f} [{record['low']:.2f}, {record['high']:.2f}] {record['signature']},"
        f" in {record['seconds']:.0f} s",
        f"    {record['cut']} sources cut, {record['open']} translations without an end; all in translations/{name}.txt",
    ]
    for source, ours, theirs in record["examples"]:
        lines.append(f"    source       {source}\n    translation  {ours}\n    reference    {theirs}\n")
    return "\n".join(lines)
