"""The schema of a run's `report.json`, as TypedDicts, and its check.

A report is written by the recipe that made the run and read by the page; nothing else stands between them. Fields of
the `...Required` classes must be there, the others may be missing or null: the page then leaves their section out
and says so. Additional keys are allowed everywhere. All intervals are 95 %, all shares lie in 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

from athanor.core.errors import CheckpointError, nearest

Share = Annotated[float, (0.0, 1.0)]  # a fraction
Amount = Annotated[float, (0.0, math.inf)]  # seconds, bits per byte, tokens per second ...
Count = Annotated[int, (0, math.inf)]  # bytes, documents, problems ...

RUNGS = ("base", "sft", "rl", "int8", "int4")  # the ladder, in the order of the work
COMPRESSED = ("int8", "int4")
_PARENT = {"sft": "base", "rl": "sft", "int8": "rl", "int4": "rl"}


class Score(TypedDict):
    """A share of `n` trials with its 95 % interval: low <= value <= high."""

    value: Share
    low: Share
    high: Share
    n: Count


class Rung(TypedDict):
    """What one checkpoint can do and what it costs.

    accuracy           over all test problems
    format_rate        answers in the asked form (one <think> block, then an answer)
    stop_rate          answers that ended by themselves
    bits_per_byte      on held-out text, or null when it was not measured
    bytes              of the weights on disk
    tokens_per_second  when generating, or null
    """

    accuracy: Score
    format_rate: Share
    stop_rate: Share
    bits_per_byte: Amount | None
    bytes: Count
    tokens_per_second: Amount | None
    skills: dict[str, Score]
    languages: dict[str, Score]


class Stage(TypedDict):
    """One stage and its wall-clock seconds; further keys are figures of the stage's own."""

    name: str
    seconds: Amount


class Plan(TypedDict):
    """What was planned from the one dial; `parameters` of the model, and whatever else the planner decided."""

    parameters: Count


class Corpus(TypedDict):
    """Documents and bytes kept, their split, and how many documents were dropped for which reason."""

    documents: Count
    bytes: Count
    train_bytes: Count
    heldout_bytes: Count
    dropped: dict[str, Count]


class TokenizerFacts(TypedDict):
    """`bytes_per_token` on held-out text."""

    vocab_size: Count
    bytes_per_token: Amount


class BitsPerByte(TypedDict):
    """The pre-trained model and three compressors on the same held-out text."""

    model: Amount
    gzip: Amount
    bz2: Amount
    xz: Amount


class _LossPointRequired(TypedDict):
    step: Count
    loss: float


class LossPoint(_LossPointRequired, total=False):
    """One logged step of pre-training or supervised tuning; loss in nats per token."""

    lr: float | None
    tokens_per_second: float | None
    grad_norm: float | None
    heldout_bits_per_byte: float | None


class _GrpoPointRequired(TypedDict):
    step: Count
    reward: float


class GrpoPoint(_GrpoPointRequired, total=False):
    """One step of GRPO.

    length       mean tokens of an answer
    dead_groups  groups whose answers all earned the same reward, and so have no gradient
    ratio_gap    difference between the engine's and the trainer's log-probabilities
    kl, clipped  divergence from the reference, share of tokens whose ratio was clipped
    """

    accuracy: float | None
    format: float | None
    length: float | None
    dead_groups: float | None
    ratio_gap: float | None
    kl: float | None
    clipped: float | None


class Curves(TypedDict, total=False):
    """Logged steps by stage."""

    pretrain: list[LossPoint] | None
    sft: list[LossPoint] | None
    grpo: list[GrpoPoint] | None


class Answer(TypedDict):
    """What one checkpoint answered; `reasoning` stood between <think> and </think>."""

    reasoning: str | None
    content: str
    correct: bool


class Sample(TypedDict):
    """One prompt and the answer of every checkpoint asked."""

    prompt: str
    skill: str
    language: str
    expected: str
    answers: dict[str, Answer]


class Ancestry(TypedDict):
    """What a checkpoint was made of: its parent checkpoint (null for the first) and hashes."""

    parent: str | None
    corpus: str | None
    tokenizer: str | None
    template: str | None
    config: str | None
    weights: str | None


class _ReportRequired(TypedDict):
    athanor: str
    created: str
    minutes: Amount
    seconds: Amount
    seed: int
    plan: Plan
    machine: dict[str, Any]
    stages: list[Stage]
    ladder: dict[str, Rung]


