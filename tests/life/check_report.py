"""Check the report of a whole life: `python tests/life/check_report.py RUN/report.json`.

It knows nothing of the package, so that the two cannot be wrong together.
"""

import json
import math
import sys

RUNGS = ("base", "sft", "rl", "int8", "int4")


def _number(value, low, high=math.inf):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def problems(report):
    """What is wrong with `report`, one line each; [] when it is whole."""
    found = []

    def need(condition, message):
        if not condition:
            found.append(message)

    stages = report.get("stages")
    need(isinstance(stages, list) and stages, f"stages must be a list of stages, not {stages!r}")
    for i, stage in enumerate(stages or []):
        need(isinstance(stage.get("name"), str) and stage["name"], f"stages[{i}].name must be a name, not {stage.get('name')!r}")
        need(_number(stage.get("seconds"), 0), f"stages[{i}].seconds must be a number, not {stage.get('seconds')!r}")
    for name in ("model", "gzip", "bz2", "xz"):
        bits = (report.get("bits_per_byte") or {}).get(name)
        need(_number(bits, 1e-9, 16), f"bits_per_byte.{name} must be above 0, not {bits!r}")
    for name in RUNGS:
        rung = (report.get("ladder") or {}).get(name)
        if not isinstance(rung, dict):
            found.append(f"ladder.{name} is missing")
            continue
        found += [f"ladder.{name}.{problem}" for problem in _rung_problems(rung)]
        need(name in (report.get("lineage") or {}), f"lineage.{name} is missing")
    return found


def _rung_problems(rung):
    accuracy = rung.get("accuracy") or {}
    value, low, high, n = (accuracy.get(key) for key in ("value", "low", "high", "n"))
    if not all(_number(share, 0, 1) for share in (value, low, high)) or not low <= value <= high:
        yield f"accuracy must have 0 <= low <= value <= high <= 1, not {accuracy!r}"
    if not isinstance(n, int) or n < 1:
        yield f"accuracy.n must be the number of trials, not {n!r}"
    for name in ("format_rate", "stop_rate"):
        if not _number(rung.get(name), 0, 1):
            yield f"{name} must be in 0..1, not {rung.get(name)!r}"
    if not _number(rung.get("bits_per_byte"), 1e-9):
        yield f"bits_per_byte must be above 0, not {rung.get('bits_per_byte')!r}"
    if not isinstance(rung.get("bytes"), int) or rung["bytes"] < 1:
        yield f"bytes must be the size of the weights, not {rung.get('bytes')!r}"


def main(path):
    """Print what is wrong with the report at `path`; 1 when something is."""
    with open(path, encoding="utf-8") as file:
        report = json.load(file)
    found = problems(report)
    for problem in found:
        print(f"{path}: {problem}", file=sys.stderr)
    if not found:
        print(f"{path}: whole ({len(report['stages'])} stages, {len(RUNGS)} checkpoints)")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
