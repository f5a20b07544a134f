"""What goes with what: objectives, architectures, layouts of processes, precisions, optimisers and the rest, in pairs.

A pair is *tested* when a case of `TESTED` or `alone` has both; the suite runs exactly these cases. It is *refused* when training
says no to every setup that has both, with the reason that it gives. Else it is *untested*: nothing says no, and nobody looked.
Reasons come from the functions that refuse when training starts, so that the table cannot say anything else than they do.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import combinations, product
from typing import Any, Literal, get_args

import torch

from athanor.core import plugins
from athanor.core.errors import ConfigError
from athanor.models import io as models
from athanor.models.base import LanguageModel
from athanor.objectives._pretraining import fits
from athanor.optim.build import Name, OptimConfig
from athanor.optim.scale import PRECISIONS, check_precision
from athanor.train.checkpointing import checkpoint
from athanor.train.compiled import compile_blocks
from athanor.train.parallel.layout import Layout, parse
from athanor.train.parallel.support import reason
from athanor.train.regularise import dropout
from athanor.train.setup import TrainConfig, layout_of

# One of each kind; sizes above 2 are of the same kind.
LAYOUTS = (
    "", "ddp=2", "fsdp=2", "fsdp=2,zero=2", "hsdp=2x2", "tp=2", "pp=2", "pp=2,schedule=gpipe", "pp=2,schedule=interleaved",
    "pp=2,schedule=zero_bubble", "ddp=2,ep=2", "ddp=2,tp=2", "fsdp=2,tp=2", "ddp=2,pp=2", "fsdp=2,pp=2", "tp=2,pp=2",
)  # fmt: skip
_SHARE = 0.1  # of dropout
_WHAT = ("objective", "architecture")


@dataclass(frozen=True)
class Case:
    """A setup of training; the fields are the axes of the table."""

    objective: str = "next_token"
    architecture: str = "llama"
    parallel: str = ""
    precision: str = "fp32"
    optimizer: str = "adamw"
    checkpointing: str = "none"
    compile: str = "no"
    dropout: str = "no"

    def __str__(self) -> str:
        """What it has that is not plain."""
        plain = Case()
        parts = [f"{a}={getattr(self, a)}" for a in AXES if getattr(self, a) != getattr(plain, a)]
        return " ".join(p.removeprefix("parallel=") for p in parts) or "plain"


AXES = tuple(f.name for f in fields(Case))
Verdict = Literal["tested", "refused", "untested"]
Pair = tuple[tuple[str, str], tuple[str, str]]  # (axis, value) twice, in the order of AXES


@dataclass(frozen=True)
class Cell:
    """What is known of a pair: two axes with their values, and why it is refused where it is."""

    axes: tuple[str, str]
    values: tuple[str, str]
    verdict: Verdict
    reason: str = ""


# Cases of several processes, and of compiling, by the tests that run them (tests/train/test_parallel*.py).
LAYOUT_CASES = tuple(
    Case(parallel=text)
    for text in (*(t for t in LAYOUTS if t and "ep" not in t), "fsdp=4", "pp=4")
)  # fmt: skip
FAMILY_CASES = (
    Case(architecture="gpt2", parallel="tp=2"),
    Case(architecture="gpt2", parallel="fsdp=2"),
    Case(architecture="qwen3", parallel="fsdp=2,tp=2"),
    Case(architecture="gemma", parallel="tp=2,pp=2"),
    Case(architecture="phi3", parallel="pp=2"),
    Case(architecture="deepseek_v3", parallel="fsdp=2"),
)
EXPERT_CASES = tuple(Case(architecture="mixtral", parallel=text) for text in ("ddp=2", "ddp=2,ep=2", "ddp=4,ep=4", "fsdp=2"))
OPTIMIZER_CASES = (
    *(Case(optimizer="muon", parallel=text) for text in ("fsdp=2", "tp=2", "ddp=2")),
    Case(optimizer="sgd", parallel="fsdp=2"),
    *(Case(optimizer="adafactor", parallel=text) for text in ("ddp=2", "fsdp=2", "pp=2")),
)
PRECISION_CASES = tuple(Case(precision="bf16", parallel=text) for text in ("ddp=2", "fsdp=2", "tp=2", "pp=2"))
COMPILE_CASES = (Case(compile="yes"),)
_PRETRAINED = (
    ("next_token", "qwen2"), ("masked_lm", "bert"), ("span_corruption", "t5"), ("denoise", "bart"), ("prefix_lm", "llama"),
    ("prefix_lm", "t5"), ("fill_in_middle", "llama"), ("multi_token", "deepseek_v3"), ("seq2seq", "transformer"),
)  # fmt: skip
OBJECTIVE_CASES = (
    *(Case(o, a, parallel=text) for o, a in _PRETRAINED for text in ("ddp=2", "fsdp=2")),
    *(Case(o, "llama", parallel=text) for o in ("prefix_lm", "fill_in_middle") for text in ("tp=2", "pp=2")),
    Case("masked_lm", "bert", parallel="tp=2"),
)
TESTED = (
    *LAYOUT_CASES, *FAMILY_CASES, *EXPERT_CASES, *OPTIMIZER_CASES, *PRECISION_CASES, *COMPILE_CASES, *OBJECTIVE_CASES,
)  # fmt: skip


@cache
def alone() -> tuple[Case, ...]:
    """Cases of one process in which every architecture meets every objective that fits, every optimiser, precision, checkpointing
    and dropout, and these each other: several in one case, always that which adds the most pairs, until none is new."""
    found: list[Case] = []
    met: set[Pair] = set()
    for architecture in values("architecture"):
        axes = (objectives_of(architecture), *map(values, ("precision", "optimizer", "checkpointing", "dropout")))
        choices = {
            case: set(_pairs(case))
            for o, p, opt, c, d in product(*axes)
            if not refusal(case := Case(o, architecture, precision=p, optimizer=opt, checkpointing=c, dropout=d))
        }
        while choices:
            best = max(choices, key=lambda case: len(choices[case] - met))
            if choices[best] <= met:
                break
            found.append(best)
            met |= choices[best]
    return tuple(found)


@cache
def objectives_of(architecture: str) -> tuple[str, ...]:
    """Objectives that an architecture can be pre-trained by."""
    return tuple(o for o in values("objective") if not _unfit(o, architecture))


@cache
def values(axis: str) -> tuple[str, ...]:
    """The values of an axis, the plain one of `Case` first."""
    named: dict[str, Any] = {
        "objective": plugins.names("objectives"),
        "architecture": plugins.names("models"),
        "parallel": LAYOUTS,
        "precision": PRECISIONS,
        "optimizer": get_args(Name),
        "checkpointing": ("none", "full", "selective"),
        "compile": ("no", "yes"),
        "dropout": ("no", "yes"),
    }
    plain = getattr(Case(), axis)
    return tuple(sorted(named[axis], key=lambda v: v != plain)) if plain in named[axis] else tuple(named[axis])


def small(architecture: str, objective: str = "next_token") -> Any:
    """The config of an architecture's first tiny preset with twice its layers, so that a pipeline of four stages fits."""
    presets = plugins.require("models", architecture, "PRESETS").PRESETS
    config = next(preset for name, preset in presets.items() if name.startswith("tiny"))
    n = config.n_layers
    held = {f.name: getattr(config, f.name) for f in fields(config)}
    changes: dict[str, Any] = {name: v * 2 for name, v in held.items() if isinstance(v, tuple) and len(v) == n}
    if objective == "multi_token" and hasattr(config, "n_ahead"):
        changes["n_ahead"] = 1
    return replace(config, n_layers=2 * n, **changes)


