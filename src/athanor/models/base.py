"""What every language model offers. Legend: B batch, T time, D width, V vocabulary, S time of a source."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from athanor.core.errors import ConfigError
from athanor.models.keys import Entry, Fused, entry
from athanor.nn.cache import KV, Layer
from athanor.nn.context import Bidirectional, Causal, Context, Memory, WithMemory
from athanor.nn.linear import linear
from athanor.nn.loss import linear_cross_entropy, token_logprobs

__all__ = ["CausalLM", "Encoder", "EncoderDecoder", "Fused", "LanguageModel", "ModelConfig", "Quantised", "TokenIds"]


class ModelConfig(Protocol):
    """What the rest of the house asks of an architecture's config (a frozen dataclass)."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def max_positions(self) -> int: ...

    def to_hf(self) -> dict[str, Any]:
        """The fields of Hugging Face's config.json."""
        ...


@dataclass(frozen=True)
class TokenIds:
    """Token ids that a model's files name; () and None where they name none.

    bos            begins a text
    eos            each of these ends one
    pad            fills rows
    decoder_start  what an encoder-decoder's answer starts with
    forced_bos     what comes next in its answers, whatever the model thinks (BART)
    """

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    decoder_start: int | None = None
    forced_bos: int | None = None

    @property
    def start(self) -> tuple[int, ...]:
        """What an encoder-decoder's answers begin with; () where its files do not say."""
        return tuple(x for x in (self.decoder_start, self.forced_bos) if x is not None) if self.decoder_start is not None else ()


@runtime_checkable
class Quantised(Protocol):
    """A matrix (out_features, in_features) held as whole numbers in buffers: `compress.linear.QuantLinear`."""

    in_features: int
    out_features: int
    bits: int


def sizes(module: nn.Module) -> dict[int, int]:
    """Elements of the parameters and quantised matrices within, by identity, so that tied ones are there once."""
    found = {id(p): p.numel() for p in module.parameters()}
    return found | {id(m): m.in_features * m.out_features for m in module.modules() if isinstance(m, Quantised)}


