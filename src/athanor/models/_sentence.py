"""What makes one vector of a text: the files of sentence-transformers beside a model (https://sbert.net).

modules.json lists the steps: the model, a pooling over its hidden states (1_Pooling/config.json), often a scaling to length 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers.normalizers import Lowercase
from torch import Tensor

from athanor.core import io
from athanor.core.errors import CheckpointError
from athanor.nn import spans
from athanor.nn.context import Sequences

How = Literal["mean", "cls", "last"]
HOW: tuple[How, ...] = ("mean", "cls", "last")
_FIELDS = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}
_STEPS = {name: f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize")}
_LIMITS, _PROMPTS = "sentence_bert_config.json", "config_sentence_transformers.json"
_REMEDY = "use another checkpoint, or take `logits` and pool yourself"


@dataclass(frozen=True)
class Pooling:
    """How hidden states become one vector.

    how         "mean" over the tokens, "cls" (the first) or "last"
    normalised  whether vectors have the length 1
    max_length  longest text in tokens, control tokens included; None is what the model takes
    lower       whether texts are read in small letters, whatever the tokenizer does
    """

    how: How = "mean"
    normalised: bool = True
    max_length: int | None = None
    lower: bool = False

    def text(self, text: str) -> str:
        """What the tokenizer is to be given of a text."""
        return Lowercase().normalize_str(text) if self.lower else text

    def __call__(self, hidden: Tensor, ctx: Sequences) -> Tensor:
        """(B, T, D) -> (S, D) float32, a row for each sequence."""
        if self.how == "mean":
            vectors = spans.mean(hidden.float(), ctx)
        else:
            vectors = spans.at(hidden.float(), spans.first(ctx) if self.how == "cls" else spans.last(ctx))
        return torch.nn.functional.normalize(vectors, dim=-1) if self.normalised else vectors

    def save(self, folder: Path, width: int) -> None:
        """Write the files of sentence-transformers; `width` is D."""
        steps = ["Transformer", "Pooling", *(["Normalize"] if self.normalised else [])]
        paths = ["", "1_Pooling", "2_Normalize"]
        modules = [{"idx": i, "name": str(i), "path": paths[i], "type": _STEPS[step]} for i, step in enumerate(steps)]
        io.write_json(folder / "modules.json", modules)
        (folder / "1_Pooling").mkdir(exist_ok=True)
        modes = {field: name == self.how for name, field in _FIELDS.items()}
        io.write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width} | modes)
        limits = {"max_seq_length": self.max_length, "do_lower_case": self.lower}
        if said := {name: value for name, value in limits.items() if value}:
            io.write_json(folder / _LIMITS, said)


def read(folder: Path) -> Pooling | None:
    """What the folder says, or None where it says nothing. Raises CheckpointError for steps that this version does not take."""
    if not (folder / "modules.json").is_file():
        return None
    modules = io.read_json(folder / "modules.json")
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise CheckpointError(f"{folder / 'modules.json'} must be a list of steps: copy it again")
    kinds = [str(m.get("type")).rpartition(".")[2] for m in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise CheckpointError(
            f"{folder / 'modules.json'} has the steps {', '.join(kinds)}, and this version takes Transformer, Pooling and perhaps"
            f" Normalize, in that order: {_REMEDY}"
        )
    place = str(modules[1].get("path"))
    if Path(place).name != place:
        raise CheckpointError(f"{folder / 'modules.json'}: path {place!r} must be the name of a folder inside: copy it again")
    config = _table(folder / place / "config.json")
    chosen = [field for field, value in config.items() if field.startswith("pooling_mode_") and value is True]
    how = [name for name in HOW if chosen == [_FIELDS[name]]]
    if "pooling_mode" in config:  # newer files name it
        how = [name for name in HOW if config["pooling_mode"] in (name, {"last": "lasttoken"}.get(name))]
    if not how:
        raise CheckpointError(
            f"{folder}: the pooling {', '.join(chosen) or config.get('pooling_mode', 'none')} is not one of"
            f" {', '.join(HOW)}: {_REMEDY}"
        )
    if config.get("include_prompt") is False:
        raise CheckpointError(
            f"{folder / place / 'config.json'}: include_prompt is False, and this version pools all tokens of a text: {_REMEDY}"
        )
    prompts = _table(folder / _PROMPTS) if (folder / _PROMPTS).is_file() else {}
    if prompts.get("default_prompt_name") is not None:
        raise CheckpointError(
            f"{folder / _PROMPTS}: default_prompt_name is {prompts['default_prompt_name']!r}, and this version puts no prompt"
            " before texts: make it null, and write the prompt before each text yourself"
        )
    limits = _table(folder / _LIMITS) if (folder / _LIMITS).is_file() else {}
    length, lower = limits.get("max_seq_length"), limits.get("do_lower_case", False)
    if length is not None and (not isinstance(length, int) or length < 1):
        raise CheckpointError(
            f"{folder / _LIMITS}: max_seq_length is {length!r} and must be a positive whole number: copy it again"
        )
    if not isinstance(lower, bool):
        raise CheckpointError(f"{folder / _LIMITS}: do_lower_case is {lower!r} and must be true or false: copy it again")
    return Pooling(how[0], "Normalize" in kinds, length, lower)


def _table(path: Path) -> dict[str, Any]:
    content = io.read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a table: copy it again")
    return content
