"""What a load test asks of a server, and what its clients noticed: `athanor bench serve`. See `clients.py` for the clients.

Requests come as a Poisson process (gaps drawn from an exponential distribution), or as soon as a client is free. All times are
those of the client, in seconds from the begin.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from athanor.core.errors import ConfigError


@dataclass(frozen=True)
class Mix:
    """What clients ask for. Lengths are drawn evenly between two numbers of tokens, both included."""

    prompt: tuple[int, int] = (32, 256)
    """Shortest and longest prompt, in tokens; met within a few."""
    output: tuple[int, int] = (32, 256)
    """Shortest and longest limit of an answer, in tokens."""
    ignore_eos: bool = False
    """Ask for answers as long as their limit, whatever the model says (vLLM's field; OpenAI's own server refuses it)."""
    leave: float = 0.0
    """Share of clients that hang up in the middle of their answer."""
    temperature: float = 1.0
    """Of sampling."""

    def check(self) -> None:
        """Raises ConfigError for a value out of range."""
        for name in ("prompt", "output"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ConfigError(f"mix.{name} ({low} {high}) must be two numbers of tokens from 1 up, the smaller one first")
        if not 0 <= self.leave <= 1:
            raise ConfigError(f"mix.leave ({self.leave}) must be a share, 0 to 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"mix.temperature ({self.temperature}) must be a finite number, 0 or more")


@dataclass(frozen=True)
class Load:
    """How many requests come, and when."""

    rate: float | None = 4.0
    """Requests a second on average; none sends one as soon as a client is free."""
    requests: int = 100
    """Requests to send."""
    clients: int = 64
    """Requests in flight at most; what comes while as many are, waits at the client."""
    seconds: float | None = None
    """Stop sending after this time; what is in flight then is still answered."""
    timeout: float = 600.0
    """Seconds without a byte from the server after which a request counts as failed."""
    seed: int = 0
    """Same seed, same prompts, lengths, gaps and leavers."""

    def check(self) -> None:
        """Raises ConfigError for a value out of range."""
        for name in ("requests", "clients"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be at least 1")
        for name in ("rate", "seconds", "timeout"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} ({value}) must be a finite number above 0, or be left out")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to come: when, how long a prompt, the limit of its answer, and after how many tokens its client leaves."""

    at: float
    prompt: int
    output: int
    leave: int | None
    seed: int


@dataclass(slots=True)
class Outcome:
    """What became of one request.

    planned        when it was to be sent
    sent           when it was
    first, last    when the first and the last piece of its answer came; None where none did
    ended          when it was over
    prompt_tokens  as the server counts them; None where it did not say
    tokens         of the answer, as the server counts them; pieces that came, where it did not say
    finish         finish_reason
    left           whether the client hung up
    error          kind of failure, or ""; `message` is what was said
    """

    planned: float
    sent: float
    first: float | None = None
    last: float | None = None
    ended: float = 0.0
    prompt_tokens: int | None = None
    tokens: int = 0
    finish: str | None = None
    left: bool = False
    error: str = ""
    message: str = ""

    @property
    def complete(self) -> bool:
        return not self.left and not self.error


@dataclass(slots=True)
class Result:
    """All outcomes in the order of sending; `unsent` requests were left when the time was over."""

    model: str
    outcomes: list[Outcome] = field(default_factory=list)
    unsent: int = 0

    def summary(self) -> dict[str, Any]:
        """The figures, as plain JSON. Distributions are over complete answers, None where there are none."""
        done = [o for o in self.outcomes if o.complete]
        begin = min((o.sent for o in self.outcomes), default=0.0)
        seconds = max((o.ended for o in self.outcomes), default=0.0) - begin
        tokens, prompt = sum(o.tokens for o in self.outcomes), sum(o.prompt_tokens or 0 for o in self.outcomes)
        failed = Counter(o.error for o in self.outcomes if o.error)
        said = {o.error: o.message for o in reversed(self.outcomes) if o.error}
        return {
            "seconds": seconds,
            "requests": {
                "complete": len(done),
                "left": sum(o.left for o in self.outcomes),
                "failed": sum(failed.values()),
                "unsent": self.unsent,
            },
            "errors": {kind: {"count": count, "first": said[kind]} for kind, count in failed.most_common()},
            "finish": dict(Counter(str(o.finish) for o in done)),
            "tokens": {"prompt": prompt, "output": tokens},
            "throughput": {
                "requests_per_second": _over(len(done), seconds),
                "output_tokens_per_second": _over(tokens, seconds),
                "prompt_tokens_per_second": _over(prompt, seconds),
            },
            "seconds_to_first_token": spread(o.first - o.sent for o in done if o.first is not None),
            "seconds_per_token": spread(
                (o.last - o.first) / (o.tokens - 1) for o in done if o.first is not None and o.last is not None and o.tokens > 1
            ),
            "seconds_to_answer": spread(o.ended - o.sent for o in done),
            "seconds_late": spread(o.sent - o.planned for o in self.outcomes),
            "most_in_flight": max(running(self.outcomes)[1], default=0),
        }


def _over(count: int, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None


def spread(values: Any) -> dict[str, float] | None:
    """Number, mean, median, 95th and 99th percentile and maximum; None without values."""
    all_of_them = np.asarray(list(values), dtype=np.float64)
    if not len(all_of_them):
        return None
    median, p95, p99 = (float(p) for p in np.percentile(all_of_them, (50, 95, 99)))
    n, mean, largest = len(all_of_them), float(all_of_them.mean()), float(all_of_them.max())
    return {"n": n, "mean": mean, "median": median, "p95": p95, "p99": p99, "max": largest}


def running(outcomes: Sequence[Outcome]) -> tuple[list[float], list[int]]:
    """Times at which the number of requests in flight changed, and that number from then on."""
    # At one moment, ends come before begins: a client that is free again sends at once.
    changes = sorted([(o.sent, 1) for o in outcomes] + [(o.ended, -1) for o in outcomes])
    times, counts, count = [], [], 0
    for at, change in changes:
        count += change
        times.append(at)
        counts.append(count)
    return times, counts


def plan(load: Load, mix: Mix) -> list[Ask]:
    """The requests of a run, by its seed alone."""
    draw = random.Random(load.seed)
    asks, at = [], 0.0
    for _ in range(load.requests):
        at += draw.expovariate(load.rate) if load.rate is not None else 0.0
        prompt, output = draw.randint(*mix.prompt), draw.randint(*mix.output)
        leaves = draw.random() < mix.leave
        after = draw.randint(1, max(1, output - 1))
        asks.append(Ask(at, prompt, output, after if leaves else None, draw.getrandbits(31)))
    return asks
