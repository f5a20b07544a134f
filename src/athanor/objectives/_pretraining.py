"""Objectives of pre-training: which fits which model, and what it asks of data and vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from athanor.core import plugins
from athanor.core.config import from_dict
from athanor.core.errors import ConfigError
from athanor.models.base import LanguageModel
from athanor.objectives._vocabulary import Vocabulary
from athanor.tokenizer.bpe import Tokenizer
from athanor.tokenizer.foreign import ForeignTokenizer
from athanor.types import Batch

__all__ = ["Pretraining", "Vocabulary", "choose", "fits", "generator"]


@dataclass(frozen=True)
class Pretraining:
    """An objective with its options.

    loss        (model, batch) -> (sum, count, metrics)
    prepare     (batch, generator) -> the batch that `loss` takes; the same one where nothing is done to it
    vocabulary  that of the tokenizer; its `start` is what an encoder-decoder's answers begin with, which belongs into
                `model.token_ids.decoder_start`
    longest     tokens of the longest sequence that `prepare` makes
    """

    loss: Callable[[Any, Batch], tuple[Tensor, int, dict[str, Tensor]]]
    prepare: Callable[[Batch, torch.Generator], Batch]
    vocabulary: Vocabulary
    longest: int


def generator(seed: int, step: int, micro: int) -> torch.Generator:
    """Random numbers of one micro-batch: drawn afresh for each, and the same whenever it is prepared again."""
    state = np.random.SeedSequence([seed, step, micro]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def fits(objective: str, architecture: str) -> str:
    """Why models of an architecture cannot be pre-trained by an objective, or "" where they can.

    Only classes are looked at. Options, a model's heads and the vocabulary may still not fit, which `choose` says.

    Raises:
        PluginError: no file is called so.
    """
    model = plugins.require("models", architecture, "Model").Model
    return _unfit(objective, plugins.load("objectives", objective), model, architecture)


def choose(
    name: str,
    model: LanguageModel,
    options: Mapping[str, Any],
    tokenizer: Tokenizer | ForeignTokenizer,
    context: int,
    seed: int = 0,
) -> Pretraining:
    """The objective `name` for a model, which gains the heads that the objective needs and it lacks.

    Call it before there is an optimiser: new heads have parameters.

    Args:
        name: a file of `objectives/`.
        model: on its device.
        options: fields of the file's Config.
        tokenizer: of the model.
        context: tokens of the longest sequence that `prepare` is given.
        seed: of new heads.

    Raises:
        PluginError: no file is called so.
        ConfigError: options that the objective does not have; a model that it does not fit, and which objectives do; a
            vocabulary that lacks tokens or does not fit the model; sequences longer than the model takes.
    """
    module = plugins.load("objectives", name)
    reason = _unfit(name, module, model, model.model_type)
    if reason:
        others = [
            other for other in plugins.names("objectives") if not _unfit(other, plugins.load("objectives", other), model, "")
        ]
        found = f"use {' or '.join(others)}" if others else "no objective of pre-training fits it"
        raise ConfigError(f"objective {name!r} does not fit this model: {reason}; {found}")
    if model.task != "lm":
        raise ConfigError(
            f"this {model.model_type} was saved without its language-model head (its task is {model.task!r}), which {name}"
            " trains: take a checkpoint of the whole model"
        )
    config = _config(name, module, options)
    vocabulary = Vocabulary.of(tokenizer)
    if vocabulary.size > model.config.vocab_size:
        raise ConfigError(
            f"the vocabulary has {vocabulary.size} tokens and the model's vocab_size is {model.config.vocab_size}: give the"
            " tokenizer that it was made for"
        )
    if model.kind == "encoder_decoder":
        vocabulary = replace(vocabulary, start=_start(model, vocabulary))
    longest = module.check(config, vocabulary, context) if hasattr(module, "check") else context
    if longest > model.config.max_positions:
        raise ConfigError(
            f"{name} makes sequences of up to {longest} tokens out of context ({context}) and the model's max_positions is"
            f" {model.config.max_positions}: lower context by {longest - model.config.max_positions}, or raise max_positions"
        )
    if hasattr(module, "ready"):
        module.ready(model, config, torch.Generator().manual_seed(seed))
    loss = plugins.require("objectives", name, "loss").loss if not hasattr(module, "build") else module.build(config)

    def prepare(batch: Batch, rng: torch.Generator) -> Batch:
        prepared: Batch = module.prepare(batch, config, vocabulary, rng) if hasattr(module, "prepare") else batch
        return prepared

    return Pretraining(loss, prepare, vocabulary, longest)


def _unfit(name: str, module: ModuleType, model: Any, architecture: str) -> str:
    """Why a model or its class does not fit; "" where it does."""
    learns_from = getattr(module, "DATA", "texts")
    if learns_from != "texts":
        return f"{name} learns from {learns_from}, and pre-training has texts"
    kinds = getattr(module, "KINDS", ("decoder",))
    if model.kind not in kinds:
        return f"{name} trains models of kind {' or '.join(kinds)}, and {_a(architecture)} is of kind {model.kind}"
    missing = [need for need in getattr(module, "NEEDS", ()) if not hasattr(model, need)]
    return f"{name} needs {', '.join(missing)}, which {_a(architecture)} has not" if missing else ""


def _a(architecture: str) -> str:
    return f"{'an' if architecture[:1] in tuple('aeiou') or architecture.startswith('rnn') else 'a'} {architecture}"


def _config(name: str, module: ModuleType, options: Mapping[str, Any]) -> Any:
    if hasattr(module, "Config"):
        try:
            return from_dict(module.Config, options)
        except ConfigError as error:
            raise ConfigError(f"objective {name!r}: {error}") from error
    if options:
        raise ConfigError(f"objective {name!r} has no options, and {', '.join(options)} is given: leave it out")
    return None


def _start(model: LanguageModel, vocabulary: Vocabulary) -> int:
    """What answers begin with: what the model's files say, or else the beginning of a text, or padding (T5)."""
    for id in (model.token_ids.decoder_start, vocabulary.bos, vocabulary.pad):
        if id is not None:
            return id
    raise ConfigError(
        f"this {model.model_type} does not say what its answers begin with, and the vocabulary has neither bos nor pad:"
        " set model.token_ids.decoder_start"
    )
