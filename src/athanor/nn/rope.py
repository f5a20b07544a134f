"""Rotary frequencies for contexts longer than those that a model was first trained on.

| class       | frequencies                                                             | source                        |
| ----------- | ----------------------------------------------------------------------- | ----------------------------- |
| LinearRope  | all divided by the factor                                               | Chen et al. 2023              |
| DynamicRope | of a base that grows with the length of the sequence                    | "NTK-aware" scaling, dynamic  |
| YarnRope    | slow ones divided, fast ones kept, a ramp between; attention sharpened  | Peng et al. 2023              |
| Llama3Rope  | the same by wavelength, with another ramp                               | Llama Team 2024               |
| LongRope    | each divided by its own number; one set for short sequences, one for long | Ding et al. 2024            |

Fields have the names of Hugging Face's `rope_parameters`. Legend: K width of what is turned, B batch, T time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from athanor.core.errors import ConfigError, nearest
from athanor.nn.positions import Rotary


def plain(dim: int, theta: float) -> Tensor:
    """f_i = theta^(-2i/K), (K/2,) float64."""
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)


class Scaling:
    """What is done to the frequencies; a subclass is a frozen dataclass of Hugging Face's fields."""

    rope_type: ClassVar[str]

    def frequencies(self, dim: int, theta: float) -> Tensor:
        """(K/2,) float64."""
        raise NotImplementedError  # every scaling defines it

    def magnitude(self, max_positions: int) -> float:
        """Factor of what is turned, in a model for sequences of up to `max_positions`."""
        return 1.0

    def check(self, dim: int, theta: float, max_positions: int) -> None:
        """Raise ConfigError where this does not fit K, the base or the longest sequence."""

    def to_hf(self) -> dict[str, Any]:
        """The fields of `rope_parameters`, without theta; those that say nothing new are left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}  # type: ignore[arg-type]
        return {"rope_type": self.rope_type} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def _number(self, name: str, least: float, usual: str) -> None:
        """Make a field a float of at least `least`; None stays."""
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
            raise ConfigError(
                f"{name} ({value!r}) of {self.rope_type} scaling must be a number from {least:g} on: {usual} is usual"
            )
        object.__setattr__(self, name, float(value))

    def _original(self) -> None:
        value = self.original_max_position_embeddings  # type: ignore[attr-defined]
        if isinstance(value, bool) or not isinstance(value, int) or value < 2:
            raise ConfigError(
                f"original_max_position_embeddings ({value!r}) of {self.rope_type} scaling must be a whole number from 2 on:"
                " it is the context that the model was first trained on"
            )


@dataclass(frozen=True)
class LinearRope(Scaling):
    """f_i / factor: positions are interpolated (Chen et al. 2023)."""

    rope_type = "linear"
    factor: float

    def __post_init__(self) -> None:
        self._number("factor", 1, "2")

    def frequencies(self, dim: int, theta: float) -> Tensor:
        return plain(dim, theta) / self.factor


@dataclass(frozen=True)
class YarnRope(Scaling):
    """f_i (1 - r_i) + f_i / factor r_i (YaRN, Peng et al. 2023).

    The ramp r goes from 0 at the pair that turns beta_fast times within the original context to 1 at the one that turns
    beta_slow times. What is turned is multiplied by attention_factor; by default that is m(1), or m(mscale) / m(mscale_all_dim)
    where both are given, with m(c) = 0.1 c log(factor) + 1.

    truncate  whether the ends of the ramp are whole numbers
    """

    rope_type = "yarn"
    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        self._number("factor", 1, "4")
        self._original()
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            self._number(name, 0, "1")
        self._number("beta_fast", 1e-6, "32")
        self._number("beta_slow", 1e-6, "1")
        if self.beta_fast < self.beta_slow:
            raise ConfigError(
                f"beta_fast ({self.beta_fast:g}) of yarn scaling must not be below beta_slow ({self.beta_slow:g}):"
                " 32 and 1 are usual"
            )
        if not isinstance(self.truncate, bool):
            raise ConfigError(f"truncate ({self.truncate!r}) of yarn scaling must be true or false: true is usual")

    def check(self, dim: int, theta: float, max_positions: int) -> None:
        if not theta > 1:
            raise ConfigError(f"rope_theta ({theta:g}) must be above 1 for yarn scaling: 10000 is usual")

    def frequencies(self, dim: int, theta: float) -> Tensor:
        def pair(turns: float) -> float:
            """The (real) index of the pair that turns so many times within the original context."""
            return dim * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high += 0.001 if low == high else 0.0
        kept = plain(dim, theta)
        ramp = ((torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / (high - low)).clamp(0, 1)
        return kept * (1 - ramp) + kept / self.factor * ramp

    def magnitude(self, max_positions: int) -> float:
        if self.attention_factor is not None:
            return self.attention_factor

        def m(c: float) -> float:
            return 0.1 * c * math.log(self.factor) + 1.0

        return m(self.mscale) / m(self.mscale_all_dim) if self.mscale and self.mscale_all_dim else m(1.0)


@dataclass(frozen=True)
class Llama3Rope(Scaling):
    """Of Llama 3.1: with w the wavelengths that fit into the original context, f_i where w is above high_freq_factor,
    f_i / factor where it is below low_freq_factor, and between them s f_i + (1 - s) f_i / factor with
    s = (w - low_freq_factor) / (high_freq_factor - low_freq_factor).
    """

    rope_type = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        self._number("factor", 1, "8")
        self._number("low_freq_factor", 1e-6, "1")
        self._number("high_freq_factor", 1e-6, "4")
        self._original()
        if not self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"high_freq_factor ({self.high_freq_factor:g}) of llama3 scaling must be above low_freq_factor"
                f" ({self.low_freq_factor:g}): 4 and 1 are usual"
            )

    def frequencies(self, dim: int, theta: float) -> Tensor:
        kept = plain(dim, theta)
        fit = self.original_max_position_embeddings * kept / (2 * math.pi)
        s = ((fit - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return s * kept + (1 - s) * kept / self.factor


class ByLength(Scaling):
    """A scaling whose frequencies depend on the length of the sequence once that is above the original context."""

    original_max_position_embeddings: int

    def frequencies_of(self, dim: int, theta: float, lengths: Tensor) -> Tensor:
        """Of sequences of `lengths` (..): (.., K/2) float64."""
        raise NotImplementedError  # every such scaling defines it

    @property
    def constant(self) -> bool:
        """Whether lengths make no difference after all."""
        return False


@dataclass(frozen=True)
class DynamicRope(ByLength):
    """Frequencies of the base theta (factor n / original - (factor - 1))^(K / (K - 2)) for a sequence of n > original tokens.

    Hugging Face writes `original_max_position_embeddings` as the model's `max_position_embeddings`.
    """

    rope_type = "dynamic"
    factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        self._number("factor", 1, "2")
        self._original()

    @property
    def longest(self) -> int:
        """Of the sequences that the factor is meant for."""
        return math.floor(self.factor * self.original_max_position_embeddings)

    def check(self, dim: int, theta: float, max_positions: int) -> None:
        if dim < 4:
            raise ConfigError(f"head_dim ({dim}) must be at least 4 for dynamic scaling: 64 is usual")
        if max_positions != self.longest:
            raise ConfigError(
                f"max_positions ({max_positions}) must be factor times original_max_position_embeddings of dynamic scaling"
                f" ({self.factor:g} x {self.original_max_position_embeddings}): use {self.longest}"
            )

    def to_hf(self) -> dict[str, Any]:
        return {"rope_type": self.rope_type, "factor": self.factor}

    def frequencies(self, dim: int, theta: float) -> Tensor:
        return plain(dim, theta)

    def frequencies_of(self, dim: int, theta: float, lengths: Tensor) -> Tensor:
        original = self.original_max_position_embeddings
        stretch = self.factor * lengths.double().clamp(min=original) / original - (self.factor - 1)
        base = theta * stretch ** (dim / (dim - 2))
        return base.unsqueeze(-1) ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=lengths.device) / dim)


@dataclass(frozen=True)
class LongRope(ByLength):
    """f_i / short_factor[i] for sequences of up to the original context, f_i / long_factor[i] for longer ones (Ding et al. 2024).

    What is turned is multiplied by attention_factor, by default sqrt(1 + log(factor) / log(original)), where factor is by
    default how much longer the context became.
    """

    rope_type = "longrope"
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float | None = None
    factor: float | None = None

    def __post_init__(self) -> None:
        for name in ("short_factor", "long_factor"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or not all(type(x) in (int, float) and 0 < x < math.inf for x in values):
                raise ConfigError(f"{name} of longrope scaling must be positive numbers, one for each pair of a head: {values!r}")
            object.__setattr__(self, name, tuple(map(float, values)))
        self._original()
        self._number("attention_factor", 0, "1.19")
        self._number("factor", 1e-6, "32")

    def check(self, dim: int, theta: float, max_positions: int) -> None:
        for name in ("short_factor", "long_factor"):
            if len(getattr(self, name)) != dim // 2:
                raise ConfigError(
                    f"{name} of longrope scaling has {len(getattr(self, name))} numbers and must have {dim // 2}, one for each"
                    f" pair of the {dim} entries of a head that are turned: copy the config again"
                )

    def frequencies(self, dim: int, theta: float) -> Tensor:
        return plain(dim, theta) / torch.tensor(self.short_factor, dtype=torch.float64, device="cpu")

    def frequencies_of(self, dim: int, theta: float, lengths: Tensor) -> Tensor:
        numbers = torch.tensor((self.short_factor, self.long_factor), dtype=torch.float64, device=lengths.device)
        return plain(dim, theta).to(lengths.device) / numbers[(lengths > self.original_max_position_embeddings).long()]

    def magnitude(self, max_positions: int) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        original = self.original_max_position_embeddings
        factor = max_positions / original if self.factor is None else self.factor
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))

    @property
    def constant(self) -> bool:
        return self.short_factor == self.long_factor


SCALINGS: dict[str, type[Scaling]] = {
    cls.rope_type: cls for cls in (LinearRope, DynamicRope, YarnRope, Llama3Rope, LongRope)
}  # fmt: skip


def scaling(values: Mapping[str, Any]) -> Scaling | None:
    """The scaling that the fields of Hugging Face's `rope_parameters` (without theta) describe; None for plain frequencies.

    Raises ConfigError for an unknown `rope_type`, and for fields that are unknown, missing or out of range.
    """
    # null counts as absent, but for what is true where it is absent: null is false to transformers.
    given = {name: value for name, value in values.items() if value is not None or name == "truncate"}
    kind = given.pop("rope_type", "default")
    if kind == "default":
        known: list[str] = []
    elif kind in SCALINGS:
        known = [f.name for f in fields(SCALINGS[kind])]  # type: ignore[arg-type]
    else:
        raise ConfigError(f"rope_type ({kind!r}) must be one of default, {', '.join(SCALINGS)}{nearest(str(kind), SCALINGS)}")
    for name in given:
        if name not in known:
            raise ConfigError(
                f"{name} ({given[name]!r}) is no field of {kind} rotary scaling, which has {' and '.join(known) or 'none'}"
                f"{nearest(name, known)}"
            )
    if kind == "default":
        return None
    needed = [f.name for f in fields(SCALINGS[kind]) if f.default is MISSING]  # type: ignore[arg-type]
    lacking = [name for name in needed if name not in given]
    if lacking:
        raise ConfigError(f"{kind} rotary scaling lacks {' and '.join(lacking)}: copy the config again")
    return SCALINGS[kind](**given)


class _RotaryByLength(Rotary):
    """Rotary positions whose frequencies depend on the length of the sequence.

    Sequences of up to the original context have the tables of `Rotary`. Beyond it each sequence has the frequencies of its own
    length, whatever stands beside it (law L3). Keys in a cache were turned, and all that lies above them computed, with the
    frequencies of a shorter length; going on as transformers does would not be what the whole sequence gives (law L2).
    """

    def __init__(self, dim: int, max_positions: int, theta: float, by: ByLength) -> None:
        super().__init__(dim, max_positions, theta, by.frequencies(dim, theta), by.magnitude(max_positions))
        self._dim, self._theta, self._by = dim, theta, by

    def at(self, positions: Tensor, extent: int, cached: bool = False) -> tuple[Tensor, Tensor]:
        original = self._by.original_max_position_embeddings
        if extent <= original:
            return super().at(positions, extent)
        if cached:
            raise ConfigError(
                f"position {extent - 1} is beyond original_max_position_embeddings ({original}): there"
                f" {self._by.rope_type} scaling changes the frequencies of all positions, those in the cache too: keep"
                " what is read and generated within it"
                + (", or let short_factor be long_factor, so that one set serves all lengths" * isinstance(self._by, LongRope))
            )
        if positions.stride(0) == 0:  # one row that stands for all
            positions = positions[:1]
        angle = positions.unsqueeze(-1) * self._by.frequencies_of(self._dim, self._theta, _lengths(positions))
        cos, sin = (angle.cos() * self.magnitude).float(), (angle.sin() * self.magnitude).float()
        return torch.cat((cos, cos), -1).unsqueeze(2), torch.cat((-sin, sin), -1).unsqueeze(2)


def _lengths(positions: Tensor) -> Tensor:
    """(B, T): for each token how long its sequence is; a row holds sequences end to end, each from position 0 on."""
    first = (positions == 0).cumsum(1)  # which sequence of the row
    longest = positions.new_zeros(first.shape[0], first.shape[1] + 1)
    return longest.scatter_reduce_(1, first, positions + 1, "amax").gather(1, first)


def rotary(dim: int, max_positions: int, theta: float, by: Scaling | None) -> Rotary:
    """The tables of a model for sequences of up to `max_positions`; K = `dim`."""
    if by is None:
        return Rotary(dim, max_positions, theta)
    if isinstance(by, ByLength) and not by.constant:
        return _RotaryByLength(dim, max_positions, theta, by)
    return Rotary(dim, max_positions, theta, by.frequencies(dim, theta), by.magnitude(max_positions))
