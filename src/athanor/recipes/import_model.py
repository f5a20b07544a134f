"""Bring a model from elsewhere into a folder of ours: a Hugging Face folder or hub id of any family, or a llama2.c file.

    athanor import downloads/gpt2 --out runs/gpt2
    athanor import org/name --revision main
    athanor import stories260K.bin --tokenizer tok512.bin --out runs/stories

Every tensor must have its place, and every setting its meaning: what this version would not compute as the authors do is refused.
"""

from __future__ import annotations

import shlex
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from athanor.core import hub, io, weights
from athanor.core.errors import ConfigError
from athanor.lm import LM, load
from athanor.models import _llama2c
from athanor.tokenizer import llama2c
from athanor.tokenizer.bpe import CONFIG_FILE, TOKENIZER_FILE, Tokenizer

COMMAND = "import"
POSITIONAL = ("source",)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Config:
    source: str
    """A folder with config.json and weights, an id `org/name` of the Hugging Face hub, or a .bin file of llama2.c."""
    out: Path | None = None
    """The new folder; `runs/` and the source's name by default."""
    tokenizer: Path | None = None
    """For a llama2.c file: its tokenizer.bin; by default the only tok*.bin beside it."""
    revision: str | None = None
    """For a hub id: branch, tag or commit."""
    pickled: bool = False
    """Whether to read pytorch_model.bin where there are no safetensors. Nothing in it is run."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights; as in the files by default."""


def main(config: Config) -> None:
    source = Path(config.source)
    is_file = source.is_file()
    if config.tokenizer is not None and not is_file:
        raise ConfigError(f"tokenizer ({config.tokenizer}) is for llama2.c files, and {source} is none: leave it out")
    if config.revision is not None and source.exists():
        raise ConfigError(f"revision ({config.revision}) is for ids of the hub, and {source} is here: leave it out")
    out = config.out or Path("runs", source.stem if is_file else source.resolve().name)
    if source.exists() and out.resolve() == source.resolve():
        raise ConfigError(f"out ({out}) is the source itself, which would be lost: name a new folder")
    io.check_new(out)  # before anything is fetched
    with ExitStack() as stack:
        if is_file:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            _unpack(source, config.tokenizer, folder)
        elif source.is_dir():
            folder = source
        else:
            folder = hub.fetch(config.source, config.revision, pickled=config.pickled)
        lm = load(folder, dtype=DTYPES[config.dtype] if config.dtype else None, pickled=config.pickled)
        lm.path = None
        with io.new_place(out):
            lm.save(out, parent=None, source=config.source if not source.exists() else source.name)
    _show(load(out), out)


def _unpack(source: Path, vocabulary: Path | None, folder: Path) -> None:
    """A llama2.c file as a folder of Hugging Face's form."""
    fields, tensors = _llama2c.read(source)
    if vocabulary is None:
        found = sorted(source.parent.glob("tok*.bin"))
        if len(found) != 1:
            raise ConfigError(
                f"{source.parent} has {len(found)} files tok*.bin beside {source.name}: say with --tokenizer which one has its"
                " vocabulary"
            )
        vocabulary = found[0]
    unk, bos, eos = llama2c.SPECIAL
    io.atomic_write(folder / TOKENIZER_FILE, llama2c.read(vocabulary, fields["vocab_size"]))
    names = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "clean_up_tokenization_spaces": False}
    io.write_json(folder / CONFIG_FILE, {"tokenizer_class": "PreTrainedTokenizerFast"} | names)
    io.write_json(folder / "config.json", fields)
    weights.save_sharded(folder, tensors, {"format": "pt"})


def _show(lm: LM, out: Path) -> None:
    kind = "ours" if lm.has_tokenizer and isinstance(lm.tokenizer, Tokenizer) else "its own" if lm.has_tokenizer else "none"
    dtype = str(next(lm.model.parameters()).dtype).removeprefix("torch.")
    print(f"{lm.model.model_type}: {lm.model.n_parameters():,} parameters in {dtype}, tokenizer: {kind}; in {out}")
    print(f"  {shlex.join(['athanor', 'inspect', str(out)])}")
    print(f"  {shlex.join(['athanor', 'verify', str(out)])}")
    if lm.has_tokenizer:
        generates = lm.model.kind in ("decoder", "encoder_decoder") and lm.model.task == "lm"
        said = "generate('Once', max_tokens=50)" if generates else "embed(['a text']).shape"
        program = f"import athanor; print(athanor.load({str(out)!r}).{said})"
        # It has single quotes itself, so double ones around it read better; a path may hold what means something in these.
        print("  python -c", shlex.quote(program) if set(program) & set('"$`!\\') else f'"{program}"')