class LanguageModel(nn.Module):
    """Base of all families: hidden states and logits are separate calls.

    A subclass is built from its config alone and defines `initialise`, `hidden`, `output_weight` and `keys`, the key map of
    its files. Buffers that no file holds it computes on the CPU explicitly (`device="cpu"`), since a model about to be loaded
    is built without a device.

    Class attributes:
        model_type: of Hugging Face's config.json.
        kind: what the family can do.
        prefix: what the names of all but the heads begin with in a file; files of the bare trunk lack it.
        harmless: patterns (`re.fullmatch`) of tensors in files of others that nothing is computed with.
        renamed: (pattern, replacement) pairs that bring names of old files to today's.
        idle: patterns (as in file names) of modules that neither `hidden` nor `logits` runs for every token.
        exact: patterns (`re.fullmatch`) of tensors of a file that are computed with in float32 and so never read into less than
            the file has, whatever dtype the others get.
        float16: whether its numbers keep within the range of float16.
        lm_modules: attributes that only the family's own logits need; None in a model with another head or none (`heads.py`).

    Attributes:
        task: what stands on the trunk: "lm", "none", or a head of `heads.py`.
        token_ids: as its files name them.
        fields: those of config.json as they were read, so that what nothing is computed with is not lost.
    """

    config: ModelConfig
    model_type: ClassVar[str]
    kind: ClassVar[Literal["decoder", "encoder", "encoder_decoder", "tagger"]]
    prefix: ClassVar[str] = ""
    harmless: ClassVar[tuple[str, ...]] = ()
    renamed: ClassVar[tuple[tuple[str, str], ...]] = ()
    idle: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[tuple[str, ...]] = ()
    float16: ClassVar[bool] = True
    lm_modules: ClassVar[tuple[str, ...]] = ("head",)
    task: str = "lm"
    token_ids: TokenIds = TokenIds()
    fields: Mapping[str, Any] = MappingProxyType({})

    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights."""
        raise NotImplementedError  # every architecture defines it

    def become(self, architecture: str, holds: Callable[[str], bool]) -> None:
        """Drop or add what a file of `architecture` ("BertModel", "" for none named) lacks or has besides.

        `holds` says whether the file has a tensor of that name. Called before anything has a device.
        """
        if architecture.endswith("Model") and not architecture.endswith("LMHeadModel"):
            self.behead()

    def behead(self) -> None:
        """Drop what only the model's own logits need."""
        self.task = "none"
        for name in self.lm_modules:
            setattr(self, name, None)

    def hidden(self, ids: Tensor, ctx: Context) -> Tensor:
        """Final hidden states, normalised: ids (B, T) int64 -> (B, T, D)."""
        raise NotImplementedError  # every architecture defines it

    @property
    def output_weight(self) -> Tensor:
        """The output embedding (V, D)."""
        raise NotImplementedError  # every architecture defines it

    @property
    def output_bias(self) -> Tensor | None:
        """Added to the logits, (V,)."""
        return None

    @property
    def label_smoothing(self) -> float:
        """How much of a target's probability training spreads over the vocabulary (the Transformer of 2017: 0.1)."""
        return 0.0

    @property
    def output_softcap(self) -> float | None:
        """c where logits are c tanh(logits / c) (Gemma 2)."""
        return None

    def to_output(self, hidden: Tensor) -> Tensor:
        """What the output embedding is multiplied with, of the hidden states: (..., D) -> (..., D)."""
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V). Raises ConfigError for a model whose files hold no language-model head."""
        if self.task != "lm":
            raise ConfigError(
                f"this {self.model_type} was saved without its language-model head (its task is {self.task!r}), so it has no"
                " logits of tokens: use `hidden` or `embed`, or a checkpoint of the whole model"
            )
        out = linear(self.to_output(hidden), self.output_weight, self.output_bias)
        cap = self.output_softcap
        return out if cap is None else (out / cap).tanh_() * cap

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """`linear_cross_entropy` of this model's logits: hidden (N, D), targets (N,); never holds all logits."""
        smoothing = self.label_smoothing if self.training else 0.0
        return linear_cross_entropy(
            self.to_output(hidden), self.output_weight, targets, self.output_bias, self.output_softcap, smoothing
        )  # fmt: skip

    def token_logprobs(self, hidden: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """`token_logprobs` of this model's logits: hidden (N, D), targets (N,), temperature (N,)."""
        return token_logprobs(
            self.to_output(hidden), self.output_weight, targets, temperature, self.output_bias, self.output_softcap
        )  # fmt: skip

    def router_loss(self) -> Tensor | None:
        """What training adds to the mean loss of the last forward pass, so that experts are kept busy; None without experts."""
        return None

    def keys(self) -> Mapping[str, str | Entry]:
        """Our modules that hold tensors -> where these lie in a Hugging Face file (`keys.py`)."""
        raise NotImplementedError  # every architecture defines it

    def tied_keys(self) -> Mapping[str, str]:
        """Tensors that a file may hold twice: the name that may be missing -> the name of the tensor that it equals."""
        return {}

    def to_hf(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict, or a part of it, as the tensors of a Hugging Face file."""
        keys, out = self.keys(), {}
        for name, tensor in state.items():
            module, _, leaf = name.rpartition(".")
            place = entry(keys[module])
            for theirs, part in place.parts(leaf, place.written(leaf, tensor)):
                out[theirs] = part.contiguous()
        return out

    def fill(self, read: Callable[[str, Tensor], object], dtypes: Callable[[str], torch.dtype]) -> dict[str, Tensor]:
        """A state dict of new tensors on the CPU, read tensor by tensor from a Hugging Face file.

        Args:
            read: puts the file's tensor of a name into the (perhaps not contiguous) tensor given.
            dtypes: what kind of tensor to make for the file's tensor of a name.
        """
        keys, out = self.keys(), {}
        for name, like in self.state_dict().items():
            module, _, leaf = name.rpartition(".")
            place = entry(keys[module])
            first = next(place.parts(leaf, like))[0]
            tensor = torch.empty(like.shape, dtype=dtypes(first))
            for theirs, part in place.parts(leaf, tensor):
                read(theirs, part)
            place.settle(leaf, tensor)
            out[name] = tensor
        return out

    def from_hf(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `to_hf`, of all the model's tensors."""
        return self.fill(lambda name, out: out.copy_(tensors[name]), lambda name: tensors[name].dtype)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def n_parameters(self) -> int:
        """Parameters, tied ones counted once; of a quantised matrix its whole numbers."""
        return sum(sizes(self).values())


class CausalLM(LanguageModel):
    """A decoder-only language model."""

    kind = "decoder"
    prefix = "model."

    def cache_layers(self) -> Sequence[Layer]:
        """What each layer keeps of a sequence while it is generated."""
        c: Any = self.config
        return [KV(c.n_kv_heads, c.head_dim, c.head_dim)] * c.n_layers

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of whole sequences of one length: (B, T) -> (B, T, V)."""
        return self.logits(self.hidden(ids, Causal(ids.shape[0], ids.shape[1], ids.device)))


class Encoder(LanguageModel):
    """An encoder-only model; its logits are those of masked tokens."""

    kind = "encoder"

    def hidden(self, ids: Tensor, ctx: Context, segments: Tensor | None = None) -> Tensor:
        """Final hidden states: ids (B, T) int64, segments (B, T) int64 (all 0 by default) -> (B, T, D)."""
        raise NotImplementedError  # every architecture defines it

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of whole sequences of one length: (B, T) -> (B, T, V)."""
        return self.logits(self.hidden(ids, Bidirectional(ids.shape[0], ids.shape[1], ids.device)))


class EncoderDecoder(LanguageModel):
    """An encoder, and a decoder that reads what it made. `hidden` is the decoder's; its context holds the memory."""

    kind = "encoder_decoder"

    def encode(self, ids: Tensor, ctx: Context) -> Tensor:
        """What the encoder makes of a source: ids (B, S) int64 -> (B, S, D)."""
        raise NotImplementedError  # every architecture defines it

    def cache_layers(self) -> Sequence[Layer]:
        """What each decoder layer keeps of an answer."""
        raise NotImplementedError  # every architecture defines it

    def cross_layers(self) -> Sequence[KV]:
        """What each decoder layer keeps of a token of the source."""
        raise NotImplementedError  # every architecture defines it

    def forward(self, ids: Tensor, decoder_ids: Tensor) -> Tensor:
        """Logits of whole answers to whole sources: (B, S), (B, T) -> (B, T, V)."""
        memory = Memory(self.encode(ids, Bidirectional(ids.shape[0], ids.shape[1], ids.device)))
        ctx = WithMemory(Causal(decoder_ids.shape[0], decoder_ids.shape[1], ids.device), memory)
        return self.logits(self.hidden(decoder_ids, ctx))
