"""The public face: `lm = athanor.load("runs/first")`."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from athanor.compress import formats
from athanor.core import io
from athanor.core.config import differences
from athanor.core.device import Precision
from athanor.core.errors import CheckpointError, ConfigError, nearest
from athanor.infer.engine import Engine
from athanor.models import io as models
from athanor.models.base import CausalLM
from athanor.tokenizer.bpe import Tokenizer
from athanor.tokenizer.chat import messages_from, render, template_hash
from athanor.types import Completion, Conversation, Request, SamplingParams

MANIFEST = "athanor.json"
_PREFERRED = ("rl", "sft", "base")  # which checkpoint of a run answers when none is named
_PARAMS = tuple(SamplingParams.__dataclass_fields__)


class LM:
    """A model with its tokenizer, ready to answer.

    Attributes:
        model: the module that was trained.
        tokenizer: its tokenizer.
        lineage: hashes of what it came from ({} for a model from elsewhere).
        path: the folder it was loaded from, or None.
    """

    def __init__(
        self, model: CausalLM, tokenizer: Tokenizer, lineage: Mapping[str, Any] | None = None, path: Path | None = None
    ) -> None:
        if model.config.vocab_size < tokenizer.vocab_size:
            raise CheckpointError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model's vocabulary {model.config.vocab_size}:"
                " they were not saved together"
            )
        self.model, self.tokenizer, self.lineage, self.path = model, tokenizer, dict(lineage or {}), path

    @property
    def config(self) -> Any:
        """The architecture's config."""
        return self.model.config

    @property
    def name(self) -> str:
        """What the server calls it: run and checkpoint folder."""
        return f"{self.path.parent.name}/{self.path.name}" if self.path else "athanor"

    def engine(self, max_batch: int = 64, precision: Precision = "fp32") -> Engine:
        """A new engine over this model."""
        return Engine(self.model, self.tokenizer, max_batch=max_batch, precision=precision)

    def prompt_ids(self, prompt: str | Conversation | Sequence[Mapping[str, Any]]) -> list[int]:
        """A text after the beginning-of-text token, or a conversation rendered up to the assistant's turn (law L1)."""
        if isinstance(prompt, str):
            return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
        return render(self.tokenizer, messages_from(prompt), generation_prompt=True).ids

    def complete(self, prompt: str | Conversation | Sequence[Mapping[str, Any]], **params: Any) -> Completion:
        """Answer with everything known of the answer: ids, log-probabilities, reasoning, finish reason.

        Args:
            prompt: a text to go on from, or a conversation.
            params: fields of SamplingParams. Without `seed` a random one; without `max_tokens` what the context still holds.

        Raises:
            ConfigError: an unknown parameter. RequestError: one out of range.
        """
        for name in params:
            if name not in _PARAMS:
                raise ConfigError(f"unknown parameter {name!r}{nearest(name, _PARAMS)}; there are {', '.join(_PARAMS)}")
        ids = self.prompt_ids(prompt)
        params.setdefault("seed", secrets.randbits(63))
        params.setdefault("max_tokens", max(1, self.config.max_positions - len(ids)))
        if isinstance(params.get("stop"), str):
            params["stop"] = (params["stop"],)
        return self.engine(max_batch=1).generate([Request("0", ids, SamplingParams(**params))])[0]

    def generate(self, prompt: str | Conversation | Sequence[Mapping[str, Any]], **params: Any) -> str:
        """The text of `complete`: a continuation of a text, or the answer in a conversation (without its reasoning)."""
        return self.complete(prompt, **params).text

    @torch.inference_mode()
    def logits(self, ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Logits of whole sequences: ids (B, T) -> (B, T, V) float32.

        Raises ConfigError when the sequences differ in length, are longer than the context or hold ids that are no tokens.
        """
        try:
            tensor = torch.as_tensor(ids, dtype=torch.int64, device=self.model.device)
        except ValueError as error:
            raise ConfigError(f"ids must be sequences of one length ({error}): give those of another length apart") from error
        if tensor.ndim != 2 or not tensor.numel():
            raise ConfigError(f"ids has shape {tuple(tensor.shape)} and must be (batch, time): wrap one sequence in a list")
        if tensor.shape[1] > self.config.max_positions:
            raise ConfigError(f"ids has {tensor.shape[1]} tokens and the context holds {self.config.max_positions}: shorten it")
        if int(tensor.min()) < 0 or int(tensor.max()) >= self.config.vocab_size:
            raise ConfigError(f"ids must lie in [0, {self.config.vocab_size}): they were made by another tokenizer")
        logits: Tensor = self.model(tensor)
        return logits.float()

    def save(self, path: str | Path, **lineage: Any) -> Path:
        """Write a Hugging Face style folder (atomically) and the manifest with the lineage; returns the path."""
        path = Path(path)
        with io.atomic_dir(path) as folder:
            models.save(self.model, folder, formats.describe(self.model), formats.layout(self.model))
            self.tokenizer.save(folder)
            weights = io.sha256_file(folder / models.WEIGHTS)
            config = io.sha256_file(folder / "config.json")
            own = {"tokenizer": self.tokenizer.hash, "template": template_hash(), "config": config, "weights": weights}
            io.write_json(folder / MANIFEST, {"format": 1, "lineage": self.lineage | lineage | own})
        return path


def resolve(path: str | Path, checkpoint: str | None = None) -> Path:
    """The checkpoint folder that `path` means: itself, or the last of the life in a run folder, or the one named."""
    path = Path(path)
    if checkpoint is None and (path / "config.json").is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: give a checkpoint folder or a run folder such as runs/first")
    found = sorted(p.parent.name for p in path.glob("*/config.json"))
    if checkpoint is not None:
        if checkpoint not in found:
            raise CheckpointError(
                f"{path} has no checkpoint {checkpoint!r}{nearest(checkpoint, found)}; it has {', '.join(found) or 'none'}"
            )
        return path / checkpoint
    for name in _PREFERRED:
        if name in found:
            return path / name
    raise CheckpointError(f"{path} has no checkpoint yet (no */config.json): let `athanor run --out {path}` finish its stages")


def load(path: str | Path, checkpoint: str | None = None) -> LM:
    """Load a checkpoint folder, or a run folder's last checkpoint (or the one named `checkpoint`).

    Raises:
        CheckpointError: what is there is damaged, altered since it was saved or incomplete.
        TokenizerError: its vocabulary is not ours, or its chat template is another version's.
    """
    folder = resolve(path, checkpoint)
    tokenizer = Tokenizer.load(folder)
    lineage: dict[str, Any] = {}
    if (folder / MANIFEST).exists():
        manifest = io.read_json(folder / MANIFEST)
        if not isinstance(manifest, dict) or manifest.get("format") != 1 or not isinstance(manifest.get("lineage"), dict):
            found = manifest.get("format") if isinstance(manifest, dict) else None
            raise CheckpointError(
                f"{folder / MANIFEST} has format {found!r}, and this version reads format 1 with a lineage: use the version"
                " that wrote it, or save the model anew"
            )
        lineage = manifest["lineage"]
        now = {
            "config": io.sha256_file(folder / "config.json"),
            "weights": io.sha256_file(folder / models.WEIGHTS) if (folder / models.WEIGHTS).is_file() else None,
            "template": template_hash(),
            "tokenizer": tokenizer.hash,
        }
        changed = differences({k: lineage.get(k) for k in now}, now)
        if changed:
            raise CheckpointError(
                f"{folder}: {' and '.join(changed)} differ from what {MANIFEST} recorded when it was saved: the folder was"
                " altered, truncated or made by another version; copy it again or train it anew"
            )
    return LM(models.load(folder, formats.prepare), tokenizer, lineage, folder)