def config_of(case: Case) -> TrainConfig:
    """The case as recipes have it."""
    # Values are those of the fields, which are Literals.
    return TrainConfig(
        precision=case.precision, parallel=case.parallel, checkpointing=case.checkpointing,  # type: ignore[arg-type]  # any text: it is asked whether it is refused
        compile=case.compile == "yes", dropout=_SHARE if case.dropout == "yes" else 0.0,
        optim=OptimConfig(name=case.optimizer),  # type: ignore[arg-type]  # any text: it is asked whether it is refused
    )  # fmt: skip


def refusal(case: Case) -> str:
    """Why training says no to a case on CPUs, or ""."""
    return (
        _unfit(case.objective, case.architecture)
        or _layout(case.architecture, case.objective == "multi_token", case.parallel)
        or _setup(replace(case, objective="next_token", architecture="llama"))
        or _blocks(case.architecture, case.checkpointing, case.compile, case.dropout)
    )


_unfit = cache(fits)


@cache
def _model(architecture: str, ahead: bool = False) -> LanguageModel:
    """Without weights; not to be changed."""
    model: LanguageModel = models.build(architecture, small(architecture, "multi_token" if ahead else "next_token"))
    return model


@cache
def _layout(architecture: str, ahead: bool, parallel: str) -> str:
    return reason(_model(architecture, ahead), parse(parallel))


