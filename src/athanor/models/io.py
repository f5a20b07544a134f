"""Models in and out: Hugging Face style folders (config.json, safetensors), strict in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from athanor.core import config as configs
from athanor.core import io, plugins
from athanor.core.errors import CheckpointError, ConfigError, PluginError, nearest
from athanor.core.weights import Weights, open_weights, save_sharded
from athanor.models import _generation, heads
from athanor.models._dtypes import dtypes_of
from athanor.models.base import EncoderDecoder, LanguageModel, TokenIds
from athanor.models.fields import Fields
from athanor.models.keys import entry

WEIGHTS = "model.safetensors"
_SHOWN = 6  # names listed in an error before it says how many more there are
_SHARD = 5_000_000_000  # bytes
# What the classes of transformers that are computed here end in.
_CLASSES = (
    "Model",
    "ForCausalLM",
    "ForConditionalGeneration",
    "ForMaskedLM",
    "ForPreTraining",
    "ForNextSentencePrediction",
    *(head.suffix for head in heads.HEADS.values()),
)
# Fields of config.json that a folder written anew must not inherit.
_OWN = ("quantization_config", "auto_map", "transformers_version", "_name_or_path", "torch_dtype", "transformers_weights")


class Layout(Protocol):
    """How a file holds the tensors of a model, both under Hugging Face's names, where that is not as they are in memory."""

    def encode(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """From memory to the file. Constants (the same in every such file) come out on a device even when nothing else is."""
        ...

    def decode(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the file, after its names, shapes, kinds and constants were checked, to memory."""
        ...


def architecture(model_type: str) -> ModuleType:
    """The file that computes `model_type`: the one of that name, or that names it among its MODEL_TYPES.

    Raises PluginError when there is none.
    """
    known = plugins.names("models")
    if model_type in known:
        return plugins.require("models", model_type, "Model", "Config")
    types = {t: name for name in known for t in getattr(plugins.load("models", name), "MODEL_TYPES", ())}
    if model_type in types:
        return plugins.require("models", types[model_type], "Model", "Config")
    raise PluginError(
        f"no architecture computes model_type {model_type!r}{nearest(model_type, [*known, *types]) or '.'} There are:"
        f" {', '.join(sorted({*known, *types}))}. To add one, write the file models/{model_type}.py."
    )


def shape(name: str, fields: Mapping[str, Any]) -> Any:
    """The Config of an architecture ("gpt2"), or of one of its presets ("gpt2:gpt2-xl"), with `fields` changed.

    Raises PluginError for an unknown architecture, ConfigError for an unknown preset or field, or a field of the wrong type.
    """
    family, _, preset = name.partition(":")
    module = plugins.require("models", family, "Model", "Config")
    presets = getattr(module, "PRESETS", {})
    if preset and preset not in presets:
        raise ConfigError(f"{family} has no preset {preset!r}{nearest(preset, presets)}; it has {', '.join(presets) or 'none'}")
    known = configs.to_dict(presets[preset]) if preset else {}
    return configs.from_dict(module.Config, known | dict(fields))


def build(model_type: str, config: Any, *, seed: int | None = None) -> Any:
    """A model of the architecture `model_type`; with `seed` its weights are initialised, without they are on no device yet."""
    module = architecture(model_type)
    if seed is None:
        with torch.device("meta"):
            model: LanguageModel = module.Model(config)
        return model
    model = module.Model(config)
    model.initialise(torch.Generator().manual_seed(seed))
    return model


def encoder_decoder(name: str, fields: Mapping[str, Any], ids: TokenIds, seed: int) -> EncoderDecoder:
    """A fresh encoder-decoder with its special tokens; `name` and `fields` as in `shape`. Raises ConfigError for another kind."""
    family = name.partition(":")[0]
    kind = plugins.require("models", family, "Model", "Config").Model.kind
    if kind != "encoder_decoder":
        raise ConfigError(f"arch ({name!r}) is no encoder-decoder but of the kind {kind!r}: use transformer")
    model: EncoderDecoder = build(family, shape(name, fields), seed=seed)
    model.token_ids = ids
    return model


def save(model: LanguageModel, folder: Path, extra: Mapping[str, Any] | None = None, layout: Layout | None = None) -> None:
    """Write config.json and model.safetensors (more than one file above 5 GB) into `folder`, in Hugging Face's names.

    Fields that the model was loaded with and that nothing is computed with are written again; `extra` joins them.
    """
    tensors = model.to_hf(model.state_dict())
    if model.task == "none":
        tensors = {name.removeprefix(model.prefix): tensor for name, tensor in tensors.items()}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if layout:
        tensors = layout.encode(tensors)
    save_sharded(folder, {k: v.contiguous() for k, v in tensors.items()}, {"format": "pt"}, _SHARD)
    own = model.config.to_hf()
    fields = {k: v for k, v in model.fields.items() if k not in _OWN} | own
    if model.fields.get("architectures"):
        fields["architectures"] = model.fields["architectures"]
    # An id that the config computes with (RoBERTa's padding, by which it counts positions) is no matter of the tokenizer.
    ids = {name: value for name, value in _generation.fields_of(model.token_ids).items() if own.get(name) is None}
    if model.token_ids.forced_bos is not None:  # transformers wants it beside config.json, not in it
        io.write_json(folder / "generation_config.json", ids)
        ids.pop(_generation.TOKENS[-1])
    io.write_json(folder / "config.json", fields | ids | {"dtype": dtype} | dict(extra or {}))


def weights_hash(folder: Path) -> str | None:
    """SHA-256 (hex) of model.safetensors, or of the hashes of its parts; None where there are no such files."""
    hashes = [io.sha256_file(path) for path in sorted(folder.glob("model*.safetensors"))]
    return hashes[0] if len(hashes) == 1 else io.sha256_text("\n".join(hashes)) if hashes else None


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of config.json. Raises CheckpointError when there is none or it names no model type."""
    fields = io.read_json(folder / "config.json")
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise CheckpointError(f"{folder}/config.json has no 'model_type': it is not the config of a model")
    return fields


def _config(module: ModuleType, fields: Mapping[str, Any]) -> Any:
    if module.Model.kind in ("decoder", "encoder_decoder"):
        Fields(fields, fields["model_type"]).only("is_causal", True)  # false makes any decoder of transformers see ahead
    weights = fields.get("transformers_weights")
    if weights not in (None, WEIGHTS):
        raise CheckpointError(
            f"config.json: transformers_weights is {weights!r}, and weights are read from {WEIGHTS}: rename the file, and leave"
            " the field out"
        )
    try:
        return module.Config.from_hf(fields)
    except ConfigError as error:
        raise CheckpointError(f"config.json does not describe a {fields['model_type']} ({error}): copy it again") from error


def load(
    folder: Path,
    prepare: Callable[[Any, dict[str, Any]], Layout | None] | None = None,
    *,
    dtype: torch.dtype | None = None,
    pickled: bool = False,
) -> Any:
    """The model in `folder`. Its tensors are read one by one into place: no second copy of the weights is ever in memory.

    Args:
        folder: with config.json and model.safetensors, or its parts and their index.
        prepare: called with the model (no weights yet) and the config fields, to exchange modules before weights are read;
            returns how the file holds them.
        dtype: of the weights, floating; as in the file by default. Weights of several dtypes get one: that which config.json
            names if some have it, else one that holds them all. What a family computes with in float32 is not rounded
            (`LanguageModel.exact`).
        pickled: whether to read pytorch_model.bin too.

    Raises:
        CheckpointError: damaged files; tensors missing, unexpected, misshaped or not what they must be (each is listed);
            an unknown architecture; float16 for a family whose numbers leave its range.
    """
    model, names, layout = _open(folder, prepare, pickled)
    if layout:
        expected = layout.encode(model.to_hf(model.state_dict()))
        decoded = layout.decode({name: names.read(name) for name in expected})
        state = model.from_hf(decoded)
    else:
        state = model.fill(names.read, dtypes_of(model, names.dtypes(), folder, dtype))
    model.load_state_dict(state, assign=True)
    assert not any(x.is_meta for x in (*model.parameters(), *model.buffers())), "a buffer that no file holds has no device"
    return model.eval()


def skeleton(
    folder: Path, prepare: Callable[[Any, dict[str, Any]], Layout | None] | None = None, *, pickled: bool = False
) -> Any:
    """The model in `folder` without its weights, checked as `load` does: parameters have a shape and a dtype and no memory."""
    model, names, layout = _open(folder, prepare, pickled)
    if not layout:
        with torch.device("meta"):
            model.load_state_dict(model.fill(lambda name, out: None, dtypes_of(model, names.dtypes(), folder, None)), assign=True)
    return model.eval()


def _open(
    folder: Path, prepare: Callable[[Any, dict[str, Any]], Layout | None] | None, pickled: bool
) -> tuple[LanguageModel, _Names, Layout | None]:
    fields = read_config(folder)
    try:
        module = architecture(fields["model_type"])
    except PluginError as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from error
    with _config_of(folder):
        config = _config(module, fields)
    try:
        model: LanguageModel = build(fields["model_type"], config)
    except RuntimeError as error:  # torch's, of a tensor whose bytes are more than it can count
        raise CheckpointError(
            f"{folder}/config.json describes a {fields['model_type']} that no memory holds ({error}): copy it again"
        ) from error
    model.fields, ids = fields, fields | _generation.of_generation(folder)
    with _config_of(folder), torch.device("meta"):
        model.token_ids = _generation.read(ids)
        model = heads.named(model, fields)
    weights = open_weights(folder, pickled=pickled)
    names = _Names(model, weights, folder)
    tied, named = model.tied_keys(), _architecture_named(fields)
    with torch.device("meta"):
        model.become(named, names.__contains__)
    names.tied = dict(model.tied_keys())
    names.headless = names.tied.keys() - tied.keys(), named
    _generation.check(model, fields, folder)
    with _config_of(folder):
        layout = prepare(model, fields) if prepare else None
    expected = model.to_hf(model.state_dict())
    known = named.endswith(_CLASSES) or named in ("", *model.config.to_hf().get("architectures", ()))
    unsaid = isinstance(model, heads.Headed) and model.task != "question" and not {"id2label", "num_labels"} & fields.keys()
    hint = " (config.json has neither id2label nor num_labels, so there are 2 labels: add one)" if unsaid else ""
    _check(names, layout.encode(expected) if layout else expected, folder, None if known else named, hint)
    return model, names, layout


@contextmanager
def _config_of(folder: Path) -> Iterator[None]:
    """What is wrong with config.json says whose it is."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{folder}/{error}") from error


class _Names:
    """The tensors of a file by the names that the whole model has for them: a bare trunk's lack its prefix, old ones differ."""

    def __init__(self, model: LanguageModel, weights: Weights, folder: Path) -> None:
        self._weights = weights
        self.tied: dict[str, str] = {}
        self.headless: tuple[Set[str], str] = frozenset(), ""  # outputs that the architecture named has no use for
        harmless = re.compile("|".join(f"(?:{x})" for x in model.harmless) or r"(?!)")
        there = {_renamed(name, model.renamed): name for name in weights if not harmless.fullmatch(name)}
        if len(there) < sum(not harmless.fullmatch(name) for name in weights):
            raise CheckpointError(f"{folder}: tensors stand there under an old name and a new one: use a folder of one version")
        self.theirs = there
        if model.prefix and not any(name.startswith(model.prefix) for name in there):
            modules = (f"{n}." for e in model.keys().values() for n in entry(e).names)
            heads = tuple(n for n in modules if not n.startswith(model.prefix))
            self.theirs = {name if name.startswith(heads) else model.prefix + name: their for name, their in there.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.theirs

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._weights[self.theirs[name]].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._weights[self.theirs[name]].dtype

    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: self.dtype(name) for name in self.theirs}

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        return self._weights.read(self.theirs[name], out)

    def tied_twins(self, expected: Mapping[str, Tensor]) -> list[str]:
        """Problems with tensors that stand there a second time; those that are equal are taken off the list."""
        problems = []
        for twin, original in self.tied.items():
            if twin in self.theirs and twin not in expected and original in self.theirs:
                if self.shape(twin) != self.shape(original) or not torch.equal(self.read(twin), self.read(original)):
                    untied, name = self.headless
                    problems.append(
                        f"{twin} is an output of its own, and architectures in config.json names {name!r}, which has none"
                        if twin in untied
                        else f"{twin} differs from {original}, and config.json says that they are tied"
                    )
                del self.theirs[twin]
        return problems


def _renamed(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in pairs:
        name = re.sub(pattern, replacement, name)
    return name


def _architecture_named(fields: Mapping[str, Any]) -> str:
    named = fields.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""


def _check(names: _Names, expected: Mapping[str, Tensor], folder: Path, stranger: str | None, hint: str) -> None:
    problems = names.tied_twins(expected)
    both = sorted(expected.keys() & names.theirs.keys())
    missing = sorted(k for k in expected.keys() - names.theirs.keys() if names.tied.get(k) not in names.theirs)
    if missing:
        problems.append("missing: " + _listed(missing))
    unexpected = sorted(names.theirs.keys() - expected.keys())
    stacked = [name for name in unexpected if name.endswith("mlp.experts.gate_up_proj")]
    if stacked:
        raise CheckpointError(
            f"{folder}: {stacked[0]} holds all experts in one tensor, and experts are read as modules of their own, as they are"
            " published: save the model with transformers' save_pretrained(..., save_original_format=True)"
        )
    if unexpected:
        problems.append("unexpected: " + _listed(unexpected))
    misshaped = [
        f"{k} is {names.shape(k)} and must be {tuple(expected[k].shape)}" for k in both if names.shape(k) != expected[k].shape
    ]
    if misshaped:
        problems.append("misshaped: " + _listed(misshaped) + hint)
    mistyped = [
        f"{k} is {names.dtype(k)} and must be like {expected[k].dtype}"
        for k in both
        if names.dtype(k) != expected[k].dtype and not (_weighty(names.dtype(k)) and _weighty(expected[k].dtype))
    ]
    if mistyped:
        problems.append("of the wrong kind: " + _listed(mistyped))
    for k in both:
        if not expected[k].is_meta and names.shape(k) == expected[k].shape:
            found = names.read(k)
            if not torch.equal(found, expected[k]):
                problems.append(f"{k} says {found.tolist()} and must say {expected[k].tolist()}")
    if problems and stranger:
        raise CheckpointError(
            f"{folder}/config.json: architectures names {stranger!r}, a class that is not computed here, and the weights have"
            f" no place in another ({'; '.join(problems)}). Use a checkpoint of a class that ends in {', '.join(_CLASSES)}."
        )
    if problems:
        raise CheckpointError(
            f"{folder}: the weights do not fit {folder / 'config.json'}: {'; '.join(problems)}."
            " Use the files that were saved together."
        )


def _weighty(dtype: torch.dtype) -> bool:
    """Whether weights may be of this type: eight bits of floating point mean nothing without scales that no file here has."""
    return dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
