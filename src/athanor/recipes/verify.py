"""Prove on a model that the laws of the house hold: what is trained, served, evaluated and exported is the same.

    athanor verify runs/first
    athanor verify runs/first/int8 --json
    athanor verify runs/first --parallel

Everything is computed in float32 on small probes, so a model of a few million parameters takes seconds, and half a minute where
several processes are started for law L5. Training happens on copies; the folder is only read. Exit status 1 when a law does not
hold.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from athanor.align.rollouts import roll_out, to_batch
from athanor.compress import formats
from athanor.core.errors import VerificationError
from athanor.data.pack import join, pack
from athanor.evals import laws
from athanor.lm import LM, load
from athanor.models.base import CausalLM
from athanor.tokenizer.bpe import Tokenizer
from athanor.tokenizer.chat import Rendered
from athanor.train import laws as training
from athanor.types import Completion, Finding, Rollout, SamplingParams

POSITIONAL = ("path",)
LONGEST = 512  # tokens of a probe: longer ones show nothing more, and take memory
LEARNT = (("L3", "accumulated and whole"), ("L4", "resumed"), ("L5", "several processes and one"))
ROLLOUT = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=24)


@dataclass(frozen=True)
class Config:
    path: Path
    """A checkpoint folder, or a run folder (its last checkpoint)."""
    checkpoint: str | None = None
    """Which checkpoint of a run folder: base, sft, rl, int8, int4 ...; by default the run's own choice."""
    json: bool = False
    """Print the findings as JSON instead of a table."""
    parallel: bool = False
    """Start two processes too, and hold what they learn to what one learns (L5)."""


def main(config: Config) -> None:
    lm = load(config.path, config.checkpoint)
    findings = verify(lm, config.parallel)
    failed = [f for f in findings if not f.passed]
    if config.json:
        print(json.dumps({"model": lm.name, "passed": not failed, "findings": [_plain(f) for f in findings]}, indent=1))
    else:
        _show(lm.name, findings)
    if failed:
        broken = "; ".join(f"{f.law}, {f.compared}: {f.value:.3g}, and at most {f.tolerance:g} is allowed" for f in failed)
        raise VerificationError(
            f"{lm.path} breaks {len(failed)} of {len(findings)} checks ({broken}): do not trust what it says when trained, served"
            " or exported; copy it again or reinstall athanor, and report it if that does not help"
        )


def verify(lm: LM, parallel: bool = False) -> list[Finding]:
    """All findings on `lm`, in the order of the laws; on L5 only where it is asked for."""
    quantised = bool(formats.describe(lm.model))
    model = lm.model if next(lm.model.parameters()).dtype == torch.float32 else copy.deepcopy(lm.model).float()
    tokenizer = lm.tokenizer if lm.has_tokenizer else None
    probes = laws.sequences(tokenizer, min(lm.config.max_positions, LONGEST), lm.config.vocab_size)
    exact, ids = LM(model, tokenizer), laws.readable(model, max((s.ids for s in probes), key=len))
    if isinstance(tokenizer, Tokenizer):
        findings = laws.one_renderer(tokenizer)
    else:
        findings = [Finding("L1", "our ids and those of the saved template", skipped="the tokenizer is not ours")]
    if isinstance(model, CausalLM):
        findings += _of_decoder(exact, model, probes, quantised, parallel)
    else:
        reason = f"the model is of the kind {model.kind!r}"
        findings += [Finding("L2", "cached and uncached", skipped=reason)]
        findings += [laws.hidden_packed_is_separate(model, [laws.readable(model, s.ids) for s in probes])]
        findings += [Finding(law, what, skipped=reason) for law, what in (*LEARNT[1:], ("L6", "rollout and trainer"))]
    with tempfile.TemporaryDirectory() as folder:
        saved = lm.save(Path(folder, "saved"))
        ours, again = laws.outputs(lm.model), laws.outputs(load(saved).model)
        findings.append(laws.same_logits("saved and loaded again", ours, again, ids, exactly=True))
        findings.append(laws.same_in_transformers(model, saved, quantised, ids))
    return findings


def _of_decoder(lm: LM, model: CausalLM, probes: Sequence[Rendered], quantised: bool, parallel: bool) -> list[Finding]:
    """What is asked of a model that can be trained and answers."""
    batches = [pack([s], f"probe {i}") for i, s in enumerate(probes)]
    if lm.has_tokenizer:
        findings = laws.one_model(model, lm.tokenizer)
    else:
        findings = [Finding("L2", "cached and uncached", skipped="the model has no tokenizer")]
    findings.append(laws.packed_is_separate(model, join(batches)))
    with tempfile.TemporaryDirectory() as folder:
        if quantised:
            reason = "the model is quantised: it answers and is not trained"
            findings += [Finding(law, what, skipped=reason) for law, what in LEARNT]
        else:
            findings.append(training.accumulated_is_whole(model, batches))
            findings.append(training.resumed_is_uninterrupted(model, batches, Path(folder, "state")))
            if parallel:
                findings += training.parallel_is_single(model, join(batches), Path(folder, "parallel"))
            else:
                findings.append(Finding(*LEARNT[2], skipped="it starts processes: ask with --parallel"))
    if not lm.has_tokenizer:
        return [*findings, Finding("L6", "rollout and trainer", skipped="the model has no tokenizer")]
    prompts = [s.ids[: lm.config.max_positions // 2] for s in probes[:3]]
    groups = roll_out(lm.engine(), prompts, 4, ROLLOUT, _alternating)
    rollouts, _ = to_batch(groups, ROLLOUT.temperature, "std", "rollouts")
    return [*findings, laws.rollout_is_trainer(model, rollouts)]


def _alternating(_: int, completion: Completion) -> Rollout:
    """A reward with which no group is dead."""
    return Rollout(completion, float(completion.request_id.endswith(("0", "2"))), {})


def _plain(finding: Finding) -> dict[str, Any]:
    finite = finding.value is None or abs(finding.value) < float("inf")
    return asdict(finding) | {"passed": finding.passed, "value": finding.value if finite else str(finding.value)}


def _show(name: str, findings: Sequence[Finding]) -> None:
    table = Table("law", "compared", "distance", "allowed", "", title=f"The laws of the house on {name}")
    for f in findings:
        verdict = Text("skipped", "yellow") if f.skipped else Text("holds", "green") if f.passed else Text("BROKEN", "bold red")
        value = "" if f.value is None else f"{f.value:.2g}"
        table.add_row(f.law, f"{f.compared}: {f.skipped}" if f.skipped else f.compared, value, f"{f.tolerance:g}", verdict)
    Console().print(table)
