"""Collect, clean, deduplicate and split text into a run folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from athanor.core import config as configs
from athanor.core.errors import ConfigError
from athanor.core.stage import Stage
from athanor.data import compressors, corpus

POSITIONAL = ("run",)


@dataclass(frozen=True)
class Config:
    run: Path
    """Run folder; the corpus goes to its `corpus/`."""
    text: Path | None = None
    """A file or folder of text of your own; without it the sources and documentation of Python's standard library."""
    heldout: Path | None = None
    """A file or folder of text that is held out, in place of a share of the text."""
    heldout_fraction: float = 0.015
    """Share of the bytes held out, by whole files."""
    seed: int = 0
    """Which files are held out, and the order of the others."""


def main(config: Config) -> int:
    if config.heldout is not None and config.heldout_fraction != Config.heldout_fraction:
        raise ConfigError(
            f"heldout_fraction ({config.heldout_fraction}) does not go with heldout ({config.heldout}), which is held out whole:"
            " give one of them"
        )
    settings = configs.to_dict(config) | {"run": ""}
    if config.heldout is None:
        del settings["heldout"]  # runs from before there was such an option go on
    stage = Stage(config.run, "corpus", settings)
    if stage.record is None:
        report = corpus.build(
            config.run / "corpus",
            text=config.text,
            heldout=config.heldout,
            heldout_fraction=config.heldout_fraction,
            seed=config.seed,
            exclude=[config.run],
        )
        facts = asdict(report)
        dropped = {"duplicate": report.duplicates, "empty after cleaning": report.empty, "over the limit": report.beyond_limit}
        stage.finish(
            documents=report.train_documents + report.heldout_documents,
            bytes=report.train_bytes + report.heldout_bytes,
            train_bytes=report.train_bytes,
            heldout_bytes=report.heldout_bytes,
            dropped={reason: n for reason, n in (dict(report.skipped) | dropped).items() if n},
            compressed=compressors.bits_per_byte((config.run / "corpus" / corpus.HELDOUT_TEXT).read_bytes()),
            hashes=dict(report.sha256),
            details={k: v for k, v in facts.items() if isinstance(v, (int, float, str))},
        )
    r = stage.record or {}
    print(f"corpus: {r['documents']:,} documents, {r['train_bytes']:,} bytes to train on, {r['heldout_bytes']:,} held out")
    print("  dropped: " + (", ".join(f"{n} {reason}" for reason, n in r["dropped"].items()) or "nothing"))
    return 0
