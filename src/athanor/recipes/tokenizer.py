"""Train a byte-level BPE tokenizer on a run's corpus."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from athanor.core import config as configs
from athanor.core import io
from athanor.core.errors import ConfigError
from athanor.core.stage import Stage, require
from athanor.data import corpus
from athanor.evals import skill
from athanor.tokenizer.bpe import Tokenizer

POSITIONAL = ("run",)


@dataclass(frozen=True)
class Config:
    run: Path
    """Run folder with a corpus; the tokenizer goes to its `tokenizer/`."""
    vocab_size: int = 2048
    """Tokens, the 16 control tokens and 256 bytes included."""
    sample: int = 16_000_000
    """Characters of the train split (its documents lie in random order) that merges are learned from."""
    skills: int = 4000
    """Training examples of the skills read beside it, so that their words, Chinese ones too, become tokens."""
    noise: int = 0
    """Sentinels that the vocabulary gets, and a mask with them: objectives that corrupt text need them; T5 has 100."""


def main(config: Config) -> int:
    if config.sample < 1 or config.skills < 0:
        raise ConfigError(f"sample ({config.sample}) must be at least 1 character, skills ({config.skills}) at least 0 examples")
    settings = configs.to_dict(config) | {"run": ""}
    if not config.noise:
        del settings["noise"]  # runs from before there was such an option go on
    stage = Stage(config.run, "tokenizer", settings)
    if stage.record is None:
        require(config.run, "corpus")
        sample = [d.text for d in corpus.beginning(config.run / "corpus" / corpus.TRAIN, config.sample)]
        names = skill.names() if config.skills else []
        lessons = islice(skill.examples(names, "train", seed=0), config.skills) if names else ()
        talk = ["\n".join((*(m.content for m in e.conversation), e.conversation[1].reasoning or "")) for e in lessons]
        tokenizer = Tokenizer.train([*sample, *talk], config.vocab_size, config.noise)
        with io.atomic_dir(config.run / "tokenizer") as folder:
            tokenizer.save(folder)
        heldout = [d.text for d in corpus.read_documents(config.run / "corpus" / corpus.HELDOUT)]
        tokens = sum(map(len, tokenizer.encode_batch(heldout)))
        stage.finish(
            vocab_size=tokenizer.vocab_size,
            bytes_per_token=sum(len(t.encode()) for t in heldout) / tokens,
            sample=sum(map(len, sample)),
            hash=tokenizer.hash,
        )
    r = stage.record or {}
    print(f"tokenizer: {r['vocab_size']:,} tokens, {r['bytes_per_token']:.3f} bytes per token on held-out text")
    return 0
