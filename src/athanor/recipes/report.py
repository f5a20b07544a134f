"""Write report.json and report.html of a run: what each stage changed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import athanor
from athanor.core import io
from athanor.core.device import machine, peak_memory
from athanor.core.errors import CheckpointError
from athanor.report import page
from athanor.report.data import RUNGS

POSITIONAL = ("run",)


@dataclass(frozen=True)
class Config:
    run: Path
    """Run folder of a life with at least one evaluated checkpoint."""


def main(config: Config) -> int:
    report = gather(config.run)
    io.write_json(config.run / "report.json", report)
    print(f"report: {page.write(config.run)}")
    return 0


def gather(run: Path) -> dict[str, Any]:
    """Everything that the run folder knows, in the schema of `report.data`."""
    life = io.read_json(run / "life.json")
    evaluated = {name: io.read_json(path) for name in RUNGS if (path := run / "eval" / f"{name}.json").exists()}
    if not evaluated:
        raise CheckpointError(f"{run} has no evaluated checkpoint yet: run `athanor eval {run}` or let `athanor run` finish")
    stages = {path.stem: io.read_json(path) for path in sorted((run / "stages").glob("*.json"))}
    lineage = {name: _lineage(e["lineage"]) for name, e in evaluated.items()}
    corpus = stages.get("corpus")
    report: dict[str, Any] = {
        "athanor": athanor.__version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "minutes": life["asked"]["minutes"],
        "seconds": sum(s["seconds"] for s in life["stages"]),
        "seed": life["asked"]["seed"],
        "plan": life["plan"],
        "machine": machine() | {"peak_memory": peak_memory()},
        "stages": [s | _figures(stages.get(s["name"], {})) for s in life["stages"]],
        "ladder": {name: {k: v for k, v in e.items() if k not in ("samples", "lineage")} for name, e in evaluated.items()},
        "curves": {name: stages[name]["curve"] for name in ("pretrain", "sft", "grpo") if name in stages},
        "samples": _samples(evaluated),
        "lineage": lineage,
    }
    if corpus:
        report["corpus"] = {k: corpus[k] for k in ("documents", "bytes", "train_bytes", "heldout_bytes", "dropped")}
        if "base" in evaluated:
            report["bits_per_byte"] = {"model": evaluated["base"]["bits_per_byte"], **corpus["compressed"]}
    if "tokenizer" in stages:
        report["tokenizer"] = {k: stages["tokenizer"][k] for k in ("vocab_size", "bytes_per_token")}
    return report


def _figures(record: dict[str, Any]) -> dict[str, Any]:
    """The plain numbers of a stage's record."""
    return {k: v for k, v in record.items() if isinstance(v, (int, float)) and k not in ("name", "seconds")}


def _lineage(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found.get(key) for key in ("parent", "corpus", "tokenizer", "template", "config", "weights")} | found


def _samples(evaluated: dict[str, Any]) -> list[dict[str, Any]]:
    """The same prompts answered by every checkpoint."""
    first = next(iter(evaluated.values()))["samples"]
    return [
        {k: sample[k] for k in ("prompt", "skill", "language", "expected")}
        | {"answers": {name: e["samples"][i]["answer"] for name, e in evaluated.items()}}
        for i, sample in enumerate(first)
    ]
