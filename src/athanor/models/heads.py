"""Heads for tasks on the trunk of any family: sequence and token classification, extractive question answering, values, rewards.

| task       | one answer for  | transformers' classes        | loss                                                      |
| ---------- | --------------- | ---------------------------- | --------------------------------------------------------- |
| "sequence" | each sequence   | ...ForSequenceClassification | cross-entropy, squares or yes-or-no, as problem_type says |
| "token"    | each token      | ...ForTokenClassification    | cross-entropy                                             |
| "question" | each sequence   | ...ForQuestionAnswering      | cross-entropy of the answer's first and last token        |

A pair of texts is one sequence, "a [SEP] b", with `pair_segments` where the family has segments; or two vectors (`embed`) and
their `similarity`. A reward model is a sequence head of one label on a decoder, and a value model reads it at every token.

A new head is a subclass of `Head` here, a place in HEADS, and a line in `_head_names.py` for each family that has it.

Legend: B batch, T time, S sequences, N tokens laid end to end, D width, L labels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athanor.core.errors import CheckpointError, ConfigError, DataError, NoTargetsError, nearest
from athanor.models._head_answers import answering, best_spans, last_of_text, pair_segments, similarity
from athanor.models._head_names import FIELDS, PROBLEMS, Labels, Moved, Names, begun, class_of, names_of
from athanor.models._sentence import Pooling
from athanor.models.base import Encoder, EncoderDecoder, LanguageModel
from athanor.models.keys import Entry, entry
from athanor.nn import spans
from athanor.nn.context import Bidirectional, Causal, Context, Sequences
from athanor.types import IGNORE

__all__ = ["HEADS", "Head", "Headed", "Labels", "attach", "best_spans", "embed", "named", "pair_segments", "similarity"]

Loss = tuple[Tensor, int, dict[str, Tensor]]


class Head(nn.Module):
    """Logits of hidden states: out(h), or out(tanh(dense(h))) where the family has a dense layer before.

    Args:
        width: D.
        labels: what the logits stand for.
        names: how the family lays it down.

    Class attributes:
        task: its name.
        suffix: what transformers' classes with this head end in.
        pools: whether it reads one token of each sequence: an encoder's first, a decoder's last that is not the padding's id
            (as in transformers), the last end of text that the decoder of an encoder-decoder reads; else every token.
    """

    task: ClassVar[str]
    suffix: ClassVar[str]
    pools: ClassVar[bool] = False

    def __init__(self, width: int, labels: Labels, names: Names) -> None:
        super().__init__()
        self.labels = labels
        self.dense = None if names.dense is None else nn.Linear(width, width)
        self.out = nn.Linear(width, labels.n, bias=names.bias)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights: matrices normal with std 0.02, biases zero."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            else:
                p.normal_(std=0.02, generator=generator)

    def forward(self, hidden: Tensor) -> Tensor:  # (.., D) -> (.., L)
        logits: Tensor = self.out(hidden if self.dense is None else self.dense(hidden).tanh())
        return logits

    def loss(self, logits: Tensor, targets: Tensor, ctx: Sequences) -> Loss:
        """(sum, count, metrics) in the house's convention; the mean is what transformers' class gives for these labels."""
        raise NotImplementedError  # every head defines it


class SequenceHead(Head):
    """Logits of each sequence: (S, L)."""

    task, suffix, pools = "sequence", "ForSequenceClassification", True

    def loss(self, logits: Tensor, targets: Tensor, ctx: Sequences) -> Loss:
        """What problem_type says, summed: logits (S, L).

        | problem_type                | targets                                       | summed                  | count         |
        | --------------------------- | --------------------------------------------- | ----------------------- | ------------- |
        | regression                  | (S, L), or (S,) for one label                 | (logit - target)^2      | of logits     |
        | single_label_classification | (S,) int64, IGNORE where none is known        | -log softmax(logits)[t] | of targets    |
        | multi_label_classification  | (S, L), the probability that each label holds | cross-entropy of each   | of logits     |

        Metrics: `correct`, how many were right (no regression).

        Raises:
            DataError: targets of another shape, or that are no labels. NoTargetsError: all are IGNORE.
        """
        whole = not targets.is_floating_point()
        problem = self.labels.problem or PROBLEMS[0 if self.labels.n == 1 else 1 if whole else 2]
        if problem == PROBLEMS[1]:
            return _cross_entropy(logits, targets)
        if self.labels.n == 1 and targets.ndim == 1:
            targets = targets.unsqueeze(1)
        _check_shape(targets, logits.shape, f"for {problem}")
        if problem == PROBLEMS[0]:
            return (logits.float() - targets.float()).square().sum(), targets.numel(), {}
        if bool(((targets < 0) | (targets > 1)).any()):
            raise DataError("targets of several labels must lie in [0, 1]: give 1 for each label that holds and 0 for the others")
        total = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="sum")
        return total, targets.numel(), {"correct": ((logits > 0) == (targets > 0.5)).sum()}


class TokenHead(Head):
    """Logits of each token: (B, T, L)."""

    task, suffix = "token", "ForTokenClassification"

    def loss(self, logits: Tensor, targets: Tensor, ctx: Sequences) -> Loss:
        """Sum of -log softmax(logits)[target]: logits (B, T, L), targets (B, T) int64, IGNORE where none is known (padding too).

        Metrics: `correct`, how many were right.

        Raises:
            DataError: targets of another shape, or that are no labels. NoTargetsError: all are IGNORE.
        """
        return _cross_entropy(logits, targets)


class QuestionHead(Head):
    """Logits that a token begins the answer, and that it ends it: (B, T, 2)."""

    task, suffix = "question", "ForQuestionAnswering"

    def loss(self, logits: Tensor, targets: Tensor, ctx: Sequences) -> Loss:
        """Sum of -log p(start) and -log p(end), p a softmax over the sequence's own tokens: logits (B, T, 2).

        The mean over all starts and ends that are known is transformers' mean of two means, unless of some answers only one end
        is known. transformers lets padding have a part of p; here it has none.

        Args:
            targets: (S, 2) int64, the answer's first and last token as positions in its sequence; those past its end (an answer
                that was cut off) are not known, and 0 is usual where there is no answer.

        Metrics: `correct`, how many were right.

        Raises:
            DataError: targets of another shape, below 0, or whose start comes after the end. NoTargetsError: none is known.
        """
        rows, lengths = spans.rows_of(logits.float(), ctx)
        _check_shape(targets, torch.Size((len(lengths), 2)), "a start and an end for each sequence")
        wrong = (targets[:, 0] < 0) | (targets[:, 0] > targets[:, 1])
        if bool(wrong.any()):
            i = int(wrong.int().argmax())
            raise DataError(f"targets[{i}] is {targets[i].tolist()} and must be a start of 0 or more and an end not before it")
        known = torch.where(targets < lengths[:, None], targets, IGNORE)
        after = torch.arange(rows.shape[1], device=rows.device) >= lengths[:, None]
        return _cross_entropy(rows.masked_fill(after.unsqueeze(2), -torch.inf).transpose(1, 2), known)


HEADS: dict[str, type[Head]] = {head.task: head for head in (SequenceHead, TokenHead, QuestionHead)}


def _check_shape(targets: Tensor, shape: torch.Size, what: str) -> None:
    if targets.shape != shape:
        raise DataError(f"targets have the shape {tuple(targets.shape)} and must have {tuple(shape)}, {what}: give one for each")


def _cross_entropy(logits: Tensor, targets: Tensor) -> Loss:
    _check_shape(targets, logits.shape[:-1], "whole numbers")
    known = targets != IGNORE
    if targets.is_floating_point() or bool(((targets < 0) | (targets >= logits.shape[-1]))[known].any()):
        raise DataError(
            f"targets must be whole numbers in [0, {logits.shape[-1]}), or {IGNORE} where none is known: these belong to another"
            " head, or to another problem_type"
        )
    count = int(known.sum())
    if not count:
        raise NoTargetsError(f"none of the {targets.numel()} targets is known, so there is nothing to learn: leave them out")
    flat = logits.float().flatten(0, -2)
    total = F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return total, count, {"correct": ((flat.argmax(1) == targets.flatten()) & known.flatten()).sum()}


class Headed(LanguageModel):
    """A trunk with a head: made by `attach` from any model, or by `models.io.load` from a file that has one.

    Attributes:
        trunk: the model without its own logits.
        head: one of HEADS.
    """

    lm_modules = ()

    def __init__(self, trunk: LanguageModel, head: type[Head], labels: Labels) -> None:
        super().__init__()
        self._names = names_of(trunk, head.task)
        self.trunk, self.head = trunk, head(trunk.config.d_model, labels, self._names)
        self.config, self.task = trunk.config, head.task
        self.model_type, self.kind = trunk.model_type, trunk.kind  # type: ignore[misc]  # of a class, but here of its trunk
        self.renamed = trunk.renamed  # type: ignore[misc]
        self.exact, self.float16 = trunk.exact, trunk.float16  # type: ignore[misc]  # likewise
        self.idle = tuple("trunk." + pattern for pattern in trunk.idle)  # type: ignore[misc]
        self._prefixes = trunk.prefix, trunk.prefix if self._names.prefix is None else self._names.prefix
        moved = re.escape(self._prefixes[1])
        self.harmless = tuple(x for p in trunk.harmless for x in (p, moved + p))  # type: ignore[misc]
        self.token_ids, self.fields = trunk.token_ids, trunk.fields

    def become(self, architecture: str, holds: Callable[[str], bool]) -> None:
        self.trunk.become(architecture, lambda name: holds(begun(name, *self._prefixes)))
        self.trunk.behead()
        trunk: Any = self.trunk
        if self._names.encoder_only:
            trunk.decoder = None
        pooler = getattr(trunk, "pooler", None)
        if pooler is not None and entry(trunk.keys()["pooler"]).names == (self._names.dense,):
            self.head.dense, trunk.pooler = pooler, None  # BERT's pooler is the head's dense layer
        self.token_ids = trunk.token_ids

    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights: the trunk's, then the head's."""
        self.trunk.initialise(generator)
        self.head.initialise(generator)

    def hidden(self, ids: Tensor, ctx: Context) -> Tensor:
        return self.trunk.hidden(ids, ctx)

    @property
    def output_weight(self) -> Tensor:
        return self.trunk.output_weight

    def read(self, ids: Tensor, ctx: Sequences, segments: Tensor | None = None) -> Tensor:
        """What the head reads of every token: ids (B, T) -> (B, T, D). Arguments and errors as in `forward`."""
        if segments is not None and not isinstance(self.trunk, Encoder):
            raise ConfigError(f"a {self.model_type} has no segments: leave them out, and mark the second text by tokens")
        if isinstance(self.trunk, Encoder):
            return self.trunk.hidden(ids, ctx, segments)
        if not isinstance(self.trunk, EncoderDecoder):
            return self.trunk.hidden(ids, ctx)
        encoded = self.trunk.encode(ids, ctx)
        if self._names.encoder_only:
            return encoded
        begin = self.token_ids.decoder_start
        if begin is None:
            raise ConfigError(f"this {self.model_type} does not say what its answers begin with: set token_ids.decoder_start")
        answer = ids.flatten().roll(1)
        answer[spans.first(ctx)] = begin
        return self.trunk.hidden(answer.view_as(ids), answering(ctx, encoded))

    def forward(self, ids: Tensor, ctx: Sequences | None = None, segments: Tensor | None = None) -> Tensor:
        """The head's logits: ids (B, T) int64 -> (S, L), or (B, T, L) of a head that does not pool.

        An encoder-decoder reads the text twice, its decoder from `token_ids.decoder_start` on, as BART does (Lewis et al. 2020,
        section 3.1); for classes of tokens the encoder's reading is all.

        Args:
            ids: of whole sequences.
            ctx: any context of whole sequences, of the encoder where there are two; B rows without padding by default.
            segments: (B, T) int64, for encoders that tell a first text from a second.

        Raises:
            ConfigError: segments for a family without; ids that end or begin texts are needed and not known.
            DataError: an encoder-decoder's sequence without an end of text.
        """
        ctx = ctx or self._whole(ids)
        hidden = self.read(ids, ctx, segments)
        if self.head.pools:
            hidden = spans.at(hidden, self._summaries(ids, ctx))
        logits: Tensor = self.head(hidden)
        return logits

    def _whole(self, ids: Tensor) -> Sequences:
        return (Causal if self.kind == "decoder" else Bidirectional)(ids.shape[0], ids.shape[1], ids.device)

    def _summaries(self, ids: Tensor, ctx: Sequences) -> Tensor:
        """The place of the token that stands for its sequence: (S,)."""
        if self.kind != "encoder_decoder":
            return last_of_text(ids, ctx, self.token_ids.pad) if self.kind == "decoder" else spans.first(ctx)
        ends = torch.tensor(self.token_ids.eos, dtype=torch.int64, device=ids.device)
        if not len(ends):
            raise ConfigError(f"this {self.model_type} does not say what ends a text, which its head reads: set token_ids.eos")
        rows, lengths = spans.rows_of(ids, ctx)
        step = torch.arange(rows.shape[1], device=ids.device)
        last = torch.where(torch.isin(rows, ends) & (step < lengths[:, None]), step, -1).amax(1)
        if bool((last < 0).any()):
            raise DataError(
                f"sequence {int((last < 0).int().argmax())} has no end of text (one of {ends.tolist()}), which the head of a"
                f" {self.model_type} reads: add one to every text"
            )
        return spans.first(ctx) + last

    def loss(self, ids: Tensor, targets: Tensor, ctx: Sequences | None = None, segments: Tensor | None = None) -> Loss:
        """(sum, count, metrics) of the head's logits; targets and errors as the head's `loss` says."""
        ctx = ctx or self._whole(ids)
        return self.head.loss(self(ids, ctx, segments), targets, ctx)

    def values(self, ids: Tensor, ctx: Sequences) -> Tensor:
        """A value model's estimate at every token: ids (B, T) -> (B, T) float32; at the last (`pools`) it is the reward.

        Raises ConfigError unless it is a sequence head of one label on a decoder.
        """
        if self.kind != "decoder" or self.task != "sequence" or self.head.labels.n != 1:
            raise ConfigError(
                f"this {self.model_type} has a head {self.task!r} of {self.head.labels.n} logits, and values are those of a"
                " 'sequence' head of 1 on a decoder: attach one"
            )
        values: Tensor = self.head(self.read(ids, ctx)).squeeze(-1).float()
        return values

    def keys(self) -> dict[str, str | Entry]:
        old, new = self._prefixes
        out: dict[str, str | Entry] = {"head.out": self._names.out}
        if self._names.dense is not None:
            out["head.dense"] = self._names.dense
        for ours, theirs in self.trunk.keys().items():
            out[f"trunk.{ours}" if ours else "trunk"] = theirs if old == new else Moved(entry(theirs), old, new)
        return out

    def tied_keys(self) -> dict[str, str]:
        return {begun(a, *self._prefixes): begun(b, *self._prefixes) for a, b in self.trunk.tied_keys().items()}


