"""The public face: `lm = athanor.load("runs/first")`."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from athanor.compress import formats
from athanor.core import io
from athanor.core.config import differences
from athanor.core.device import Precision
from athanor.core.errors import CheckpointError, ConfigError, nearest
from athanor.core.runs import resolve
from athanor.infer.beam import Beams, beam_search
from athanor.infer.engine import Engine
from athanor.infer.params import typed
from athanor.models import _sentence, heads
from athanor.models import io as models
from athanor.models._sentence import HOW, How, Pooling
from athanor.models._token_ids import token_ids
from athanor.models.base import CausalLM, EncoderDecoder, LanguageModel, TokenIds
from athanor.nn.context import Bidirectional, Packed
from athanor.tokenizer import foreign
from athanor.tokenizer.bpe import Tokenizer
from athanor.tokenizer.chat import messages_from, render, template_hash
from athanor.tokenizer.foreign import ForeignTokenizer
from athanor.tokenizer.template import EARLIER
from athanor.tokenizer.vocabulary import Vocabulary
from athanor.types import Completion, Conversation, Request, SamplingParams

MANIFEST = "athanor.json"
_PARAMS = tuple(SamplingParams.__dataclass_fields__)
_BEAMS = tuple(Beams.__dataclass_fields__)
_EMBEDDED_AT_ONCE = 8192  # tokens

Prompt = str | Conversation | Sequence[Mapping[str, Any]]


class LM:
    """A model of any family, with its tokenizer where it has one.

    Attributes:
        model: the module that was trained.
        lineage: hashes of what it came from ({} for a model from elsewhere).
        path: the folder it was loaded from, or None.
        pooling: how texts become vectors; None where the files do not say.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Vocabulary | None,
        lineage: Mapping[str, Any] | None = None,
        path: Path | None = None,
        pooling: Pooling | None = None,
    ) -> None:
        if tokenizer is not None and model.config.vocab_size < tokenizer.vocab_size:
            raise CheckpointError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model's vocabulary {model.config.vocab_size}:"
                " they were not saved together"
            )
        self.model, self.lineage, self.path, self.pooling = model, dict(lineage or {}), path, pooling
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Vocabulary:
        """Its tokenizer. Raises ConfigError when the model came without one."""
        if self._tokenizer is None:
            raise ConfigError(
                f"{self.name} has no tokenizer, so it takes and gives token ids only: put its tokenizer.json into the folder"
            )
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether texts can be given to it."""
        return self._tokenizer is not None

    @property
    def decoder(self) -> CausalLM:
        """The model, where it is decoder-only: what our stages train, align and measure. Raises ConfigError for another."""
        if isinstance(self.model, CausalLM):
            return self.model
        raise ConfigError(
            f"{self.name} ({self.model.model_type}) is of the kind {self.model.kind!r} with the task {self.model.task!r}, and"
            " this is done with decoders that generate: take one"
        )

    @property
    def config(self) -> Any:
        """The architecture's config."""
        return self.model.config

    @property
    def name(self) -> str:
        """What the server calls it: run and checkpoint folder."""
        if self.path is None:
            return "athanor"
        path = self.path.resolve()
        return f"{path.parent.name}/{path.name}"

    def engine(self, max_batch: int = 64, precision: Precision = "fp32", **options: Any) -> Engine:
        """A new engine over this model; `options` are others of `Engine`. Raises ConfigError for one that generates no text."""
        self._check_generates()
        return Engine(self.model, self.tokenizer, max_batch=max_batch, precision=precision, **options)  # type: ignore[arg-type]  # it generates

    def _check_generates(self) -> None:
        if self.model.kind not in ("decoder", "encoder_decoder") or self.model.task != "lm":
            what = "an encoder" if self.model.kind == "encoder" else "a tagger" if self.model.kind == "tagger" else "headless"
            raise ConfigError(
                f"{self.name} ({self.model.model_type}) is {what} and generates no text: use `logits` or `embed`, or a model"
                " with a decoder and its language-model head"
            )

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """A text with the control tokens that belong to it, or a conversation rendered up to the assistant's turn (law L1)."""
        if not isinstance(prompt, (str, Sequence)):
            raise ConfigError(f"the prompt is {prompt!r} and must be a text or a conversation: give one")
        if isinstance(prompt, str):
            ids = self.tokenizer.prompt(prompt)
            begins = self.model.token_ids.bos
            return [begins] if not ids and begins is not None else ids
        return render(self.tokenizer, messages_from(prompt), generation_prompt=True).ids

    def complete(self, prompt: Prompt, **params: Any) -> Completion:
        """Answer with everything known of the answer: ids, log-probabilities, reasoning, finish reason.

        Args:
            prompt: a text to go on from (what an encoder-decoder answers), or a conversation.
            params: fields of SamplingParams. Without `seed` a random one; without `max_tokens` what the context still holds.
                Or with `beams` those of `infer.beam.Beams`: the most probable of many answers, by beam search.

        Raises:
            ConfigError: an unknown parameter, or one of a wrong type. RequestError: one out of range.
        """
        if "beams" in params:
            return self._search(prompt, params)
        for name in params:
            if name not in _PARAMS:
                known = (*_PARAMS, "beams")
                raise ConfigError(f"unknown parameter {name!r}{nearest(name, known)}; there are {', '.join(known)}")
        self._check_generates()
        ids = self.prompt_ids(prompt)
        params.setdefault("seed", secrets.randbits(63))
        params.setdefault("max_tokens", max(1, self._room(ids)))
        if isinstance(params.get("stop"), str):
            params["stop"] = (params["stop"],)
        given = typed(SamplingParams, params)
        # No room for more than is asked for, unless that would be refused.
        room = self._room(ids)
        asked = self._context - room + given.max_tokens if 1 <= given.max_tokens < room else None
        return self.engine(max_batch=1, max_len=asked).generate([Request("0", ids, given)])[0]

    @property
    def _context(self) -> int:
        found: int = getattr(self.config, "cached_positions", self.config.max_positions)
        return found

    def _room(self, ids: Sequence[int]) -> int:
        return self._context - len(self.model.token_ids.start if self.model.kind == "encoder_decoder" else ids)

    def _search(self, prompt: Prompt, params: dict[str, Any]) -> Completion:
        for name in params:
            if name not in _BEAMS:
                raise ConfigError(
                    f"parameter {name!r} does not go with beams{nearest(name, _BEAMS)}; there are {', '.join(_BEAMS)}"
                )
        self._check_generates()
        ids = self.prompt_ids(prompt)
        params.setdefault("max_tokens", max(1, self._room(ids)))
        eos = self.model.token_ids.eos or tuple(x for x in (self.tokenizer.end_id,) if x is not None)
        found = beam_search(self.model, ids, typed(Beams, params), eos)  # type: ignore[arg-type]  # it generates
        text = self._text_after(ids, found.ids[:-1] if found.ids[-1] in eos else found.ids)
        return Completion("0", ids, found.ids, found.logprobs, text, None, "stop" if found.ids[-1] in eos else "length")

    def _text_after(self, ids: Sequence[int], answer: Sequence[int]) -> str:
        pieces = self.tokenizer.pieces(() if self.model.kind == "encoder_decoder" else ids)
        return "".join([*map(pieces.push, answer), pieces.finish()])

    def generate(self, prompt: Prompt, **params: Any) -> str:
        """The text of `complete`: a continuation of a text, or the answer in a conversation (without its reasoning)."""
        return self.complete(prompt, **params).text

    @torch.inference_mode()
    def logits(
        self, ids: Tensor | Sequence[Sequence[int]], decoder_input_ids: Tensor | Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """Logits of whole sequences: ids (B, T) -> (B, T, V) float32.

        Args:
            ids: of a text; for an encoder-decoder, of the source.
            decoder_input_ids: (B, A) what an encoder-decoder answers, whose logits (B, A, V) come out.

        Raises ConfigError when the sequences differ in length, are longer than the context or hold what is no token's id, and
        when `decoder_input_ids` are missing, or given to another family.
        """
        given = self._ids(ids, "ids")
        if isinstance(self.model, EncoderDecoder):
            if decoder_input_ids is None:
                raise ConfigError(
                    f"{self.model.model_type} is an encoder-decoder: give decoder_input_ids, whose logits are wanted, too"
                )
            answers = self._ids(decoder_input_ids, "decoder_input_ids")
            if len(answers) != len(given):
                raise ConfigError(f"ids has {len(given)} rows and decoder_input_ids {len(answers)}: give one for each")
            logits: Tensor = self.model(given, answers)
            return logits.float()
        if decoder_input_ids is not None:
            raise ConfigError(f"{self.model.model_type} has no decoder of its own: leave decoder_input_ids out")
        logits = self.model(given)
        return logits.float()

    def _ids(self, ids: Tensor | Sequence[Sequence[int]], name: str) -> Tensor:
        c = self.config
        return token_ids(ids, name, longest=c.max_positions, vocab_size=c.vocab_size, device=self.model.device)

    @torch.inference_mode()
    def embed(
        self, texts: str | Sequence[str], *, pooling: How | None = None, normalise: bool | None = None, truncate: bool = False
    ) -> Tensor:
        """A vector for each text: N texts -> (N, D) float32.

        What sentence-transformers' files beside the model say is done by default; where there are none, the mean over an
        encoder's tokens or a decoder's last token, scaled to length 1. Of an encoder-decoder the encoder is taken.

        Args:
            texts: N of them.
            pooling: "mean", "cls" (the first token) or "last".
            normalise: whether vectors have the length 1.
            truncate: whether the end of a text that the model cannot take is left out.

        Raises:
            ConfigError: no texts; an unknown pooling; a text that is too long, unless it may be truncated.
        """
        texts = [texts] if isinstance(texts, str) else list(texts) if isinstance(texts, Iterable) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"texts is {texts!r} and must be a text or a list of texts: give these")
        if not texts:
            raise ConfigError("texts is empty: give at least one text")
        if pooling is not None and pooling not in HOW:
            raise ConfigError(f"pooling ({pooling!r}) must be one of {', '.join(HOW)}")
        said = self.pooling or Pooling("last" if self.model.kind == "decoder" else "mean")
        how = Pooling(pooling or said.how, said.normalised if normalise is None else normalise)
        longest = min(said.max_length or self.config.max_positions, self.config.max_positions)
        rows = [self._cut(self.prompt_ids(said.text(text)), longest, i, truncate) for i, text in enumerate(texts)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # rows of like length are read together
        vectors: list[Tensor] = [torch.empty(0)] * len(rows)
        while order:
            batch, tokens = [order.pop()], 0
            while order and tokens + len(rows[order[-1]]) <= _EMBEDDED_AT_ONCE:
                tokens += len(rows[order[-1]])
                batch.append(order.pop())
            for i, vector in zip(batch, self._vectors([rows[i] for i in batch], how), strict=True):
                vectors[i] = vector
        return torch.stack(vectors)

    def _cut(self, ids: list[int], longest: int, i: int, truncate: bool) -> list[int]:
        if not ids:
            raise ConfigError(f"texts[{i}] has no tokens, so it has no vector: leave it out")
        if len(ids) <= longest:
            return ids
        if not truncate:
            raise ConfigError(
                f"texts[{i}] has {len(ids)} tokens and the model takes {longest}: split it, or let its end be left out with"
                " truncate=True"
            )
        # What stands after every text ([SEP], an end) stays.
        end = self.prompt_ids("")
        kept = 1 if len(end) > 1 and end[-1] == ids[-1] else 0
        return [*ids[: longest - kept], *ids[len(ids) - kept :]]

    def _vectors(self, rows: Sequence[Sequence[int]], how: Pooling) -> Tensor:
        device = self.model.device
        lengths = torch.tensor([len(row) for row in rows], device=device)
        ids = torch.tensor([[id for row in rows for id in row]], device=device)
        return heads.embed(self.model, ids, Packed(lengths, causal=self.model.kind == "decoder"), how).cpu()

    def hidden(self, ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Final hidden states of whole sequences (of an encoder-decoder, its encoder's): ids (B, T) -> (B, T, D) float32."""
        given = self._ids(ids, "ids")
        with torch.inference_mode():
            if self.model.kind == "decoder":
                lengths = torch.full((given.shape[0],), given.shape[1], device=given.device)
                return self.model.hidden(given.reshape(1, -1), Packed(lengths)).view(*given.shape, -1).float()
            ctx = Bidirectional(given.shape[0], given.shape[1], given.device)
            trunk = self.model.trunk if isinstance(self.model, heads.Headed) else self.model
            return (trunk.encode if isinstance(trunk, EncoderDecoder) else trunk.hidden)(given, ctx).float()

    def save(self, path: str | Path, **lineage: Any) -> Path:
        """Write a Hugging Face style folder (atomically) and the manifest with the lineage; returns the path."""
        path = Path(path)
        tokenizer = self._tokenizer
        if isinstance(tokenizer, Tokenizer) and self.model.token_ids == TokenIds():
            self.model.token_ids = TokenIds(tokenizer.bos_id, (tokenizer.end_id,), tokenizer.pad_id)
        with io.atomic_dir(path) as folder:
            models.save(self.model, folder, formats.describe(self.model), formats.layout(self.model))
            if tokenizer is not None:
                tokenizer.save(folder)
            if self.pooling is not None:
                self.pooling.save(folder, self.config.d_model)
            io.write_json(folder / MANIFEST, {"format": 1, "lineage": self.lineage | lineage | _hashes(folder, tokenizer)})
        return path


def _hashes(folder: Path, tokenizer: Vocabulary | None) -> dict[str, str | None]:
    """What makes the model what it is: a change of any of these is noticed when it is loaded."""
    return {
        "tokenizer": None if tokenizer is None else tokenizer.hash,
        "template": template_hash() if isinstance(tokenizer, Tokenizer) else None,
        "config": io.sha256_file(folder / "config.json"),
        "weights": models.weights_hash(folder),
    }


def load(
    path: str | Path, checkpoint: str | None = None, *, dtype: torch.dtype | None = None, pickled: bool = False
) -> LM:  # fmt: skip
    """Load a model of any family: a checkpoint folder, ours or of Hugging Face's form, or a run folder's last checkpoint.

    Args:
        path: the folder.
        checkpoint: of a run folder, the one to take.
        dtype: of the weights; as in the file by default.
        pickled: whether pytorch_model.bin is read too where there are no safetensors.

    Raises:
        ConfigError: a path or a dtype that is none.
        CheckpointError: what is there is damaged, altered since it was saved, incomplete, or of no known architecture.
        TokenizerError: a tokenizer that defines none, or whose chat template is another version's.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype ({dtype!r}) must be a floating torch.dtype, such as torch.bfloat16, or None for the file's own")
    folder = resolve(path, checkpoint)
    tokenizer: Vocabulary | None = None
    if foreign.is_ours(folder):
        tokenizer = Tokenizer.load(folder)
    elif foreign.present(folder):
        tokenizer = ForeignTokenizer.load(folder)
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
        now = _hashes(folder, tokenizer)
        if lineage.get("template") in EARLIER and now["template"] is not None:
            lineage = lineage | {"template": now["template"]}  # what it was trained on has the same ids
        changed = differences({k: lineage.get(k) for k in now}, now)
        if changed:
            raise CheckpointError(
                f"{folder}: {' and '.join(changed)} differ from what {MANIFEST} recorded when it was saved: the folder was"
                " altered, truncated or made by another version; copy it again or train it anew"
            )
    model = models.load(folder, formats.prepare, dtype=dtype, pickled=pickled)
    return LM(model, tokenizer, lineage, folder, _sentence.read(folder))
