"""A plan of training, printed and drawn."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from athanor.report import memory as picture
from athanor.report import words
from athanor.train.budget import Found, total
from athanor.train.budget_compute import Cost
from athanor.train.plan import Plan

MEANING = {
    "weights": "as they are stored",
    "gradients": "alive at the peak",
    "optimizer": "moments, masters",
    "casts": "of weights, in the dtype of the products",
    "activations": "kept for the backward pass",
    "loss": "logits in chunks, and gradients formed beside the loss",
    "working": "held for a moment",
}


def show(found: Found) -> None:
    """The plan as tables."""
    console = Console(highlight=False)
    f, s, need = found, found.setup, found.need
    layers = f.shape.get("n_layers", 0)
    shape = f"{layers} layer{'s' * (layers != 1)}, {f.shape.get('d_model')} wide, vocabulary {f.shape.get('vocab_size', 0):,}"
    console.print(f"{f.name}: {words.parameters(f.parameters)} parameters ({f.family}, {shape}).", soft_wrap=True)
    trained = "" if s.tune == "full" else f", {need.trainable:,} parameters trained ({s.tune}, rank {s.rank})"
    console.print(
        f"An update is {s.batch_tokens:,} tokens in rows of {s.context}, {s.rows} in each of {s.micro} micro-batches;"
        f" {s.precision}, {s.optimizer}, checkpointing {s.checkpointing}, {s.layout}{trained}.",
        soft_wrap=True,
    )
    table = Table("memory of a process", "bytes", "share", "", box=None, header_style="bold")
    for part, size in need.parts.items():
        if size:
            table.add_row(part, words.size(size), words.share(size / need.peak), MEANING[part])
    table.add_row("tensors at the peak", words.size(need.peak), "", "", style="bold")
    if f.device.kind == "cpu":
        table.add_row("heap", words.size(need.resident - need.peak), "", "holes between tensors, and scratch of kernels")
    beside = "libraries" if f.device.kind == "cpu" else "context, workspaces, allocator (assumed)"
    table.add_row("beside", words.size(f.beside), "", beside)
    verdict = "fits into" if f.fits else "does NOT fit into"
    table.add_row("in all", words.size(total(need, f.device)), "", f"{verdict} {words.size(f.memory)}", style="bold")
    console.print(table)
    if f.others:
        other = Table("with", "in all", "", box=None, header_style="bold")
        for change, alternative in f.others.items():
            whole = total(alternative, f.device)
            other.add_row(change, words.size(whole), "fits" if whole <= f.memory else "does not fit")
        console.print(other)
    lines = [
        ("logits at once", f"a loss that held them would need {words.size(need.peer_logits)} more; they come in chunks here"),
        ("cache of a context", f"{words.size(f.cache)} to generate {s.context} tokens"),
        *_cost(f, f.cost),
    ]
    for what, value in lines:
        console.print(f"{what:<22}{value}", soft_wrap=True)
    laws = Table(f"optima of {f.optima_flops:.3g} FLOP", "parameters", "tokens", "loss", box=None, header_style="bold")
    for o in f.optima:
        laws.add_row(o.law, _amount(o.parameters), _amount(o.tokens), "" if o.loss is None else f"{o.loss:.3f}")
    console.print(laws)


def _cost(f: Found, c: Cost) -> list[tuple[str, str]]:
    peak = f.device.peak(f.setup.precision) / 1e12
    price = f"${c.dollars:,.2f} at ${f.device.price:g} an hour (assumed unless given)" if f.device.price else "no price known"
    again = f", and {c.recomputed:.3g} again for checkpointing" if c.recomputed else ""
    lines = [
        ("FLOPs of a token", f"{c.flops_per_token:.4g} forward and backward{again} (6N: {c.rule:.4g})"),
        ("FLOPs of an update", f"{(c.flops_per_token + c.recomputed) * f.setup.batch_tokens:.4g}"),
        ("trained on", f"{_amount(c.tokens)} tokens, {c.tokens / f.parameters:.3g} for each parameter: {c.flops:.3g} FLOP"),
        ("devices", f"{f.devices} x {f.device.name}: {peak:,.4g} TFLOP/s at {f.mfu:.0%} of the peak (assumed)"),
        ("speed", f"{c.tokens_per_second:,.0f} tokens/s"),
        ("time", _long(c.seconds)),
        ("cost", price),
    ]
    if f.seconds_given is not None and c.seconds > f.seconds_given * (1 + 1e-9):
        lines.append(("too long", f"{_long(f.seconds_given)} were given"))
    if f.device.kind != "cpu" and not f.device.bf16 and f.setup.precision != "fp32":
        lines.append(("note", f"{f.device.name} has no bfloat16: its speed in float16 is taken"))
    return lines


def _amount(count: float) -> str:
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= scale:
            return f"{count / scale:.3g}{unit}"
    return f"{count:.0f}"


def _long(seconds: float) -> str:
    return f"{seconds / 86_400:,.1f} days" if seconds >= 2 * 86_400 else words.duration(seconds)


def draw(found: Found, path: Path) -> None:
    """The memory of the plan and of its `others` as bars."""
    bars = [("as asked", found.need.parts), *((change, need.parts) for change, need in found.others.items())]
    s = found.setup
    way = f"{s.batch_tokens:,} tokens an update, rows of {s.context}, {s.precision}, {s.optimizer}"
    subtitle = f"tensors of one process at the peak; {way}"
    picture.draw(f"{found.name}: memory to train", subtitle, bars, found.memory, path)


def life(plan: Plan) -> None:
    """The plan of a life as a table."""
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
