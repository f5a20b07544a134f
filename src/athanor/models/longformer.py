"""Longformer (Beltagy et al. 2020): a RoBERTa whose tokens see a window around them, and some of them everything.

Who sees everything (global attention) is said with the context: `hidden(ids, WithLandmarks(ctx, mask))`. Without it nobody does,
or, by the model's `global_tokens`, the first token of each sequence (in files of classifiers) or the tokens before its first
separator (in files that answer questions, "<s> question </s></s> context </s>").

Legend: B batch, T time, D width (d_model), H heads, K head width, P tokens with global attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from athanor.core.errors import CheckpointError, ConfigError, DataError
from athanor.models import bert, roberta
from athanor.models._head_answers import owners
from athanor.models.fields import Fields
from athanor.models.keys import Entry, Fused
from athanor.nn import spans
from athanor.nn.attention import Attention
from athanor.nn.context import Context, Sequences
from athanor.nn.landmarks import WithLandmarks, first_tokens
from athanor.nn.linear import Linear
from athanor.nn.sdpa import Scoring


@dataclass(frozen=True)
class Config(roberta.Config):
    """Shape of a Longformer: that of a RoBERTa, and

    windows  of each layer how many tokens around it a token sees, half of them on either side; () is 512 in all
    sep_id   of the separator, which ends a question
    """

    variant: str = "longformer"
    windows: tuple[int, ...] = ()
    sep_id: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.windows:
            object.__setattr__(self, "windows", (512,) * self.n_layers)
        if len(self.windows) != self.n_layers:
            raise ConfigError(f"windows names {len(self.windows)} layers and n_layers is {self.n_layers}: name each layer")
        for window in self.windows:
            if window < 2 or window % 2:
                raise ConfigError(f"windows has {window} and must have positive even numbers: 512 is usual")
        if self.variant != "longformer":
            raise ConfigError(f"variant ({self.variant!r}) must be 'longformer': leave it out, or use models/roberta.py")

    def to_hf(self) -> dict[str, Any]:
        """The fields of Hugging Face's LongformerConfig."""
        return super().to_hf() | {"attention_window": list(self.windows), "sep_token_id": self.sep_id}

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Config:
        """From the fields of config.json. Raises CheckpointError for what this file does not compute."""
        fields = Fields(values, "longformer")
        pad, common = fields.int("pad_token_id", 1), bert.common(fields)
        common["max_positions"] -= pad + 1
        windows = fields.get("attention_window", 512)
        several = windows if isinstance(windows, list) else [windows] * common["n_layers"]
        if not all(type(x) is int for x in several):
            raise CheckpointError(
                f"config.json: attention_window is {windows!r} and must be a whole number or a list of them: copy it again"
            )
        return cls(**common, pad_id=pad, windows=tuple(several), sep_id=fields.int("sep_token_id", 2))


class LongAttention(Attention):
    """Attention within a window; landmarks (`WithLandmarks`) see everything, by queries, keys and values of their own."""

    def __init__(self, config: Config, window: int) -> None:
        d, h = config.d_model, config.n_heads
        scoring = Scoring(window=window // 2)
        super().__init__(d, h, h, config.head_dim, bias=True, out_bias=True, scoring=scoring)
        self.query_global = Linear(d, d)
        self.kv_global = Linear(d, 2 * d)

    def forward(  # (B, T, D) -> (B, T, D)
        self, x: Tensor, ctx: Context, layer: int, turn: Any = None, scoring: Scoring | None = None
    ) -> Tensor:
        """As in `Attention`; nothing turns."""
        b, t, d = x.shape
        query, key, value = self.qkv(x).view(b, t, 3 * self.n_heads, self.head_dim).chunk(3, dim=2)
        out = ctx.attend(layer, query, key, value, scoring or self.scoring).reshape(b, t, d)
        if isinstance(ctx, WithLandmarks) and len(ctx.places):
            query = self.query_global(x.flatten(0, 1).index_select(0, ctx.places)).view(-1, self.n_heads, self.head_dim)
            key, value = self.kv_global(x).view(b, t, 2 * self.n_heads, self.head_dim).chunk(2, dim=2)
            far = ctx.survey(query, key, value).flatten(1)  # (P, D)
            out = out.flatten(0, 1).index_copy(0, ctx.places, far).view(b, t, d)
        return self.out(out)


class Model(roberta.Model):
    """The model; see the module docstring.

    Attributes:
        global_tokens: who has global attention where the context does not say it: "none", the "first" of each sequence, or its
            "question".
    """

    model_type = "longformer"
    prefix = "longformer."
    harmless = (r"(?:longformer\.)?embeddings\.position_ids",)
    global_tokens: Literal["none", "first", "question"] = "none"
    config: Config

    def make_attention(self, layer: int) -> nn.Module:
        return LongAttention(self.config, self.config.windows[layer])

    def become(self, architecture: str, holds: Callable[[str], bool]) -> None:
        super().become(architecture, holds)
        if architecture.endswith("ForSequenceClassification"):
            self.global_tokens = "first"
        elif architecture.endswith("ForQuestionAnswering"):
            self.global_tokens = "question"

    def hidden(self, ids: Tensor, ctx: Context, segments: Tensor | None = None) -> Tensor:  # (B, T) -> (B, T, D)
        """As in `Encoder`. Raises DataError for a sequence without a separator where `global_tokens` is "question"."""
        if self.global_tokens != "none" and not isinstance(ctx, WithLandmarks):
            sequences = cast(Sequences, ctx)
            first = self.global_tokens == "first"
            ctx = WithLandmarks(sequences, first_tokens(sequences) if first else self._question(ids, sequences))
        return super().hidden(ids, ctx, segments)

    def _question(self, ids: Tensor, ctx: Sequences) -> Tensor:
        """(B, T) bool: the tokens before each sequence's first separator."""
        rows, lengths = spans.rows_of(ids, ctx)
        step = torch.arange(rows.shape[1], device=ids.device)
        found = (rows == self.config.sep_id) & (step < lengths[:, None])
        if not bool(found.any(1).all()):
            raise DataError(
                f"sequence {int((~found.any(1)).int().argmax())} has no separator (sep_id, {self.config.sep_id}), before which a"
                " question has global attention: add one, or say who has it (WithLandmarks)"
            )
        owner, inside = owners(ctx)
        return ((ctx.positions.flatten() < found.int().argmax(1)[owner]) & inside).view_as(ids)

    def block_keys(self, ours: str, theirs: str) -> dict[str, str | Entry]:
        d, of_self = self.config.d_model, theirs + "attention.self."
        return super().block_keys(ours, theirs) | {
            ours + "attention.query_global": of_self + "query_global",
            ours + "attention.kv_global": Fused((of_self + "key_global", of_self + "value_global"), (d, d)),
        }


_TINY = Config(320, 32, 2, 4, 48, 128, windows=(8, 4))

PRESETS = {
    "tiny": _TINY,
    "tiny-wide": replace(_TINY, n_heads=2, windows=(6, 30), n_segments=2, pad_id=0, norm_eps=1e-3, activation="gelu_new"),
    "longformer-base-4096": Config(50265, 768, 12, 12, 3072, 4096),
    "longformer-large-4096": Config(50265, 1024, 24, 16, 4096, 4096),
}
