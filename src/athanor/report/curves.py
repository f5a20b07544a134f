"""Which logged series are shown, under what name, and what a reader should know of each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from athanor.report import plots, words
from athanor.report.data import Report
from athanor.report.plots import Look

_SALT = re.compile("[^A-Za-z0-9_]+")
_COUNTERS = {"step", "tokens", "seconds", "time", "epoch"}  # they only grow: nothing to see


@dataclass(frozen=True, slots=True)
class Series:
    """How one series is shown; `main` ones are drawn larger."""

    title: str
    note: str = ""
    look: Look = Look()
    main: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture with its caption; `key` is the field's name in the curves."""

    key: str
    title: str
    note: str
    svg: str
    main: bool


_LARGE: dict[str, Any] = {"width": 392, "height": 220}
_SHARE = Look(share=True)
_TRAINING = {
    "loss": Series("Training loss", "nats per token", main=True),
    "heldout_bits_per_byte": Series("Held-out text", "bits per byte; dashed: compressors on the same bytes", main=True),
    "grad_norm": Series("Gradient norm", "before clipping"),
    "lr": Series("Learning rate", look=Look(smooth=False)),
    "tokens_per_second": Series("Speed", "tokens trained per second"),
}
_SHOWN: dict[str, dict[str, Series]] = {
    "pretrain": _TRAINING,
    "sft": _TRAINING,
    "grpo": {
        "reward": Series("Reward", "mean over the answers of a step", main=True),
        "accuracy": Series("Accuracy", "of sampled answers, on training problems", _SHARE, main=True),
        "format": Series("Right format", "answers in the asked form", _SHARE),
        "length": Series("Length", "mean tokens of an answer"),
        "dead_groups": Series("Dead groups", "all answers earned the same reward, so there was no gradient"),
        "ratio_gap": Series("Ratio gap", "engine against trainer: difference of log-probabilities", Look(log=True)),
        "kl": Series("KL divergence", "from the reference model"),
        "clipped": Series("Clipped", "share of tokens whose ratio left the trust region", _SHARE),
        "loss": Series("Loss", "of the policy gradient; its sign and size say little"),
        **{key: _TRAINING[key] for key in ("grad_norm", "lr", "tokens_per_second")},
    },
}
STAGES = {"pretrain": "Pre-training", "sft": "Supervised tuning", "grpo": "Reinforcement learning (GRPO)"}


def points_of(curve: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the points that have a number under `key`."""
    found = [(p["step"], float(p[key])) for p in curve if isinstance(p.get(key), (int, float)) and not isinstance(p[key], bool)]
    return [step for step, _ in found], [value for _, value in found]


def panels(report: Report, stage: str) -> list[Panel]:
    """The pictures of one stage: the known series first, then every other number it logged; [] without a curve.

    A series of fewer than two points is left out: there is no line to draw (`short` names those).
    """
    curve = _curve(report, stage)
    lines = {key: found for key in _keys(curve, stage) if len((found := points_of(curve, key))[0]) >= 2}
    shown = {key: _SHOWN[stage].get(key, Series(words.label(key))) for key in lines}
    pair = sum(series.main for series in shown.values()) >= 2  # a single large picture would stand beside nothing
    made = []
    for key, (steps, values) in lines.items():
        series = shown[key]
        main = series.main and pair
        look = replace(series.look, share=series.look.share and max(values) <= 1, **(_LARGE if main else {}))
        salt = f"{stage}-{_SALT.sub('-', key)}"
        if key == "heldout_bits_per_byte":
            svg = plots.heldout(steps, values, _compressors(report) if stage == "pretrain" else {}, salt, look)
        else:
            svg = plots.curve(steps, values, salt, series.title, look)
        made.append(Panel(key, series.title, series.note, svg, main))
    return made


def _compressors(report: Report) -> dict[str, float]:
    bits = report.get("bits_per_byte")
    return {"gzip": bits["gzip"], "bz2": bits["bz2"], "xz": bits["xz"]} if bits else {}


def short(report: Report, stage: str) -> list[str]:
    """Names of the series of `stage` that have a single point, too few for a picture, each with its value."""
    curve = _curve(report, stage)
    found = {key: points_of(curve, key)[1] for key in _keys(curve, stage)}
    return [f"{words.label(key)} {words.number(values[0])}" for key, values in found.items() if len(values) == 1]


def _curve(report: Report, stage: str) -> Sequence[Mapping[str, Any]]:
    curves: Mapping[str, Any] = report.get("curves") or {}
    return curves.get(stage) or []


def _keys(curve: Sequence[Mapping[str, Any]], stage: str) -> list[str]:
    present = dict.fromkeys(key for point in curve for key in point if key not in _COUNTERS)
    known = [key for key in _SHOWN[stage] if key in present]
    return known + [key for key in present if key not in known and points_of(curve, key)[1]]
