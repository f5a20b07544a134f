"""A model's whole life: raw text to a served assistant, with a report of what each stage changed."""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from athanor.core import config as configs
from athanor.core import io, plugins
from athanor.core.device import default_device, tune_allocator
from athanor.core.errors import ConfigError
from athanor.core.stage import open_run
from athanor.train import plan as planning
from athanor.train.plan import Plan


@dataclass(frozen=True)
class Config:
    out: Path = Path("runs/first")
    """Run folder. A life that was cut off goes on where it was when started again."""
    minutes: float = 10.0
    """How long the life may take: everything else is derived from it and from the speed of this machine."""
    text: Path | None = None
    """A file or folder of text of your own to pre-train on; without it the sources of Python's standard library."""
    seed: int = 0
    """Of weights, data order, problems and answers."""
    save_seconds: float = 15.0
    """Time between two saves of the training state: what a kill can cost at most."""
    plan: Path | None = None
    """A plan file (`athanor plan --out FILE`) to follow to the letter instead of measuring and adjusting."""


def main(config: Config) -> int:
    life = Life(config)
    p = life.plan
    life.stage("corpus", text=config.text, heldout_fraction=p.heldout_fraction, seed=config.seed)
    life.stage("tokenizer", vocab_size=p.vocab_size, sample=p.tokenizer_sample)
    common = {"precision": p.precision, "seed": config.seed, "save_seconds": config.save_seconds}
    batches = {"batch_tokens": p.batch_tokens, "context": p.context}
    life.stage("pretrain", steps=life.steps("pretrain"), shape=p.shape, **batches, **common)
    life.evaluate("base")
    life.stage("sft", steps=life.steps("sft"), **batches, **common)
    life.evaluate("sft")
    life.stage("grpo", steps=life.steps("grpo"), prompts=p.prompts, group=p.group, **common)
    life.evaluate("rl")
    for bits in (8, 4):
        life.compress(bits)
        life.evaluate(f"int{bits}")
    life.report()
    return 0


class Life:
    """The stages of one run folder: plan, time, and which recipe does what."""

    def __init__(self, config: Config) -> None:
        tune_allocator()
        self.began, self.config, self.run = time.time(), config, config.out
        open_run(self.run)
        self.state_path = self.run / "life.json"
        asked = {k: v for k, v in configs.to_dict(config).items() if k not in ("out", "plan", "save_seconds")}
        self.state: dict[str, Any] = {"asked": asked, "spent": 0.0, "stages": []}
        if self.state_path.exists():
            self.state = io.read_json(self.state_path)
            changed = configs.differences(self.state["asked"], asked)
            if changed:
                raise ConfigError(
                    f"{self.run} is a life with other {', '.join(changed)}: give the same settings to go on with it,"
                    " or another --out"
                )
            print(f"{self.run}: going on after {self.state['spent']:.0f} s")
        else:
            fixed = configs.from_dict(Plan, io.read_json(config.plan)) if config.plan else None
            plan = fixed or planning.make(config.minutes, default_device())
            self.state |= {"plan": asdict(plan), "exact": fixed is not None}
            self.state["stages"].append({"name": "plan", "seconds": round(time.time() - self.began, 3)})
            self._save()
        plugins.load("recipes", "plan").show(self.plan)

    @property
    def plan(self) -> Plan:
        return configs.from_dict(Plan, self.state["plan"])

    def steps(self, stage: str) -> int:
        """Steps of a training stage, fitted to the time that is left when it begins and kept from then on."""
        if stage not in self.state.setdefault("settled", []):
            if not self.state["exact"]:
                done = {s["name"] for s in self.state["stages"]}
                fixed = {n: s for n, s in self.plan.seconds.items() if n not in ("pretrain", "sft", "grpo") and n not in done}
                left = self.config.minutes * 60 * (1 - planning.MARGIN) - self._spent() - sum(fixed.values())
                self.state["plan"] = asdict(planning.adjust(self.plan, stage, left))
            self.state["settled"].append(stage)
            self._save()
        return int(self.state["plan"][f"{stage}_steps"])

    def stage(self, name: str, **settings: Any) -> None:
        """Run one recipe on the run folder, unless it is done."""
        recipe = plugins.load("recipes", name)
        self._do(name, lambda: recipe.main(configs.from_dict(recipe.Config, {"run": str(self.run), **_plain(settings)})))

    def evaluate(self, checkpoint: str) -> None:
        """Evaluate one checkpoint on the same held-out problems and text as all the others."""
        recipe, p = plugins.load("recipes", "evaluate"), self.plan
        settings = recipe.Config(
            self.run, checkpoint, n=p.problems, window=p.context, precision=p.precision, seed=self.config.seed
        )
        self._do(f"eval-{checkpoint}", lambda: recipe.main(settings))

    def compress(self, bits: int) -> None:
        """Quantise the final model."""
        recipe = plugins.load("recipes", "quantize")
        settings = recipe.Config(self.run / "rl", bits=bits, out=self.run / f"int{bits}")
        self._do(f"quantize-int{bits}", lambda: recipe.main(settings))

    def report(self) -> None:
        """Write report.json and report.html."""
        recipe = plugins.load("recipes", "report")
        self._do("report", lambda: recipe.main(recipe.Config(self.run)))
        recipe.main(recipe.Config(self.run))  # once more, so that its own time stands in it
        spent = self.state["spent"]
        print(f"\nA life of {spent / 60:.1f} minutes. Report: {self.run / 'report.html'}")
        folder = shlex.quote(str(self.run))
        print(f"Chat with it:  athanor chat {folder}\nServe it:      athanor serve {folder}")

    def _do(self, name: str, work: Any) -> None:
        if name in {s["name"] for s in self.state["stages"]}:
            return
        print(f"\n== {name} ({self._spent():.0f} s of {self.config.minutes * 60:.0f} s)", flush=True)
        start = time.time()
        work()
        self.state["stages"].append({"name": name, "seconds": round(time.time() - start, 3)})
        self._save()

    def _spent(self) -> float:
        return float(self.state["spent"]) + time.time() - self.began

    def _save(self) -> None:
        self.state["spent"], self.began = self._spent(), time.time()
        io.write_json(self.state_path, self.state)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in settings.items() if v is not None}
