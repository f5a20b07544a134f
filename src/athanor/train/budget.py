"""One plan from the parts: a model's memory, time and cost on given devices, or the model that a budget is best spent on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from athanor.core.errors import ConfigError, PluginError, nearest
from athanor.models import io as models
from athanor.models._profile import profile
from athanor.models.base import LanguageModel
from athanor.train.budget_compute import TOKENS_PER_PARAMETER, Cost, Optimum, cost, largest, optima, quantity
from athanor.train.budget_memory import Need, Setup, predict
from athanor.train.devices import Device

# Resident beside what a plan counts: Python, torch and its libraries on a CPU (measured); on a GPU its context, the libraries'
# workspaces and the caching allocator's holes (assumed).
PROCESS = {"cpu": 340_000_000, "cuda": 1_500_000_000}


@dataclass(frozen=True)
class Terms:
    """What there is to train with; None is no limit.

    device   one of them
    mfu      share of its peak that is reached
    memory   bytes of one, for tensors and what is beside them
    seconds  of all devices together
    tokens   to train on
    flops    to spend
    """

    device: Device
    mfu: float = 0.4
    memory: float | None = None
    seconds: float | None = None
    tokens: float | None = None
    flops: float | None = None

    @classmethod
    def of(
        cls,
        device: Device,
        mfu: float = 0.4,
        price: float | None = None,
        hours: float | None = None,
        memory: str | None = None,
        tokens: str | None = None,
        flops: str | None = None,
    ) -> Terms:
        """From options as they are typed. Raises ConfigError for a quantity that is none, naming the option."""
        if price is not None:
            if not 0 <= price < math.inf:
                raise ConfigError(f"price ({price:g}) is dollars an hour of a device: it must not be negative")
            device = replace(device, price=price)
        if not 0 < mfu <= 1:
            raise ConfigError(f"mfu ({mfu:g}) is the share of the peak that is used: it must lie in (0, 1], 0.4 is usual")
        if hours is not None and not 0 < hours < math.inf:
            raise ConfigError(f"hours ({hours:g}) must be above 0, as 24")
        given = {"memory": memory, "tokens": tokens, "flops": flops}
        amounts = {name: None if text is None else quantity(name, text) for name, text in given.items()}
        return cls(device, mfu, seconds=None if hours is None else hours * 3600, **amounts)


@dataclass(frozen=True)
class Found:
    """A plan.

    name, family   of the model
    shape          its config
    parameters     tied ones counted once
    setup          how it is trained
    device         one of `devices` that it is trained on
    need           memory of one process
    beside         bytes that a process has beside (`PROCESS`)
    memory         bytes that there are
    fits           whether need and beside are within
    cost           operations, time and money
    seconds_given  time that there is, or None
    cache          bytes that generation keeps of one context
    optima_flops   operations that laws are asked to spend: those of the plan, or those given
    optima         how they would
    others         {change: Need} of other ways to train the same
    """

    name: str
    family: str
    shape: dict[str, Any]
    parameters: int
    setup: Setup
    device: Device
    devices: int
    mfu: float
    need: Need
    beside: int
    memory: float
    fits: bool
    cost: Cost
    seconds_given: float | None
    cache: int
    optima_flops: float
    optima: list[Optimum]
    others: dict[str, Need] = field(default_factory=dict)


def of(name: str, model: LanguageModel, terms: Terms, setup: Setup, *, others: bool = False) -> Found:
    """The plan of one model; `others` also tries other ways to train it, which are tried anyway where it does not fit.

    Trained on `terms.tokens`, or what `terms.seconds` allow, or 20 tokens for each parameter.

    Raises:
        ConfigError: what the parts refuse; bfloat16 weights on a device that has none.
    """
    if terms.flops is not None:
        raise ConfigError(f"flops ({terms.flops:g}) is a budget to find a model for: leave the model out, or give tokens instead")
    setup = replace(setup, fused=terms.device.kind != "cpu")
    if setup.precision == "bf16-pure" and not terms.device.bf16:
        raise ConfigError(f"precision ('bf16-pure') needs a device with bfloat16, and {terms.device.name} has none: use fp32")
    need = predict(model, setup)
    memory = terms.memory or terms.device.memory
    parameters = model.n_parameters()
    spent = _cost(model, terms, setup, terms.tokens or TOKENS_PER_PARAMETER * parameters)
    if terms.tokens is None and terms.seconds is not None:
        spent = _cost(model, terms, setup, terms.seconds * spent.tokens_per_second)
    fits = total(need, terms.device) <= memory
    shape = {k: v for k, v in vars(model.config).items() if isinstance(v, (int, float, str, bool, type(None)))}
    seen = profile(model, setup.context)
    return Found(
        name, model.model_type, shape, parameters, setup, terms.device, setup.layout.world, terms.mfu, need,
        PROCESS[terms.device.kind], memory, fits, spent, terms.seconds, seen.cache_per_token * setup.context,
        spent.flops, optima(spent.flops), _others(model, setup) if others or not fits else {},
    )  # fmt: skip


def total(need: Need, device: Device) -> int:
    """Bytes of a process on a device: on a CPU what is resident, on a GPU the tensors; and what is beside."""
    return (need.resident if device.kind == "cpu" else need.peak) + PROCESS[device.kind]


def _cost(model: LanguageModel, terms: Terms, setup: Setup, tokens: float) -> Cost:
    return cost(
        model, tokens=tokens, context=setup.context, device=terms.device, devices=setup.layout.world, mfu=terms.mfu,
        precision=setup.precision, checkpointing=setup.checkpointing, tune=setup.tune,
    )  # fmt: skip


def _others(model: LanguageModel, setup: Setup) -> dict[str, Need]:
    changes: dict[str, dict[str, Any]] = {
        "--checkpointing selective": {"checkpointing": "selective"},
        "--checkpointing full": {"checkpointing": "full"},
        f"--accumulate {setup.accumulate * setup.rows}": {"accumulate": setup.accumulate * setup.rows},
        "--tune lora": {"tune": "lora"},
        "--tune qlora": {"tune": "qlora"},
    }
    ways = {name: replace(setup, **change) for name, change in changes.items()}
    return {name: predict(model, way) for name, way in ways.items() if way != setup}


def best(terms: Terms, setup: Setup, vocab_size: int) -> Found:
    """The largest model of the family of `budget_compute.shape` that all limits leave room for.

    It is trained on `terms.tokens`, or 20 tokens for each parameter: within the memory, the time and the operations given; where
    tokens alone are given, with 20 of them for each parameter at least.

    Raises:
        ConfigError: nothing fits.
    """
    conditions: list[Callable[[LanguageModel], bool]] = []
    bounded = terms.seconds is not None or terms.flops is not None

    def spent(model: LanguageModel) -> Cost:
        return _cost(model, terms, setup, terms.tokens or TOKENS_PER_PARAMETER * model.n_parameters())

    if terms.flops is not None:
        conditions.append(lambda model: spent(model).flops <= (terms.flops or 0))
    if terms.seconds is not None:
        conditions.append(lambda model: spent(model).seconds <= (terms.seconds or 0))
    if terms.tokens is not None and not bounded:
        conditions.append(lambda model: TOKENS_PER_PARAMETER * model.n_parameters() <= (terms.tokens or 0))
    memory = terms.memory or terms.device.memory
    way = replace(setup, fused=terms.device.kind != "cpu")
    layout, size = setup.layout, 2 if setup.precision == "bf16-pure" else 4
    spread = layout.fsdp * layout.tp * layout.pp
    if setup.tune != "qlora":  # quick to ask: the weights alone
        conditions.append(lambda model: model.n_parameters() * size / spread <= memory)
    conditions.append(lambda model: total(predict(model, way), terms.device) <= memory)
    model = largest(lambda m: all(condition(m) for condition in conditions), vocab_size, setup.context)
    tokens = terms.tokens or TOKENS_PER_PARAMETER * model.n_parameters()
    found = of("the largest that fits", model, replace(terms, tokens=tokens, flops=None), setup)
    flops = terms.flops
    if terms.seconds is not None:
        speed = terms.seconds * terms.device.peak(setup.precision) * terms.mfu * setup.layout.world
        flops = min(flops or speed, speed)
    return found if flops is None else replace(found, optima_flops=flops, optima=optima(flops))


def skeleton(name: str, changed: dict[str, int]) -> LanguageModel:
    """A model without weights: `family:preset`, or `family` where `changed` names the fields of its config that differ.

    Raises:
        ConfigError: no such family, preset or field; no vocab_size where no preset has one.
    """
    family, colon, preset = name.partition(":")
    try:
        module = models.architecture(family)
    except PluginError as error:
        raise ConfigError(str(error)) from error
    presets: Any = getattr(module, "PRESETS", {})
    if colon and preset not in presets:
        raise ConfigError(f"{family} has no preset {preset!r}{nearest(preset, presets)}; it has {', '.join(presets) or 'none'}")
    known = [f.name for f in fields(module.Config)]
    for field_ in changed:
        if field_ not in known:
            raise ConfigError(f"shape.{field_} is no field of a {family}{nearest(field_, known)} Known: {', '.join(known)}.")
    if not colon and "vocab_size" not in changed:
        raise ConfigError(f"{family} without a preset needs --shape.vocab-size: give it, or a preset as {family}:NAME")
    derived: dict[str, Any] = {**changed}
    if "head_dim" in known and {"d_model", "n_heads"} & changed.keys():
        derived["head_dim"] = 0  # that of the preset is of its own width
    shape = replace(presets[preset], **derived) if colon else module.Config(**changed)
    model: LanguageModel = models.build(family, shape)
    return model


def plain(found: Found) -> dict[str, Any]:
    """For JSON."""
    values = asdict(found)
    values["setup"]["layout"] = str(found.setup.layout)
    return values
