"""Write a model for other programs: a Hugging Face folder, or a GGUF file for llama.cpp, and read it back (law L7).

athanor export runs/first --to hf --out first-hf
athanor export runs/first --to gguf --kind q8_0
"""

from __future__ import annotations

import tempfile
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch

from athanor.compress import formats
from athanor.core import io
from athanor.core.errors import ConfigError, VerificationError
from athanor.evals import laws
from athanor.lm import LM, MANIFEST, load
from athanor.models import _gguf

POSITIONAL = ("path",)
# Of GGUF files read back, by kind: the largest root mean square difference of logits, as a share of their standard deviation.
_ALLOWED = {"f32": 1e-3, "f16": 1e-2, "bf16": 3e-2, "q8_0": 0.1, "q4_0": 1.0}
# Fields of config.json that llama.cpp knows from the file in its own way, and transformers takes for its own defaults.
_UNREAD = {
    "gemma2": ("query_pre_attn_scalar", "layer_types", "attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3_text": ("query_pre_attn_scalar", "layer_types", "rope_parameters", "final_logit_softcapping"),
}


@dataclass(frozen=True)
class Config:
    path: Path
    """A checkpoint folder, or a run folder (its last checkpoint)."""
    to: Literal["hf", "gguf"]
    """hf: config.json, safetensors and tokenizer, as transformers and vLLM read them; gguf: one file for llama.cpp."""
    out: Path | None = None
    """The new folder or file; by default beside the checkpoint."""
    checkpoint: str | None = None
    """Which checkpoint of a run folder: base, sft, rl, int8, int4 ...; by default the run's own choice."""
    kind: _gguf.Kind | None = None
    """Of the matrices in a GGUF file: f32, f16 (the default), bf16, q8_0 or q4_0."""


def main(config: Config) -> None:
    if config.to == "hf" and config.kind is not None:
        raise ConfigError(
            f"kind ({config.kind}) is for GGUF files, and to is hf: leave it out, or make a smaller model with `athanor quantize`"
        )
    lm = load(config.path, config.checkpoint)
    assert lm.path is not None, "what was loaded has a path"
    kind = config.kind or "f16"
    suffix = f"-{kind}.gguf" if config.to == "gguf" else "-hf"
    out = config.out or lm.path.parent / (lm.path.name + suffix)
    with io.new_place(out):
        if config.to == "hf":
            _hugging_face(lm, out)
        else:
            _to_gguf(lm, out, kind)


def _probe(lm: LM) -> list[int]:
    tokenizer = lm.tokenizer if lm.has_tokenizer else None
    probes = laws.sequences(tokenizer, min(lm.config.max_positions, 64), lm.config.vocab_size)
    return laws.readable(lm.model, max((s.ids for s in probes), key=len))


def _hugging_face(lm: LM, out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        saved = lm.save(Path(folder, "model"))
        (saved / MANIFEST).unlink()  # ours alone
        ids, quantised = _probe(lm), bool(formats.describe(lm.model))
        exact = lm.model if next(lm.model.parameters()).dtype == torch.float32 else load(saved, dtype=torch.float32).model
        findings = [
            laws.same_logits("read back", laws.outputs(lm.model), laws.outputs(load(saved).model), ids, exactly=True),
            laws.same_in_transformers(exact, saved, quantised, ids),
        ]
        for f in findings:
            if not f.passed:
                raise VerificationError(
                    f"{f.compared} differ by {f.value:.3g}, and {f.tolerance:g} is allowed: nothing was written"
                )
        saved.rename(out)
    print(f"{out}: {sum(p.stat().st_size for p in out.iterdir() if p.is_file()):,} bytes")
    for f in findings:
        print(f"  {f.compared}: {f'skipped, {f.skipped}' if f.skipped else f'{f.value:.2g} apart'}")


def _to_gguf(lm: LM, out: Path, kind: _gguf.Kind) -> None:
    if formats.describe(lm.model):
        raise ConfigError(f"{lm.name} is quantised: export the checkpoint that it was made from, which --kind quantises anew")
    fields = io.read_json(lm.path / "config.json") if lm.path else {}
    folder = lm.path if lm.has_tokenizer else None
    with io.atomic_file(out) as file:  # so that nothing stands there which was not read back
        notes = [*_gguf.write(file, fields, lm.model.to_hf(lm.model.state_dict()).items(), folder, kind)]
        found = _read_back(lm, file, notes)
        if isinstance(found, float) and not found <= _ALLOWED[kind]:
            raise VerificationError(
                f"transformers reads logits from the file that differ by {found:.3g} of their standard deviation, and"
                f" {_ALLOWED[kind]:g} is allowed: nothing was written"
            )
    print(f"{out}: {out.stat().st_size:,} bytes")
    said = found if isinstance(found, str) else f"logits differ by {found:.2g} of their standard deviation"
    print(f"  read back by transformers: {said}")
    for note in notes:
        print(f"  note: {note}")


def _read_back(lm: LM, file: Path, notes: list[str]) -> float | str:
    """How far the file's logits are from the model's, or why they were not compared; adds to `notes` how they were."""
    if not find_spec("transformers"):
        return "skipped, transformers is not installed"
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    told = {name: lm.model.fields[name] for name in _UNREAD.get(lm.model.model_type, ()) if lm.model.fields.get(name)}
    if told:
        notes.append(f"transformers does not read {', '.join(told)} from such files: it was told")
    try:
        with redirect_stderr(StringIO()):  # a progress bar
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True, **told
            )
    except (ValueError, NotImplementedError, KeyError) as error:
        return f"skipped, it does not read such files ({str(error).splitlines()[0]:.120})"
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        return "skipped, it does not read such files (it takes some sizes for those of its own defaults)"
    theirs, report = loaded
    if report["missing_keys"]:  # it goes on with random weights in their place
        return f"skipped, it finds no place for {len(report['missing_keys'])} tensors of such a file"
    probe = _probe(lm)
    within = min(len(probe), _gguf.context(file))
    if within < len(probe):
        notes.append(f"read back within {within} tokens, which is all that the file says its model takes")
    ids = torch.tensor([probe[:within]])
    with torch.inference_mode():
        ours, others = lm.model(ids).float(), theirs.eval()(ids).logits
    return float((ours - others).square().mean().sqrt() / ours.std())