@cache
def _setup(case: Case) -> str:
    try:
        layout_of(config_of(case))
        check_precision(case.precision, torch.device("cpu"))
    except ConfigError as error:
        return str(error)
    return ""


@cache
def _blocks(architecture: str, checkpointing: Any, compiled: str, dropped: str) -> str:
    model = copy.deepcopy(_model(architecture))
    try:
        if dropped == "yes":
            dropout(model, _SHARE)
        if checkpointing != "none":
            checkpoint(model, checkpointing)
        if compiled == "yes":
            compile_blocks(model, lambda: None, backend="eager")
    except ConfigError as error:
        return str(error)
    return ""


@cache
def kind(parallel: str) -> str:
    """The entry of LAYOUTS that a layout is of the kind of."""
    layout = parse(parallel)
    two = {name: min(getattr(layout, name), 2) for name in ("ddp", "fsdp", "tp", "pp", "ep")}
    alike: Layout = replace(layout, micro=0, **two)
    return next(text for text in LAYOUTS if parse(text) == alike)


def _pairs(case: Case) -> Iterator[Pair]:
    plain = replace(case, parallel=kind(case.parallel))
    return combinations([(a, getattr(plain, a)) for a in AXES], 2)


@cache
def _tested() -> frozenset[Pair]:
    return frozenset(pair for case in (*TESTED, *alone()) for pair in _pairs(case))


def _completions(given: Mapping[str, str]) -> list[Case]:
    """Cases that have the given values and are plain else, of all objectives and architectures that fit each other.

    Only those where either value alone is not refused, or one of them, as far as there are any: so that the reason is the pair's.
    Where the pair names neither objective nor architecture, the first of them speaks for all: the plain one if it can.
    """
    free = [(given[axis],) if axis in given else values(axis) for axis in _WHAT]
    cases = [Case(**{**given, "objective": o, "architecture": a}) for o, a in product(*free)]
    without = [axis for axis in given if axis not in _WHAT]
    good = {c: [not refusal(replace(c, **{axis: getattr(Case(), axis)})) for axis in without] for c in cases}
    fitting = [c for c in cases if not _unfit(c.objective, c.architecture)]
    for few in ([c for c in fitting if all(good[c])], [c for c in fitting if any(good[c])], fitting):
        if few:
            return few if len(without) < len(given) else few[:1]
    return cases


def cell(axes: tuple[str, str], pair: tuple[str, str]) -> Cell:
    """What is known of a pair of values."""
    (a, b), (x, y) = axes, pair
    if ((a, x), (b, y)) in _tested():
        return Cell(axes, pair, "tested")
    first = ""
    for case in _completions({a: x, b: y}):
        why = refusal(case)
        if not why:
            return Cell(axes, pair, "untested")
        first = first or why
    return Cell(axes, pair, "refused", first)


@cache
def table() -> tuple[Cell, ...]:
    """What is known of every pair of values of different axes."""
    return tuple(cell((a, b), (x, y)) for a, b in combinations(AXES, 2) for x, y in product(values(a), values(b)))
