"""What training costs in operations, time and money, and what a budget is best spent on.

Legend: N parameters, D tokens, C = 6 N D floating-point operations.

| law                                   | optimum for C                                                                        |
| ------------------------------------- | ------------------------------------------------------------------------------------ |
| 20 tokens a parameter                 | N = sqrt(C / 120), D = 20 N (Hoffmann et al. 2022, approaches 1 and 2, rounded)      |
| L = E + A / N^alpha + B / D^beta      | N = G (C / 6)^(beta / (alpha + beta)), G = (alpha A / (beta B))^(1 / (alpha + beta)) |
|                                       | (Hoffmann et al. 2022, eq. 4 and 10; constants refitted by Besiroglu et al. 2024)    |
| Kaplan                                | N = 1.3e9 c^0.73, c in PF-days, embeddings not counted (Kaplan et al. 2020, table 6) |
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from athanor.core.errors import ConfigError
from athanor.models import io as models
from athanor.models import llama
from athanor.models._profile import profile
from athanor.models.base import LanguageModel
from athanor.train.devices import Device

TOKENS_PER_PARAMETER = 20.0
PF_DAY = 1e15 * 86_400
T = TypeVar("T")


@dataclass(frozen=True)
class Fit:
    """L(N, D) = E + A / N^alpha + B / D^beta, nats a token."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, n: float, d: float) -> float:
        """L of N parameters and D tokens."""
        return self.e + self.a / n**self.alpha + self.b / d**self.beta

    def optimum(self, flops: float) -> tuple[float, float]:
        """N and D that make L least where 6 N D = C."""
        both = self.alpha + self.beta
        n = (self.alpha * self.a / (self.beta * self.b)) ** (1 / both) * (flops / 6) ** (self.beta / both)
        return n, flops / 6 / n


HOFFMANN = Fit(1.69, 406.4, 410.7, 0.34, 0.28)
BESIROGLU = Fit(1.8172, 482.01, 2085.43, 0.3478, 0.3658)


@dataclass(frozen=True)
class Optimum:
    """What a law makes of C: parameters, tokens, and the loss that it foresees on its own data (None where it foresees none)."""

    law: str
    parameters: float
    tokens: float
    loss: float | None


def optima(flops: float) -> list[Optimum]:
    """How each law would spend C operations. Raises ConfigError unless C is positive."""
    _positive("flops", flops)
    n = math.sqrt(flops / 6 / TOKENS_PER_PARAMETER)
    kaplan = 1.3e9 * (flops / PF_DAY) ** 0.73
    found = [
        Optimum("Chinchilla, 20 tokens a parameter", n, TOKENS_PER_PARAMETER * n, BESIROGLU.loss(n, TOKENS_PER_PARAMETER * n))
    ]
    for law, fit in (("Hoffmann et al. 2022, parametric", HOFFMANN), ("Besiroglu et al. 2024, refitted", BESIROGLU)):
        n, d = fit.optimum(flops)
        found.append(Optimum(law, n, d, fit.loss(n, d)))
    return [*found, Optimum("Kaplan et al. 2020", kaplan, flops / 6 / kaplan, None)]


@dataclass(frozen=True)
class Cost:
    """What training on `tokens` costs.

    flops_per_token  forward and backward, found by walking the model: matrices, and attention at the context
    recomputed       of these again, where checkpointing computes the forward pass twice
    rule             6 N, N without embeddings that are only looked up: what the walk is held against
    flops            in all, recomputed ones included
    seconds, dollars at peak x mfu on all devices
    """

    tokens: float
    flops_per_token: float
    recomputed: float
    rule: float
    flops: float
    seconds: float
    tokens_per_second: float
    dollars: float


