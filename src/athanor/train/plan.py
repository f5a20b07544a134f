"""From minutes to a whole life: measure this machine, then derive model size and steps of every stage.

The rule. Training N parameters on D tokens costs C = 6 N D floating-point operations (Kaplan et al. 2020).
Compute-optimal is D = r N, so N = sqrt(C / 6 r). Hoffmann et al. 2022 found r = 20 for large models; lives of minutes
do better with fewer tokens and a larger model, since the skills that follow pre-training bring tokens of their own and
narrow matrices waste the machine: r = TOKENS_PER_PARAMETER was measured (docs/log.md). The shape nearest to N is taken
from SHAPES.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from athanor.core.device import Precision, supports_bf16
from athanor.core.errors import ConfigError
from athanor.models import llama
from athanor.objectives import next_token
from athanor.optim.build import OptimConfig, build
from athanor.train.step import train_step
from athanor.types import Batch

TOKENS_PER_PARAMETER = 6.0
MARGIN = 0.03  # share of the time kept back
PRETRAIN, SFT, GRPO = 0.45, 0.34, 0.21  # shares of the training time
LEAST_STEPS = 5
VOCAB_SIZE = 2048
CONTEXT = 256
# d_model, n_layers, n_heads, n_kv_heads, d_ff: heads of 64, since narrower ones waste the machine's matrix units.
SHAPES = (
    (128, 2, 2, 1, 352),
    (128, 4, 2, 1, 352),
    (192, 4, 3, 1, 512),
    (256, 4, 4, 2, 704),
    (256, 6, 4, 2, 704),
    (384, 6, 6, 2, 1024),
    (512, 8, 8, 4, 1408),
    (768, 12, 12, 4, 2048),
)


@dataclass(frozen=True)
class Plan:
    """What a life of `minutes` will be. Seconds are expectations, steps and sizes are what is done."""

    minutes: float
    precision: Precision
    threads: int
    flops: float
    tokens_per_second: float
    parameters: int
    shape: dict[str, int]
    vocab_size: int
    tokenizer_sample: int
    context: int
    batch_tokens: int
    pretrain_steps: int
    sft_steps: int
    grpo_steps: int
    prompts: int
    group: int
    problems: int
    heldout_fraction: float
    seconds: dict[str, float]

    def tokens(self) -> dict[str, int]:
        """Tokens that each stage trains on (rollouts are not counted)."""
        return {"pretrain": self.pretrain_steps * self.batch_tokens, "sft": self.sft_steps * self.batch_tokens}


def config(shape: tuple[int, ...], vocab_size: int = VOCAB_SIZE) -> llama.Config:
    """The config of one of SHAPES."""
    d_model, n_layers, n_heads, n_kv_heads, d_ff = shape
    return llama.Config(vocab_size, d_model, n_layers, n_heads, n_kv_heads, d_ff)


def speed(shape: tuple[int, ...], batch_tokens: int, precision: Precision, device: torch.device, seconds: float = 1.5) -> float:
    """Tokens per second of training steps of a model of this shape on random tokens, the median step of `seconds`."""
    model = llama.Model(config(shape))
    model.initialise(torch.Generator().manual_seed(0))
    model.to(device)
    rows = max(1, batch_tokens // CONTEXT)
    ids = torch.randint(0, VOCAB_SIZE, (rows * CONTEXT,), generator=torch.Generator().manual_seed(0)).to(device)
    batch = Batch(ids, ids, torch.full((rows,), CONTEXT, device=device), origin="random tokens")
    optimizers = build(model, OptimConfig(), bf16=precision == "bf16")
    times: list[float] = []
    while len(times) < 4 or sum(times) < seconds:
        start = time.perf_counter()
        train_step(model, next_token.loss, [batch], optimizers, lr_factor=0.0, clip=1.0, precision=precision)
        times.append(time.perf_counter() - start)
    return rows * CONTEXT / sorted(times[1:])[len(times[1:]) // 2]


def make(minutes: float, device: torch.device) -> Plan:
    """Measure the machine for a few seconds and plan a life of `minutes`.

    Raises:
        ConfigError: minutes not above 0, or too few for every stage to do anything on this machine.
    """
    if not 0 < minutes < 60 * 24 * 30:
        raise ConfigError(f"minutes ({minutes}) must be above 0 (and below a month): 10 is the usual life, 1 a very short one")
    precision: Precision = "bf16" if supports_bf16(device) else "fp32"
    total = minutes * 60 * (1 - MARGIN)
    batch_tokens = 4096 if minutes < 3 else 8192
    # Fixed costs, as measured on two cores; they shrink with the life where they can.
    problems = 1120 if minutes < 5 else 2800
    fixed = {
        "plan": 5.0,
        "corpus": 3.0,
        "tokenizer": 3.0 if minutes < 3 else 6.0,
        **{f"eval-{name}": 2.5 + problems / 400 for name in ("base", "sft", "rl", "int8", "int4")},
        "quantize-int8": 1.5,
        "quantize-int4": 1.5,
        "report": 3.0,
    }
    training = total - sum(fixed.values())
    if training < 10:
        raise ConfigError(
            f"minutes ({minutes}) leaves {training:.0f} s for training after the fixed costs of {sum(fixed.values()):.0f} s:"
            " give 1 or more"
        )
    probe = SHAPES[2]
    flops = speed(probe, batch_tokens, precision, device) * 6 * _parameters(probe)
    wanted = (training * (PRETRAIN + SFT) * flops / 6 / TOKENS_PER_PARAMETER) ** 0.5
    shape = min(SHAPES, key=lambda s: abs(_parameters(s) - wanted))
    rate = speed(shape, batch_tokens, precision, device) * 0.92  # data, optimiser and bookkeeping beside the bare step
    plan = Plan(
        minutes=minutes,
        precision=precision,
        threads=torch.get_num_threads(),
        flops=flops,
        tokens_per_second=rate,
        parameters=_parameters(shape),
        shape=dict(zip(("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff"), shape, strict=True)),
        vocab_size=VOCAB_SIZE,
        tokenizer_sample=4_000_000 if minutes < 3 else 16_000_000,
        context=CONTEXT,
        batch_tokens=batch_tokens,
        pretrain_steps=0,
        sft_steps=0,
        grpo_steps=0,
        prompts=32 if minutes < 3 else 64,
        group=8,
        problems=problems,
        heldout_fraction=0.004 if minutes < 3 else 0.015,
        seconds=fixed | {"pretrain": training * PRETRAIN, "sft": training * SFT, "grpo": training * GRPO},
    )
    step = batch_tokens / rate
    return replace(
        plan,
        pretrain_steps=max(LEAST_STEPS, int(plan.seconds["pretrain"] / step)),
        sft_steps=max(LEAST_STEPS, int(plan.seconds["sft"] / step)),
        grpo_steps=max(LEAST_STEPS, int(plan.seconds["grpo"] / grpo_step_seconds(plan))),
    )


def grpo_step_seconds(plan: Plan, answer_tokens: float = 25.0, prompt_tokens: float = 20.0) -> float:
    """Expected seconds of one GRPO step: answers are decoded at about the training rate, and most of them are trained on."""
    answers = plan.prompts * plan.group
    return answers * (1.3 * answer_tokens + 0.7 * (answer_tokens + prompt_tokens)) / plan.tokens_per_second


def adjust(plan: Plan, stage: str, left: float) -> Plan:
    """The plan with the steps of `stage` fitted to the time that is left for it and the training stages after it.

    Args:
        stage: pretrain, sft or grpo, about to begin.
        left: seconds for training, without what the other stages still need.
    """
    order = ("pretrain", "sft", "grpo")
    expected = sum(plan.seconds[name] for name in order[order.index(stage) :])
    factor = max(0.2, min(1.3, left / expected))
    steps = max(LEAST_STEPS, int(getattr(plan, f"{stage}_steps") * factor))
    changes: dict[str, Any] = {f"{stage}_steps": steps, "seconds": plan.seconds | {stage: plan.seconds[stage] * factor}}
    return replace(plan, **changes)


def _parameters(shape: tuple[int, ...]) -> int:
    with torch.device("meta"):
        return llama.Model(config(shape)).n_parameters()
