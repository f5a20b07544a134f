"""Quantise a model's weights to 8 or 4 bits by rounding to nearest; the folder loads in transformers and vLLM, too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from athanor.compress import stage
from athanor.core import io
from athanor.core.errors import ConfigError
from athanor.lm import MANIFEST, load

POSITIONAL = ("path",)


@dataclass(frozen=True)
class Config:
    path: Path
    """A checkpoint folder, or a run folder (its last checkpoint)."""
    checkpoint: str | None = None
    """Which checkpoint of a run folder: base, sft, rl."""
    bits: int = 8
    """Bits of a weight: 8 or 4."""
    group: int | None = None
    """Columns that share a scale: 32, 64 or 128. By default 32 for 4 bits, and one scale per row for 8."""
    out: Path | None = None
    """Folder of the result; `int8` or `int4` beside the checkpoint by default. An earlier one of this checkpoint is replaced."""


def main(config: Config) -> int:
    lm = load(config.path, config.checkpoint)
    assert lm.path is not None, "what was loaded has a path"
    out = config.out or lm.path.parent / f"int{config.bits}"
    earlier = _earlier(out)
    if earlier is not None and earlier != lm.path.name:
        raise ConfigError(
            f"out ({out}) exists and was made of {earlier!r}, not of {lm.path.name!r}: name another with --out, or remove it"
        )
    r = stage.run(lm, config.bits, config.group, out, lm.path.name, load)
    scales = f"groups of {r['group']}" if r["group"] else "one scale per row"
    print(
        f"{lm.path.name}: {config.bits} bits, {scales}: {r['bytes_before']:,} -> {r['bytes_after']:,} bytes"
        f" ({r['bytes_after'] / r['bytes_before']:.0%}), weights off by {r['mean_error']:.1e} on average and"
        f" {r['max_error']:.1e} at most; read back from {out}, logits differ by {r['logit_difference']:.0e}"
    )
    if earlier is not None:
        print("  it replaces the one that was there")
    return 0


def _earlier(out: Path) -> str | None:
    """The name of the checkpoint that a quantised model in `out` was made of; None where there is none."""
    manifest = io.read_json(out / MANIFEST) if (out / MANIFEST).is_file() else None
    lineage = manifest.get("lineage") if isinstance(manifest, dict) else None
    return lineage.get("parent") if isinstance(lineage, dict) and "quantisation" in lineage else None
