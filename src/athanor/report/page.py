"""One self-contained HTML page of a run: `report.json` in, `report.html` out."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from athanor.core.io import atomic_write, read_json
from athanor.report import curves, plots, svg, words
from athanor.report.data import COMPRESSED, Report, Rung, Score, ordered, parent, rungs, validate
from athanor.report.words import Change

_HERE = Path(__file__).parent
STEP_NAMES = {
    "base": "Pre-training",
    "sft": "Supervised tuning",
    "rl": "Reinforcement learning",
    "int8": "Compression to 8 bits",
    "int4": "Compression to 4 bits",
}
_LONG, _LINES = 400, 8  # characters and lines of a text that are shown before the rest is folded
_SHOWN_SAMPLES = 8


def write(run_dir: str | Path) -> Path:
    """Read `report.json` of the run folder, write `report.html` beside it, return its path.

    Raises CheckpointError when report.json is missing, malformed or lacks a field.
    """
    run_dir = Path(run_dir)
    report = read_json(run_dir / "report.json")
    target = run_dir / "report.html"
    atomic_write(target, render(report, run=_shown_path(run_dir)))
    return target


def render(report: Mapping[str, Any], run: str = "RUN") -> str:
    """The page of a report; `run` is the run folder as the commands at its end name it.

    Raises CheckpointError naming the field when the report does not fit the schema.
    """
    validate(report)
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    for name in ("share", "points", "signed", "size", "duration", "number", "parameters", "visible", "field", "label"):
        environment.filters[name] = getattr(words, name)
    environment.filters |= {"split_long": split_long, "breakable": breakable, "ordered": ordered}
    return environment.get_template("page.html.j2").render(_context(cast(Report, report), run)) + "\n"


def breakable(name: str) -> Markup:
    """A name that may be broken after its underscores where a column is narrow."""
    return Markup("_<wbr>").join(words.visible(name).split("_"))


def split_long(text: str) -> tuple[str, str]:
    """(head, rest) of a text: the rest is folded on the page; it is empty unless the text is long."""
    text = words.visible(text).strip("\n")
    lines = text.split("\n")
    cut = min(_LONG, len("\n".join(lines[:_LINES])))
    return (text[:cut], text[cut:]) if len(text) > _LONG * 4 // 3 or len(lines) > _LINES * 4 // 3 else (text, "")


def _shown_path(run_dir: Path) -> str:
    """The folder as one would type it: relative when it lies below the working folder."""
    absolute, here = run_dir.resolve(), Path.cwd().resolve()
    shown = absolute.relative_to(here) if absolute.is_relative_to(here) else absolute
    return shlex.quote(os.fspath(shown))


def _context(report: Report, run: str) -> dict[str, Any]:
    return {
        "report": dict.fromkeys(Report.__optional_keys__) | dict(report),
        "run": run,
        "css": Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        "themes": {"light": svg.LIGHT, "dark": svg.DARK},
        "rungs": rungs(report),
        "rung_words": plots.RUNG_WORDS,
        "parents": {name: parent(report, name) for name in rungs(report)},
        "lede": _lede(report),
        "summary": " ".join(_summary(report)),
        "created": report["created"][:16].replace("T", " "),
        "trials": plots.ladder_trials(report),
        "ladder": Markup(plots.ladder_inline(report)),
        "ladder_narrow": Markup(plots.ladder_inline(report, narrow=True)),
        "steps": _steps(report),
        "metrics": _metrics(report),
        "groups": _groups(report),
        "shown_samples": _SHOWN_SAMPLES,
        "stages": _stages(report),
        "training": [
            {"name": title, "panels": curves.panels(report, stage), "short": curves.short(report, stage)}
            for stage, title in curves.STAGES.items()
        ],
        "compression": _compression(report),
        "lineage": _lineage(report),
        "lineage_finding": _lineage_finding(report),
    }


def _machine(machine: Mapping[str, Any]) -> str:
    """The machine in a few words: GPU or CPU, and the threads it ran."""
    name = str(machine.get("gpu") or machine.get("cpu") or "a machine without a name")
    threads = machine.get("threads")
    return f"{name} ({threads} thread{'s' if threads != 1 else ''})" if threads and not machine.get("gpu") else name


def _lede(report: Report) -> str:
    """What was made from what, in how long, on which machine."""
    corpus = report.get("corpus")
    source = f"{words.size(corpus['bytes'])} of text" if corpus else "raw text"
    model = f"an assistant of {words.parameters(report['plan']['parameters'])} parameters"
    return f"From {source} to {model} in {words.duration(report['seconds'])}, on {_machine(report['machine'])}."


def _summary(report: Report) -> list[str]:
    """How far it got: accuracy of the last checkpoint that was trained, bits per byte beside those of the best compressor."""
    ladder, sentences = report["ladder"], []
    trained = [name for name in rungs(report) if name not in COMPRESSED]
    if trained:
        first, last = trained[0], trained[-1]
        score = ladder[last]["accuracy"]
        text = f"It answers {words.share(score['value'])} of {words.number(score['n'])} test problems correctly"
        before = f"; after {_step_name(first).lower()} alone it was {words.share(ladder[first]['accuracy']['value'])}"
        sentences.append(text + (before if first != last else "") + ".")
    bits = report.get("bits_per_byte")
    if bits:
        best, least = min(((name, bits[name]) for name in ("gzip", "bz2", "xz")), key=lambda item: item[1])
        sentences.append(
            f"After pre-training, one byte of text it never saw cost it {bits['model']:.2f} bits;"
            f" {best}, the best of three compressors, needs {least:.2f}."
        )
    return sentences


def _step_name(rung: str) -> str:
    return STEP_NAMES.get(rung, rung)


def _steps(report: Report) -> list[dict[str, Any]]:
    """Each checkpoint against its parent: accuracy in a sentence, how many skills under which verdict."""
    steps = []
    for name in rungs(report):
        above = parent(report, name)
        if above is None:
            continue
        before, after = report["ladder"][above], report["ladder"][name]
        skills: dict[str, list[str]] = {"better": [], "worse": [], "undecided": [], "asked of only one of the two": []}
        for skill in dict.fromkeys([*before["skills"], *after["skills"]]):
            if skill in before["skills"] and skill in after["skills"]:
                skills[Change(before["skills"][skill], after["skills"][skill]).verdict].append(skill)
            else:
                skills["asked of only one of the two"].append(skill)
        change = Change(before["accuracy"], after["accuracy"])
        total = sum(map(len, skills.values()))
        found = []
        for verdict, members in skills.items():
            named = members if verdict != "undecided" and len(members) < total else []  # the heat map has them all
            if members:
                found.append({"verdict": verdict, "count": len(members), "named": named})
        step = {"name": _step_name(name), "before": above, "after": name, "sentence": change.sentence}
        steps.append(step | {"skills": found, "total": total})
    return steps


def _metrics(report: Report) -> list[dict[str, Any]]:
    """Rows of the table of differences; in each cell a value, the difference from the parent, and whether intervals are apart."""
    measures: list[tuple[str, Callable[[Rung], float | None]]] = [
        ("accuracy", lambda rung: rung["accuracy"]["value"]),
        ("right format", lambda rung: rung["format_rate"]),
        ("stops by itself", lambda rung: rung["stop_rate"]),
        ("bits per byte, held-out text", lambda rung: rung["bits_per_byte"]),
    ]
    ladder, rows = report["ladder"], []
    for title, value_of in measures:
        as_share = not title.startswith("bits")
        cells: list[dict[str, Any]] = []
        for name in rungs(report):
            above, value = parent(report, name), value_of(ladder[name])
            if value is None:
                cells.append({"value": "\u2013", "difference": "", "apart": False})
                continue
            earlier = value_of(ladder[above]) if above else None
            difference = ""
            if earlier is not None:
                difference = words.points(value - earlier) if as_share else words.signed(value - earlier, 3)
            apart = (
                above is not None and title == "accuracy" and Change(ladder[above]["accuracy"], ladder[name]["accuracy"]).apart
            )
            cells.append({"value": words.share(value) if as_share else f"{value:.3f}", "difference": difference, "apart": apart})
        rows.append({"title": title, "cells": cells})
    return rows


def _groups(report: Report) -> list[dict[str, Any]]:
    """The heat map: groups (skills, languages) of rows, a Score or None for each rung."""
    ladder = report["ladder"]
    groups = []
    for title, field in (("skill", "skills"), ("language", "languages")):
        scores: list[Mapping[str, Score]] = [cast(Mapping[str, Any], ladder[name])[field] for name in rungs(report)]
        keys = dict.fromkeys(key for of_rung in scores for key in of_rung)
        rows = [{"name": key, "scores": [of_rung.get(key) for of_rung in scores]} for key in keys]
        if rows:
            groups.append({"title": title, "rows": rows})
    return groups


def _stages(report: Report) -> list[dict[str, Any]]:
    """Stages in order with their begin and share of the whole; time that is in no stage comes last, without a begin."""
    inside = sum(stage["seconds"] for stage in report["stages"])
    total = max(report["seconds"], inside) or 1.0
    rows: list[dict[str, Any]] = []
    begin = 0.0
    for stage in report["stages"]:
        figures = {key: value for key, value in stage.items() if key not in ("name", "seconds")}
        rows.append({"name": stage["name"], "seconds": stage["seconds"], "begin": begin / total, "figures": figures})
        begin += stage["seconds"]
    if total - inside >= 0.05:
        rows.append({"name": "between the stages", "seconds": total - inside, "begin": None, "figures": {}})
    return [row | {"share": row["seconds"] / total} for row in rows]


def _compression(report: Report) -> list[dict[str, Any]]:
    """The compressed checkpoints, each after the one it was made from."""
    ladder = report["ladder"]
    rows: list[dict[str, Any]] = []
    shown: list[str] = []
    for name in rungs(report):
        above = parent(report, name)
        if name not in COMPRESSED or above is None:
            continue
        if above not in shown:
            rows.append({"name": above, "rung": ladder[above], "of": None})
            shown.append(above)
        small, large = ladder[name], ladder[above]
        score, band = small["accuracy"], large["accuracy"]
        bits, bits_before = small["bits_per_byte"], large["bits_per_byte"]
        speed, speed_before = small["tokens_per_second"], large["tokens_per_second"]
        row = {
            "name": name,
            "rung": small,
            "of": above,
            "smaller": large["bytes"] / small["bytes"] if small["bytes"] else None,
            "faster": speed / speed_before if speed is not None and speed_before else None,
            "bits": bits - bits_before if bits is not None and bits_before is not None else None,
            "accuracy": score["value"] - band["value"],
            "side": "below" if score["value"] < band["low"] else "above" if score["value"] > band["high"] else "",
        }
        rows.append(row)
    return rows


_HASHES = ("corpus", "tokenizer", "template", "config", "weights")


def _lineage(report: Report) -> list[dict[str, Any]]:
    """Checkpoints as a tree in reading order, with their depth."""
    lineage = report.get("lineage") or {}
    rows: list[dict[str, Any]] = []

    def descend(above: str | None, depth: int) -> None:
        for name in ordered(lineage):
            if lineage[name]["parent"] == above:
                hashes = {field: cast(Mapping[str, Any], lineage[name])[field] for field in _HASHES}
                rows.append({"name": name, "depth": depth, "parent": above, "hashes": hashes})
                descend(name, depth + 1)

    descend(None, 0)
    return rows


def _lineage_finding(report: Report) -> str:
    """Whether all checkpoints carry one tokenizer and one chat template; nothing where a hash is not known."""
    ancestries = list((report.get("lineage") or {}).values())
    hashes = {"tokenizer": {a["tokenizer"] for a in ancestries}, "chat template": {a["template"] for a in ancestries}}
    different = [f"their {name}" for name, found in hashes.items() if len(found - {None}) > 1]
    if different:
        return f"Checkpoints differ in {' and '.join(different)}."
    if any(None in found for found in hashes.values()):
        return ""
    return "Every checkpoint carries the same tokenizer and the same chat template."