def attach(
    trunk: LanguageModel, task: str, labels: int | Sequence[str] = 2, *, generator: torch.Generator, problem: str | None = None
) -> Headed:
    """A new head on a trunk, which becomes a part of what is returned and loses its own logits.

    Args:
        trunk: of any family.
        task: one of HEADS.
        labels: how many, or their names; a "question" has 2.
        generator: of the head's weights (`Head.initialise`; the pooler that a BERT has is kept).
        problem: problem_type (`Labels`).

    Raises:
        ConfigError: an unknown task, one that the family has no head for, labels or a problem that are none, a trunk that is
            `Headed` already.
    """
    if isinstance(trunk, Headed):
        raise ConfigError(f"this {trunk.model_type} has a head {trunk.task!r} already: give its `trunk`")
    if task not in HEADS:
        raise ConfigError(f"unknown head {task!r}{nearest(task, HEADS)} There are {', '.join(HEADS)}")
    said = Labels.of(labels, problem)
    if task == "question" and said.n != 2:
        raise ConfigError(f"labels ({said.n}) of a 'question' head must be 2, a start and an end: leave them out")
    model = Headed(trunk, HEADS[task], said)
    model.head.initialise(generator)
    model.head.to(trunk.device, next(trunk.parameters()).dtype)
    name = class_of(trunk, HEADS[task].suffix)
    model.become(name, lambda tensor: False)
    bare: Any = trunk
    if hasattr(bare, "pooler"):
        bare.pooler = None
    kept = {field: value for field, value in trunk.fields.items() if field not in FIELDS}
    model.fields = kept | {"architectures": [name]} | ({} if task == "question" else said.to_hf())
    return model


