"""A report as a real run would write it, made up from a seed."""

from __future__ import annotations

import copy
import hashlib
import math
import random
from typing import Any

import pytest

SKILLS = {
    "addition": (0.02, 0.81, 0.93),
    "subtraction": (0.01, 0.66, 0.84),
    "compare": (0.08, 0.88, 0.95),
    "sort": (0.0, 0.52, 0.61),
    "count_letters": (0.05, 0.44, 0.58),
    "reverse": (0.0, 0.71, 0.70),
    "calendar": (0.03, 0.59, 0.66),
    "unit_conversion": (0.01, 0.38, 0.49),
}
PER_SKILL = 60


def wilson(right: int, n: int) -> dict[str, Any]:
    """Wilson's score interval at 95 %."""
    z, p = 1.959964, right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {"value": p, "low": max(0.0, min(p, centre - reach)), "high": min(1.0, max(p, centre + reach)), "n": n}


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def make_report(seed: int = 0, steps: int = 640) -> dict[str, Any]:
    rng = random.Random(seed)
    stages = [
        {"name": "plan", "seconds": 6.1, "tokens_per_second": 15210.0},
        {"name": "corpus", "seconds": 4.9, "documents": 1612},
        {"name": "tokenizer", "seconds": 3.2, "vocab_size": 4096},
        {"name": "pretrain", "seconds": 221.4, "steps": steps, "tokens": 3_276_800},
        {"name": "sft", "seconds": 131.0, "steps": 410, "examples": 13_120},
        {"name": "grpo", "seconds": 142.7, "steps": 96, "rollouts": 36_864},
        {"name": "quantize", "seconds": 5.3},
        *({"name": f"eval:{name}", "seconds": 11.0 + rng.random()} for name in ("base", "sft", "rl", "int8", "int4")),
        {"name": "report", "seconds": 3.8},
    ]
    return {
        "athanor": "0.1.0",
        "created": "2026-03-14T15:09:26+00:00",
        "minutes": 10,
        "seconds": 583.2,
        "seed": seed,
        "plan": {
            "parameters": 3_409_152, "layers": 6, "d_model": 192, "vocab_size": 4096, "context": 256, "precision": "bf16",
            "tokens": {"pretrain": 3_276_800, "sft": 1_049_600}, "steps": {"pretrain": steps, "sft": 410, "grpo": 96},
        },
        "machine": {
            "cpu": "AMD Ryzen 7 7840U", "cores": 8, "threads": 8, "memory": 33_285_996_544, "gpu": None,
            "platform": "Linux-6.8.0-x86_64-with-glibc2.39", "python": "3.11.9", "torch": "2.13.0", "athanor": "0.1.0",
        },
        "stages": stages,
        "corpus": {
            "documents": 1612, "bytes": 24_318_772, "train_bytes": 23_104_011, "heldout_bytes": 1_214_761,
            "dropped": {"duplicate": 41, "empty": 17, "not_text": 3},
        },
        "tokenizer": {"vocab_size": 4096, "bytes_per_token": 3.37},
        "bits_per_byte": {"model": 1.71, "gzip": 1.98, "bz2": 1.69, "xz": 1.64},
        "ladder": _ladder(rng),
        "curves": _curves(rng, steps),
        "samples": _samples(),
        "lineage": _lineage(),
    }  # fmt: skip