def cost(
    model: LanguageModel,
    *,
    tokens: float,
    context: int,
    device: Device,
    devices: int = 1,
    mfu: float = 0.4,
    precision: str = "bf16",
    checkpointing: str = "none",
    tune: str = "full",
) -> Cost:
    """Operations, time and money of training `model` on `tokens`.

    Recomputed operations take time and are not counted as useful: mfu is the share of the peak of the useful ones. Where the
    weights are frozen (lora, qlora) their gradients are not formed, which is a third of the operations.

    Raises:
        ConfigError: tokens not above 0.
    """
    _positive("tokens", tokens)
    found = profile(model, context)
    useful = found.flops_forward * (3 if tune == "full" else 2)
    # Selective: products are kept, so what is computed again is not counted anywhere.
    again = found.flops_forward if checkpointing == "full" else 0.0
    looked_up = found.parameters - sum(part.parameters for part in found.parts if part.flops)
    rate = devices * device.peak(precision) * mfu / (useful + again)
    seconds = tokens / rate
    return Cost(
        tokens,
        useful,
        again,
        6.0 * (found.active - looked_up + _tied(found.parts)),
        tokens * (useful + again),
        seconds,
        rate,
        seconds / 3600 * device.price * devices,
    )


def _tied(parts: Sequence[Any]) -> float:
    """Parameters of an output embedding that is tied: they are in no part of their own, and multiplied with."""
    return sum(part.flops / 2 for part in parts if not part.parameters)


# The family of shapes that a largest model is looked for in: heads of 64, so many layers that width / layers is 64 as in
# GPT-2 and GPT-3's smaller models (Kaplan et al. 2020, section 3.2, found the ratio to matter little).
ASPECT = 64
HEAD = 64


def shape(d_model: int, vocab_size: int, max_positions: int) -> LanguageModel:
    """A LLaMA of this width: layers d / 64, heads of 64, feed-forward 8/3 d rounded up to 64, tied embeddings, on no device."""
    heads = d_model // HEAD
    groups = max(g for g in range(1, heads + 1) if heads % g == 0 and g <= max(1, heads // 2))
    d_ff = -(-8 * d_model // 3 // HEAD) * HEAD
    layers = max(2, d_model // ASPECT)
    found: LanguageModel = models.build("llama", llama.Config(vocab_size, d_model, layers, heads, groups, d_ff, max_positions))
    return found


def largest(fits: Callable[[LanguageModel], bool], vocab_size: int, context: int, widest: int = 256 * HEAD) -> LanguageModel:
    """The largest of `shape` that `fits`, a condition that larger ones fail if a smaller one does.

    Raises:
        ConfigError: not even the smallest fits.
    """
    low, high = 0, 1  # in heads: `low` fits, `high` does not
    while high * HEAD <= widest and fits(shape(high * HEAD, vocab_size, context)):  # small models are quicker to ask
        low, high = high, 2 * high
    high = min(high, widest // HEAD + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(shape(middle * HEAD, vocab_size, context)):
            low = middle
        else:
            high = middle
    if not low:
        raise ConfigError(
            f"not even a model {HEAD} wide with 2 layers and a vocabulary of {vocab_size:,} fits: give more memory, time or"
            " tokens, or lower batch_tokens, context or vocab_size"
        )
    return shape(low * HEAD, vocab_size, context)


_UNITS = {
    "memory": {"": 1.0, "b": 1.0, **{f"{k}b": 10.0 ** (3 * i) for i, k in enumerate("kmgt", 1)}}
    | {f"{k}ib": 2.0 ** (10 * i) for i, k in enumerate("kmgt", 1)},
    "tokens": {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12},
    "flops": {"": 1.0, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18},
}
_USUAL = {"memory": "80GB or 512MiB", "tokens": "300M or 20B", "flops": "1e21"}


def quantity(field: str, text: str) -> float:
    """A number with a unit: of memory bytes, of tokens and flops these. Raises ConfigError for what is none."""
    match = re.fullmatch(r"\s*([0-9][0-9_,]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    units = _UNITS[field]
    if match is None or match[2].lower() not in units:
        raise ConfigError(
            f"{field} ({text!r}) must be a number and a unit ({', '.join(filter(None, units))}), as {_USUAL[field]}"
        )
    value = float(re.sub("[_,]", "", match[1])) * units[match[2].lower()]
    _positive(field, value)
    return value


def _positive(field: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{field} ({value:g}) must be above 0, as {_USUAL[field]}")
