"""Perplexity of a decoder on a text file, per word, byte or token.

    athanor perplexity runs/wikitext2 wikitext-2/test.txt
    athanor perplexity downloads/gpt2 test.txt --unit byte --window 1024 --stride 512

Words are what stands between spaces, and one end of line for each line, as the published figures on WikiText count them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from athanor.core import io
from athanor.core.config import to_dict
from athanor.core.device import Precision, default_device
from athanor.data.clean import clean
from athanor.data.compressed import read_text
from athanor.evals.perplexity import UNITS, Unit, perplexity
from athanor.lm import LM, load

POSITIONAL = ("path", "file")
_LARGEST_WINDOW = 1024  # by default, of models that would take more


@dataclass(frozen=True)
class Config:
    path: Path
    """A checkpoint folder, or a run folder (its last checkpoint)."""
    file: Path
    """UTF-8 text, as it is or compressed (.gz, .bz2, .xz)."""
    unit: Unit = "word"
    """What the nats are divided by: words, bytes or tokens."""
    window: int | None = None
    """Tokens seen at once; by default those of a row in the run's pre-training, else the model's context, 1,024 at most."""
    stride: int | None = None
    """New tokens of each window; half of it by default."""
    raw: bool = False
    """Leave the text as it is; by default it is made uniform as `athanor corpus` does it (spaces at ends of lines, NFC)."""
    checkpoint: str | None = None
    """Which checkpoint of a run folder: base, sft, rl ...; by default the run's own choice."""
    precision: Precision = "fp32"
    """Of the matrix products: bf16 or fp32."""
    json: bool = False
    """Print everything as JSON."""


def main(config: Config) -> None:
    text = read_text(config.file)
    cleaned = clean(text)
    changes = {} if config.raw else {name: int(n) for name, n in asdict(cleaned).items() if name != "text" and n}
    lm = load(config.path, config.checkpoint)
    model = lm.decoder.to(default_device())
    window = _window(lm) if config.window is None else config.window
    stride = window - window // 2 if config.stride is None else config.stride
    found = perplexity(
        model, lm.tokenizer, text if config.raw else cleaned.text, window=window, stride=stride, precision=config.precision
    )
    value = found.per(config.unit)
    if config.json:
        figures = asdict(found) | {"perplexity": {unit: found.per(unit) for unit in UNITS}, "bits_per_byte": found.bits_per_byte}
        own = {"model": lm.name, "value": value, "cleaned": changes, "window": window, "stride": stride}
        print(json.dumps(to_dict(config) | own | figures, indent=1, ensure_ascii=False))
        return
    f = found
    bits = f", {f.bits_per_byte:.4f} bits per byte" if config.unit == "byte" else ""
    print(f"{lm.name}: perplexity {value:,.3f} per {config.unit}{bits}, on {config.file}")
    print(f"  {f.words:,} words (ends of lines included), {f.bytes:,} bytes, {f.tokens:,} tokens, {f.nats:,.1f} nats")
    print(f"  {f.windows:,} windows of {window} tokens, {stride} of them new")
    print(f"  each token was predicted from {f.context} tokens or more, fewer only at the text's start")
    if f.given:
        print("  the first token was not predicted: the model knows no beginning of a text")
    if changes:
        print("  cleaned: " + ", ".join(f"{n:,} {name}" for name, n in changes.items()))


def _window(lm: LM) -> int:
    """As many tokens as the model saw at once in training, as far as is known."""
    longest = int(lm.config.max_positions)
    record = None if lm.path is None else lm.path.parent / "stages" / "pretrain.json"
    if record is not None and record.is_file():
        return min(longest, int(io.read_json(record)["settings"]["context"]))
    return min(longest, _LARGEST_WINDOW)
