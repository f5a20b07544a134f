"""Reinforcement learning with GRPO: groups of answers from the serving engine, rewarded for being right and well formed."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch

from athanor.align.curriculum import Curriculum
from athanor.align.outcome import Outcome
from athanor.align.rollouts import roll_out, summarise, to_batch
from athanor.core import config as configs
from athanor.core import plugins
from athanor.core.device import Precision, default_device
from athanor.core.errors import ConfigError
from athanor.core.stage import Stage, require
from athanor.data.pack import fill
from athanor.evals import harness, lessons, skill
from athanor.lm import load
from athanor.objectives import policy_gradient
from athanor.objectives.policy_gradient import PolicyConfig
from athanor.optim.build import OptimConfig, build
from athanor.optim.schedules import warmup_cosine
from athanor.tokenizer.chat import ours, render
from athanor.train.loop import Hook, fit
from athanor.train.state import StateStore
from athanor.train.watch import watching
from athanor.types import Batch, Completion, Rollout, SamplingParams

POSITIONAL = ("run",)


@dataclass(frozen=True)
class Config:
    run: Path
    """Run folder with an `sft/`; the model goes to its `rl/`."""
    steps: int = 100
    """Updates."""
    prompts: int = 96
    """Problems of a step."""
    group: int = 8
    """Answers to each problem."""
    temperature: float = 1.0
    """Of the answers."""
    max_tokens: int = 96
    """Longest answer; one that does not end by then is cut and earns what it earns."""
    rewards: dict[str, float] = field(default_factory=lambda: {"answer": 1.0, "format": 0.1})
    """Weight of each reward: files of `align/rewards/`."""
    scale: Literal["std", "none"] = "std"
    """What advantages are divided by: the group's standard deviation, or nothing (Dr. GRPO)."""
    skills: tuple[str, ...] | None = None
    """Skills to practise; all by default."""
    precision: Precision = "bf16"
    """Of the matrix products of trainer and engine alike."""
    clip: float = 1.0
    """Largest global gradient norm."""
    save_seconds: float = 15.0
    """Time between two saves of the training state; changes nothing else."""
    seed: int = 0
    """Of problems and answers."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-4, weight_decay=0.0))


def main(config: Config) -> int:
    for name, least in (("steps", 1), ("prompts", 1), ("group", 2), ("max_tokens", 1)):
        if getattr(config, name) < least:
            raise ConfigError(f"{name} ({getattr(config, name)}) must be at least {least}")
    if not config.temperature > 0:
        raise ConfigError(f"temperature ({config.temperature}) must be above 0: equal answers teach nothing")
    stage = Stage(config.run, "grpo", configs.to_dict(config) | {"run": "", "save_seconds": None, "skills": _names(config)})
    if stage.record is None:
        _train(config, stage)
    first, last = (stage.record or {})["curve"][0], (stage.record or {})["curve"][-1]
    print(f"grpo: reward {first['reward']:.3f} -> {last['reward']:.3f}, {last['dead_groups']} dead groups in the last step")
    return 0


def _train(config: Config, stage: Stage) -> None:
    run = config.run
    require(run, "sft")
    lm = load(run, "sft")
    model, tokenizer = lm.decoder.to(default_device()), ours(lm.tokenizer)
    reference = load(run, "sft").decoder.to(default_device()) if config.policy.kl > 0 else None
    rewards = [(w, plugins.require("align.rewards", name, "reward").reward) for name, w in config.rewards.items()]
    engine = lm.engine(max_batch=config.prompts * config.group, precision=config.precision)
    curriculum = Curriculum(_names(config))
    store = StateStore(
        run / "state" / "grpo", stage.settings | {"parent": lm.lineage["weights"], "threads": torch.get_num_threads()}
    )
    for record in store.history():
        curriculum.update(record["skills"])
    figures: dict[str, Any] = {}

    def batches(step: int) -> list[Batch]:
        seed = config.seed * 1_000_003 + step
        counts = curriculum.draw(config.prompts, seed)
        examples = [e for name, n in counts.items() for e in lessons.prompts([name], seed, n)]

        def reward(p: int, completion: Completion) -> Rollout:
            r = harness.judge(engine, examples[p], completion)
            outcome = Outcome(r.correct, r.well_formed, r.stopped, r.tokens)
            total = sum(weight * fn(outcome) for weight, fn in rewards)
            return Rollout(completion, total, {"accuracy": r.correct, "format": float(r.well_formed)})

        model.eval()
        questions = [render(tokenizer, e.conversation[:1], generation_prompt=True).ids for e in examples]
        params = SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens, seed=seed)
        groups = roll_out(engine, questions, config.group, params, reward)
        model.train()
        batch, dead = to_batch(groups, config.temperature, config.scale, f"rollouts of step {step}")
        if reference is not None:
            policy_gradient.add_reference(reference, batch, config.precision)
        asked: dict[str, list[float]] = defaultdict(list)
        for example, group in zip(examples, groups, strict=True):
            asked[example.skill] += [r.parts["accuracy"] for r in group.rollouts]
        rates = {name: fmean(values) for name, values in asked.items()}
        figures.update(summarise(groups), dead_groups=dead, skills=rates)
        curriculum.update(rates)
        return [fill(batch)]

    with watching(run, "grpo", config.steps, store) as tracker:
        progress = fit(
            model,
            policy_gradient.build(config.policy),
            batches,
            build(model, config.optim, bf16=config.precision == "bf16"),
            warmup_cosine(config.steps, min(5, config.steps), 0.1),
            steps=config.steps,
            precision=config.precision,
            clip=config.clip,
            store=store,
            save_seconds=config.save_seconds,
            hooks=[Hook(lambda step: dict(figures), 1)],
            tracker=tracker,
        )
    lm.save(run / "rl", parent="sft")
    stage.finish(steps=config.steps, curve=progress.history, fit=progress.seconds)
    store.clear()


def _names(config: Config) -> list[str]:
    return skill.names() if config.skills is None else list(config.skills)
