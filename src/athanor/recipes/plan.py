"""Print the plan of a life of some minutes on this machine, without starting it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from athanor.core import io
from athanor.core.device import default_device, tune_allocator
from athanor.train import plan as planning


@dataclass(frozen=True)
class Config:
    minutes: float = 10.0
    """Length of the life."""
    json: bool = False
    """Print JSON for programs."""
    out: Path | None = None
    """File to write the plan to; `athanor run --plan FILE` then follows it to the letter."""


def main(config: Config) -> int:
    tune_allocator()
    plan = planning.make(config.minutes, default_device())
    if config.out:
        io.write_json(config.out, asdict(plan))
    if config.json:
        print(json.dumps(asdict(plan), indent=1))
        return 0
    show(plan)
    return 0


def show(plan: planning.Plan) -> None:
    """The plan as a table."""
    console = Console(highlight=False)
    tokens = plan.tokens()
    console.print(
        f"A life of {plan.minutes:g} minutes: {plan.parameters:,} parameters ({plan.shape['n_layers']} layers,"
        f" {plan.shape['d_model']} wide, vocabulary {plan.vocab_size:,}), trained at about {plan.tokens_per_second:,.0f} tokens/s"
        f" in {plan.precision} on {plan.threads} threads ({plan.flops / 1e9:,.0f} GFLOP/s measured)."
    )
    table = Table("stage", "steps", "tokens", "seconds", box=None, header_style="bold")
    for name, seconds in plan.seconds.items():
        steps = getattr(plan, f"{name}_steps", None)
        table.add_row(name, f"{steps:,}" if steps else "", f"{tokens[name]:,}" if name in tokens else "", f"{seconds:.0f}")
    table.add_row("in all", "", "", f"{sum(plan.seconds.values()):.0f}", style="bold")
    console.print(table)