def named(trunk: LanguageModel, fields: Mapping[str, Any]) -> LanguageModel:
    """The trunk with the head that `architectures` in config.json names, or the trunk alone where it names none of HEADS.

    Raises CheckpointError for a head that the family lacks, and for labels that are none.
    """
    found = fields.get("architectures")
    architecture = found[0] if isinstance(found, list) and found else ""
    head = next((h for h in HEADS.values() if isinstance(architecture, str) and architecture.endswith(h.suffix)), None)
    if head is None:
        return trunk
    try:
        return Headed(trunk, head, Labels.numbered(2) if head is QuestionHead else Labels.from_hf(fields))
    except ConfigError as error:
        raise CheckpointError(f"config.json: architectures names {architecture!r}, and {error}") from error


def embed(
    model: LanguageModel, ids: Tensor, ctx: Sequences, pooling: Pooling | None = None, segments: Tensor | None = None
) -> Tensor:  # fmt: skip
    """A vector for each sequence, by no weights but the trunk's: ids (B, T) -> (S, D) float32.

    Args:
        model: of any family, with a head or without; of an encoder-decoder the encoder is taken.
        ids: of whole sequences.
        ctx: any context of whole sequences.
        pooling: the mean over a sequence's tokens, its first ("cls") or its "last", scaled to length 1 or not; by default what
            is usual, the mean, scaled.
        segments: (B, T), for encoders.
    """
    trunk = model.trunk if isinstance(model, Headed) else model
    if isinstance(trunk, EncoderDecoder):
        hidden = trunk.encode(ids, ctx)
    else:
        hidden = trunk.hidden(ids, ctx, segments) if isinstance(trunk, Encoder) else trunk.hidden(ids, ctx)
    return (pooling or Pooling())(hidden, ctx)