def _ladder(rng: random.Random) -> dict[str, Any]:
    ladder = {}
    sizes = {"base": 6_853_112, "sft": 6_853_112, "rl": 6_853_112, "int8": 3_571_904, "int4": 2_044_160}
    for name, count in sizes.items():
        column = {"base": 0, "sft": 1}.get(name, 2)
        loss = {"int8": 0.003, "int4": 0.07}.get(name, 0.0)
        right = {}
        for skill, chances in SKILLS.items():
            chance = max(0.0, chances[column] - loss)
            right[skill] = sum(rng.random() < chance for _ in range(PER_SKILL))
        total = PER_SKILL * len(SKILLS)
        english = min(sum(right.values()), round(sum(right.values()) * 0.53))
        ladder[name] = {
            "accuracy": wilson(sum(right.values()), total),
            "format_rate": (0.0, 0.971, 0.996)[column],
            "stop_rate": (0.21, 0.985, 0.998)[column],
            "bits_per_byte": 1.71 + (0.0, 0.21, 0.23)[column] + loss / 2,
            "bytes": count,
            "tokens_per_second": {"int8": 3110.0, "int4": 3340.0}.get(name, 2480.0),
            "skills": {skill: wilson(n, PER_SKILL) for skill, n in right.items()},
            "languages": {"en": wilson(english, total // 2), "zh": wilson(sum(right.values()) - english, total // 2)},
        }
    return ladder


def _curves(rng: random.Random, steps: int) -> dict[str, Any]:
    pretrain: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        point = {
            "step": step,
            "loss": 8.3 * step**-0.17 + rng.gauss(0, 0.09),
            "lr": 3e-3 * min(1, step / 30, (steps - step) / (0.4 * steps)),
            "tokens_per_second": 15_000 + rng.gauss(0, 350),
            "grad_norm": 0.4 + 3 / step + abs(rng.gauss(0, 0.06)),
        }
        if step % max(1, steps // 12) == 0:
            point["heldout_bits_per_byte"] = 1.71 + 2.2 * (1 - step / steps) ** 3
        pretrain.append(point)
    sft = []
    for step in range(1, 411):
        loss = 0.12 + 1.9 * math.exp(-step / 60) + abs(rng.gauss(0, 0.03))
        sft.append({"step": step, "loss": loss, "lr": 1e-3 * (1 - step / 410)})
    grpo = []
    for step in range(96):
        gain = 1 - math.exp(-step / 30)
        point = {
            "step": step,
            "reward": 0.62 + 0.17 * gain + rng.gauss(0, 0.03),
            "accuracy": 0.58 + 0.16 * gain + rng.gauss(0, 0.03),
            "format": min(1.0, 0.97 + 0.03 * gain),
            "length": 31 + 6 * gain + rng.gauss(0, 0.8),
            "dead_groups": 14 + 9 * gain + rng.randint(-3, 3),
            "ratio_gap": 10 ** rng.gauss(-6.4, 0.25),
            "kl": 0.021 * gain + abs(rng.gauss(0, 0.001)),
            "clipped": abs(rng.gauss(0.004, 0.002)),
            "entropy": 0.31 - 0.1 * gain + rng.gauss(0, 0.008),
        }
        grpo.append(point)
    return {"pretrain": pretrain, "sft": sft, "grpo": grpo}


def _samples() -> list[dict[str, Any]]:
    def answer(content: str, correct: bool, reasoning: str | None = None) -> dict[str, Any]:
        return {"reasoning": reasoning, "content": content, "correct": correct}

    babble = "\n        self.assertEqual(a, b)\n\n    def test_add(self):\n        x = int(47)\n" * 12
    return [
        {
            "prompt": "What is 47 + 86?", "skill": "addition", "language": "en", "expected": "133",
            "answers": {
                "base": answer(babble, False),
                "sft": answer("The answer is 123.", False, "7 + 6 = 13, write 3, carry 1\n4 + 8 = 12\n123"),
                "rl": answer("The answer is 133.", True, "7 + 6 = 13, write 3, carry 1\n4 + 8 + 1 = 13\n133"),
            },
        },
        {
            "prompt": "请把这些数字从小到大排列：42、7、19、88。", "skill": "sort", "language": "zh", "expected": "7、19、42、88",
            "answers": {
                "base": answer("", False),
                "sft": answer("7、19、42、88", True, "最小的是7，然后是19，然后是42，最后是88。"),
                "rl": answer("7、19、42、88", True, "7 < 19 < 42 < 88"),
            },
        },
        {
            "prompt": 'Reverse the word "<script>alert(1)</script>".',
            "skill": "reverse", "language": "en", "expected": ">tpircs/<",
            "answers": {
                "base": answer("<script>alert('base')</script><img src=x onerror=alert(2)>", False),
                "sft": answer("tpircs", False, "</p></details></main><h1>out</h1>"),
                "rl": answer("\x00\u202etpircs & \ud800", False, "t-p-i-r-c-s"),
            },
        },
        {
            "prompt": "“strawberry”这个词里有几个字母r？", "skill": "count_letters", "language": "zh", "expected": "3",
            "answers": {
                "base": answer("def r(self):", False),
                "sft": answer("有2个。", False, "s t r a w b e r r y：r 1，r 2"),
                "rl": answer("有3个。", True, "s t r(1) a w b e r(2) r(3) y"),
            },
        },
    ]  # fmt: skip


def _lineage() -> dict[str, Any]:
    lineage = {}
    for name, above in {"base": None, "sft": "base", "rl": "sft", "int8": "rl", "int4": "rl"}.items():
        lineage[name] = {
            "parent": above,
            "corpus": digest("corpus") if name == "base" else None,
            "tokenizer": digest("tokenizer"),
            "template": digest("template"),
            "config": digest("config", name)[:16],
            "weights": digest("weights", name),
        }
    return lineage


_REPORT = make_report()


@pytest.fixture
def report() -> dict[str, Any]:
    """A whole report, to be changed at will."""
    return copy.deepcopy(_REPORT)


@pytest.fixture
def curveless() -> dict[str, Any]:
    """A report without curves, to be changed at will: most of a page's time goes into drawing them."""
    return copy.deepcopy({**_REPORT, "curves": None})
