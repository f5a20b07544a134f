"""How transformers lays the heads of `heads.py` down in files: the names of their tensors, and the fields of config.json.

A family that this file does not name has the heads of its kind. `test_heads.py` holds every line to transformers' classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from athanor.core.errors import CheckpointError, ConfigError
from athanor.models.base import LanguageModel
from athanor.models.fields import Fields
from athanor.models.keys import Entry

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True)
class Names:
    """Where a head of a family lies in a file.

    out           the matrix that makes the logits
    dense         the matrix before it, whose outputs go through tanh; None where there is none
    bias          whether `out` has a bias
    prefix        what the names of the trunk begin with; None is as in the family's other files
    encoder_only  whether the trunk of an encoder-decoder lacks its decoder
    """

    out: str
    dense: str | None = None
    bias: bool = True
    prefix: str | None = None
    encoder_only: bool = False


Family = dict[str, Names]  # by task

_QUESTION: Family = {"question": Names("qa_outputs")}
_OLD_QUESTION: Family = {"question": Names("qa_outputs", prefix="transformer.")}
_SEQUENCE: Family = {"sequence": Names("score", bias=False)}
_DECODER: Family = _SEQUENCE | {"token": Names("score")}
_ENCODER: Family = {"token": Names("classifier")} | _QUESTION
_DENSE = Names("classification_head.out_proj", "classification_head.dense")

_KINDS: dict[str, Family] = {
    "decoder": _DECODER | _QUESTION,
    "encoder": _ENCODER | {"sequence": Names("classifier.out_proj", "classifier.dense")},
}
_FAMILIES: dict[str, Family] = {
    "bert": _ENCODER | {"sequence": Names("classifier", "bert.pooler.dense")},
    "gpt2": _SEQUENCE | {"token": Names("classifier")} | _QUESTION,
    "llama": _DECODER | _OLD_QUESTION,
    "qwen2": _DECODER | _OLD_QUESTION,
    "qwen3": _DECODER | _OLD_QUESTION,
    "qwen3_moe": _DECODER | _OLD_QUESTION,
    "gemma2": _DECODER,
    "gemma3_text": _SEQUENCE,
    "phi3": _DECODER,
    "deepseek_v3": _DECODER,
    "bart": {"sequence": _DENSE} | _QUESTION,
    "t5": {
        "sequence": replace(_DENSE, prefix="transformer."),
        "token": Names("classifier", prefix="transformer.", encoder_only=True),
    }
    | _QUESTION,
}
_STEMS = {"gemma3_text": "Gemma3Text"}  # where classes with a head are not named as the language model is


def names_of(trunk: LanguageModel, task: str) -> Names:
    """Where the head of a task lies in files of this family. Raises ConfigError when it has no such head."""
    family = _FAMILIES.get(trunk.model_type, _KINDS.get(trunk.kind, {}))
    if task not in family:
        there = f"it has {', '.join(sorted(family))}" if family else "it has none"
        raise ConfigError(f"a {trunk.model_type} has no head {task!r} in transformers ({there}): take another family or head")
    return family[task]


def class_of(trunk: LanguageModel, suffix: str) -> str:
    """What `architectures` calls this family with the head of classes that end in `suffix`."""
    language_model = trunk.config.to_hf()["architectures"][0]
    return _STEMS.get(trunk.model_type, re.sub(r"(For[A-Z]\w*|LMHeadModel)$", "", language_model)) + suffix


def begun(name: str, old: str, new: str) -> str:
    """`name` with `new` in the place of `old` at its beginning; names that begin otherwise stay."""
    return new + name.removeprefix(old) if name.startswith(old) else name


@dataclass(frozen=True, eq=False)
class Moved(Entry):
    """Another entry of a key map, whose modules' names begin with `new` instead of `old`."""

    inner: Entry
    old: str
    new: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(begun(name, self.old, self.new) for name in self.inner.names)

    def parts(self, leaf: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        for name, part in self.inner.parts(leaf, tensor):
            yield begun(name, self.old, self.new), part

    def written(self, leaf: str, tensor: Tensor) -> Tensor:
        return self.inner.written(leaf, tensor)

    def settle(self, leaf: str, tensor: Tensor) -> None:
        self.inner.settle(leaf, tensor)


@dataclass(frozen=True)
class Labels:
    """What the logits of a classifier stand for.

    names    of the labels, in the order of the logits
    problem  "regression", "single_label_classification" or "multi_label_classification"; None is the first for one label, the
             second where whole numbers are given as labels, and else the third
    """

    names: tuple[str, ...]
    problem: str | None = None

    def __post_init__(self) -> None:
        if not self.names:
            raise ConfigError("labels (0) must be at least 1: give a number, or a name for each")
        if self.problem is not None and self.problem not in PROBLEMS:
            raise ConfigError(f"problem_type ({self.problem!r}) must be one of {', '.join(PROBLEMS)}, or None")
        if self.problem == PROBLEMS[1] and len(self.names) == 1:
            raise ConfigError(
                f"problem_type ({self.problem!r}) needs at least 2 labels, and there is 1: use 2 for yes and no, or 'regression'"
            )

    @classmethod
    def of(cls, labels: int | Sequence[str], problem: str | None = None) -> Labels:
        """So many, or those of these names. Raises ConfigError for names that config.json could not hold, or tell apart."""
        if isinstance(labels, int) and not isinstance(labels, bool):
            return cls.numbered(labels, problem)
        names = tuple(labels) if isinstance(labels, Sequence) and not isinstance(labels, str) else None
        if names is None or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
            raise ConfigError(f"labels ({labels!r}) must be a number, or names that differ and are not empty: ['no', 'yes']")
        return cls(names, problem)

    @classmethod
    def numbered(cls, n: int, problem: str | None = None) -> Labels:
        """n labels that have no names but their numbers, as transformers writes them."""
        if n < 1:
            raise ConfigError(f"labels ({n}) must be at least 1: give a number, or a name for each")
        return cls(tuple(f"LABEL_{i}" for i in range(n)), problem)

    @property
    def n(self) -> int:
        """How many logits there are."""
        return len(self.names)

    def to_hf(self) -> dict[str, Any]:
        """The fields of config.json."""
        numbers = {name: i for i, name in enumerate(self.names)}
        fields = {"id2label": {str(i): name for i, name in enumerate(self.names)}, "label2id": numbers}
        return fields | ({} if self.problem is None else {"problem_type": self.problem})

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Labels:
        """From the fields of config.json; without any there are two. Raises CheckpointError for labels that are none."""
        fields = Fields(values, "classifier")
        names, problem = fields.table("id2label", None), fields.str("problem_type", None)
        try:
            if names is None:
                return cls.numbered(fields.int("num_labels", 2), problem)
            numbers = [str(i) for i in range(len(names))]
            if names.keys() != set(numbers) or not all(isinstance(name, str) for name in names.values()):
                raise CheckpointError(
                    f"config.json: id2label is {names!r} and must map the numbers from 0 on to names: copy it again"
                )
            return cls(tuple(names[i] for i in numbers), problem)
        except ConfigError as error:
            raise CheckpointError(f"config.json: {error}") from error


FIELDS = ("architectures", "id2label", "label2id", "num_labels", "problem_type")  # that say which head there is