class Report(_ReportRequired, total=False):
    """A whole run. `minutes` were asked for, `seconds` were used; `created` is an ISO time."""

    corpus: Corpus | None
    tokenizer: TokenizerFacts | None
    bits_per_byte: BitsPerByte | None
    curves: Curves | None
    samples: list[Sample] | None
    lineage: dict[str, Ancestry] | None


def ordered(checkpoints: Collection[str]) -> list[str]:
    """Names of checkpoints: those of RUNGS first and in that order, then any others as they come."""
    return [name for name in RUNGS if name in checkpoints] + [name for name in checkpoints if name not in RUNGS]


def rungs(report: Report) -> list[str]:
    """Names on the ladder, in order."""
    return ordered(report["ladder"])


def parent(report: Report, name: str) -> str | None:
    """The nearest ancestor of checkpoint `name` that is on the ladder, or None. The lineage decides where there is one."""
    lineage = report.get("lineage") or {}

    def above(child: str) -> str | None:
        return lineage[child]["parent"] if child in lineage else _PARENT.get(child)

    found = above(name)
    while found is not None and found not in report["ladder"]:
        found = above(found)
    return found


def validate(report: Mapping[str, Any]) -> None:
    """Check `report` against `Report`.

    Raises CheckpointError naming the path of the first field that is missing or wrong, such as `ladder.sft.accuracy.low`
    or `stages[2].seconds`.
    """
    _check(report, Report, "")
    if not report["ladder"]:
        raise _error("ladder", "is empty", "it must hold at least one checkpoint")
    if not report["stages"]:
        raise _error("stages", "is empty", "it must hold at least one stage")
    _check_lineage(report.get("lineage") or {})


def _error(path: str, finding: str, rule: str) -> CheckpointError:
    return CheckpointError(f"report.json: {path or 'the report'} {finding}; {rule}. Correct the field or make the report anew")


_SCALARS: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "a text"),
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
}


def _check(value: Any, hint: Any, path: str) -> None:
    origin = get_origin(hint)
    if hint is Any:
        return
    if origin in (Union, UnionType):
        if value is not None:
            (inner,) = (option for option in get_args(hint) if option is not NoneType)
            _check(value, inner, path)
    elif origin is Annotated:
        kind, (low, high) = get_args(hint)
        _check(value, kind, path)
        if not low <= value <= high:
            rule = f"{low:g} or more" if high == math.inf else f"in {low:g}..{high:g}"
            raise _error(path, f"is {value!r}", f"it must be {rule}")
    elif origin is list:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise _error(path, f"is {value!r:.80}", "it must be a list")
        for i, item in enumerate(value):
            _check(item, get_args(hint)[0], f"{path}[{i}]")
    elif origin is dict or is_typeddict(hint):
        if not isinstance(value, Mapping):
            raise _error(path, f"is {value!r:.80}", "it must be an object with named fields")
        _check_fields(value, hint, path)
    else:
        kinds, wanted = _SCALARS[hint]
        if not isinstance(value, kinds) or (isinstance(value, bool) and hint is not bool):
            raise _error(path, f"is {value!r:.80}", f"it must be {wanted}")
        if isinstance(value, float) and not math.isfinite(value):
            raise _error(path, f"is {value!r}", "it must be finite")


def _check_fields(value: Mapping[str, Any], hint: Any, path: str) -> None:
    prefix = f"{path}." if path else ""
    if get_origin(hint) is dict:
        for key, item in value.items():
            _check(item, get_args(hint)[1], f"{prefix}{key}")
        return
    for key, inner in get_type_hints(hint, include_extras=True).items():
        if key in value:
            _check(value[key], inner, f"{prefix}{key}")
        elif key in hint.__required_keys__:
            raise _error(f"{prefix}{key}", f"is missing{nearest(key, value)}", "the page cannot be made without it")
    if hint is Score and not value["low"] <= value["value"] <= value["high"]:
        raise _error(path, f"has low {value['low']}, value {value['value']}, high {value['high']}", "they must be in this order")


def _check_lineage(lineage: Mapping[str, Ancestry]) -> None:
    for name, ancestry in lineage.items():
        seen = [name]
        above = ancestry["parent"]
        while above is not None:
            if above not in lineage:
                raise _error(f"lineage.{seen[-1]}.parent", f"is {above!r}{nearest(above, lineage)}", "it must be in the lineage")
            if above in seen:
                raise _error(f"lineage.{name}.parent", f"leads back to {above!r}", "no checkpoint descends from itself")
            seen.append(above)
            above = lineage[above]["parent"]
