"""What a GGUF file says of a model's shape, from the fields of a Hugging Face config.json.

The names of the keys are the package `gguf`'s. llama.cpp has one graph per architecture: a field with a value that the graph does
not compute is refused here, because llama.cpp would run the file all the same and give other logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from athanor.core.errors import CheckpointError, nearest
from athanor.models.fields import Fields

if TYPE_CHECKING:
    import gguf

_SILU = ("hidden_act", ("silu", "swish"))
_GELU = ("hidden_activation", ("gelu_pytorch_tanh",))
_AS_IT_IS = "llama.cpp cannot run this model as it is; export it with --to hf"


@dataclass(frozen=True)
class Form:
    """How a model type looks as GGUF.

    arch        name of llama.cpp's architecture
    tied        whether the embeddings are tied where config.json does not say
    activation  the field with the activation, and its values that the graph computes
    permuted    llama.cpp turns neighbours in a head, not its halves: rows of the query and key projections move
    centred     the norms' factors are 1 plus what Hugging Face's files hold
    transposed  Hugging Face's matrices are [in, out]
    """

    arch: str
    tied: bool = False
    activation: tuple[str, tuple[str, ...]] = _SILU
    permuted: bool = False
    centred: bool = False
    transposed: bool = False


FORMS = {
    "llama": Form("llama", permuted=True),
    "mistral": Form("llama", permuted=True),
    "mixtral": Form("llama", permuted=True),
    "qwen2": Form("qwen2"),
    "qwen3": Form("qwen3"),
    "qwen3_moe": Form("qwen3moe"),
    "gemma2": Form("gemma2", tied=True, activation=_GELU, centred=True),
    "gemma3_text": Form("gemma3", tied=True, activation=_GELU, centred=True),
    "phi3": Form("phi3"),
    # ggml's GELU is the tanh form, which is what these three names mean.
    "gpt2": Form(
        "gpt2", tied=True, activation=("activation_function", ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")), transposed=True
    ),
}


@dataclass(frozen=True)
class Shape:
    """What the tensors are converted by.

    extra  tensors that config.json's fields make, by their name in the file
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    n_experts: int
    vocab_size: int
    tied: bool
    extra: dict[str, list[float]] = field(default_factory=dict)


def form(fields: Mapping[str, Any]) -> Form:
    """The form of a model type. Raises CheckpointError when it has none."""
    model_type = fields.get("model_type")
    if model_type not in FORMS:
        raise CheckpointError(
            f"model_type {model_type!r} has no GGUF form here; there are {', '.join(FORMS)}{nearest(str(model_type), FORMS)}:"
            " export it with --to hf"
        )
    return FORMS[model_type]


def describe(writer: gguf.GGUFWriter, values: Mapping[str, Any], form: Form) -> tuple[Shape, list[str]]:
    """Write the keys of the model's shape; return it, and notes on what llama.cpp computes otherwise.

    Raises CheckpointError for a field that is missing, malformed, or not computed by llama.cpp's graph.
    """
    model_type = values["model_type"]
    fields = Fields(values, f"{model_type} as GGUF")
    fields.only(*[form.activation[0], *form.activation[1]])
    if form.arch != "llama":
        fields.only("attention_bias", False)
    if model_type == "gpt2":
        return _gpt2(writer, fields, form), []
    layers, width = fields.int("num_hidden_layers"), fields.int("hidden_size")
    heads = fields.int("num_attention_heads")
    kv_heads = fields.int("num_key_value_heads", heads)
    head_dim = fields.int("head_dim", width // heads)
    positions, vocab_size = fields.int("max_position_embeddings"), fields.int("vocab_size")
    tied = fields.bool("tie_word_embeddings", form.tied)
    if form.arch in ("qwen2", "phi3") and heads * head_dim != width:
        raise CheckpointError(
            f"config.json: head_dim is {head_dim}, and a {model_type} as GGUF has heads of hidden_size /"
            f" num_attention_heads = {width} / {heads}: {_AS_IT_IS}"
        )
    writer.add_block_count(layers)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(fields.int("intermediate_size"))
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(fields.float("rms_norm_eps", 1e-6))
    writer.add_vocab_size(vocab_size)
    notes: list[str] = []
    window = None
    if form.arch in ("gemma2", "gemma3"):
        _gemma(writer, fields, form, layers, head_dim, width // heads)
        if form.arch == "gemma2" and not tied:
            raise CheckpointError(f"config.json: tie_word_embeddings is false, and a gemma2 as GGUF is tied: {_AS_IT_IS}")
    else:
        window = _window(values, fields, layers)
    if window is not None and window < positions:
        notes.append(
            f"llama.cpp has no sliding window for {model_type}: within {window} tokens it computes the same, so the file's"
            f" context_length is {window} instead of {positions}"
        )
    writer.add_context_length(positions if window is None else min(positions, window))
    experts = _experts(writer, fields, model_type == "mixtral") if model_type in ("mixtral", "qwen3_moe") else 0
    theta = 1_000_000.0 if model_type == "mixtral" else 10_000.0
    turned = _gemma3_rope(writer, values) if form.arch == "gemma3" else fields
    extra = _rope(writer, turned, form, head_dim, positions, notes, theta)
    return Shape(layers, heads, kv_heads, experts, vocab_size, tied, extra), notes


def _gpt2(writer: gguf.GGUFWriter, fields: Fields, form: Form) -> Shape:
    fields.only("scale_attn_weights", True)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    layers, width, heads = fields.int("n_layer"), fields.int("n_embd"), fields.int("n_head")
    vocab_size = fields.int("vocab_size")
    writer.add_block_count(layers)
    writer.add_context_length(fields.int("n_positions"))
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(fields.int("n_inner", 4 * width))
    writer.add_head_count(heads)
    writer.add_layer_norm_eps(fields.float("layer_norm_epsilon", 1e-5))
    writer.add_vocab_size(vocab_size)
    return Shape(layers, heads, heads, 0, vocab_size, fields.bool("tie_word_embeddings", form.tied))


def _window(values: Mapping[str, Any], fields: Fields, layers: int) -> int | None:
    """Tokens that a layer sees at most; None when all see everything."""
    if values["model_type"] == "llama":
        return None
    window: int | None = fields.int("sliding_window", None)
    if "sliding_window" not in values and values["model_type"] == "mistral":
        window = 4096
    types = fields.get("layer_types", None)
    if values["model_type"].startswith("qwen"):
        slides = fields.bool("use_sliding_window", False)
        slides = slides and ("sliding_attention" in types if types else fields.int("max_window_layers", 28) < layers)
    else:
        slides = "sliding_attention" in types if types else True
    return window if slides else None


def _experts(writer: gguf.GGUFWriter, fields: Fields, mixtral: bool) -> int:
    """Keys of a mixture of experts; their number."""
    n_experts: int = fields.int("num_local_experts", None) or fields.int("num_experts")
    writer.add_expert_count(n_experts)
    writer.add_expert_used_count(fields.int("num_experts_per_tok"))
    if not mixtral:
        writer.add_expert_feed_forward_length(fields.int("moe_intermediate_size"))
        if not fields.bool("norm_topk_prob", False):
            raise CheckpointError(f"config.json: norm_topk_prob is false, and llama.cpp normalises the gates: {_AS_IT_IS}")
        if fields.get("mlp_only_layers", []) or fields.int("decoder_sparse_step", 1) != 1:
            raise CheckpointError(
                "config.json: mlp_only_layers or decoder_sparse_step makes layers without experts, and a qwen3_moe as GGUF has"
                f" none: {_AS_IT_IS}"
            )
    return n_experts


def _gemma(writer: gguf.GGUFWriter, fields: Fields, form: Form, layers: int, head_dim: int, quotient: int) -> None:
    """Keys of windows and caps; `quotient` is hidden_size / num_attention_heads, rounded down."""
    fields.only("use_bidirectional_attention", False)
    scalar = fields.float("query_pre_attn_scalar", 256.0)
    # The largest model of each version is known to llama.cpp by its number of layers.
    known = quotient if layers == {"gemma2": 46, "gemma3": 62}[form.arch] else head_dim
    if scalar != known:
        raise CheckpointError(
            f"config.json: query_pre_attn_scalar is {scalar:g}, and llama.cpp scales the scores of a {form.arch} with {layers}"
            f" layers by 1/sqrt({known}): {_AS_IT_IS}"
        )
    attention, output = fields.float("attn_logit_softcapping", None), fields.float("final_logit_softcapping", None)
    if form.arch == "gemma3":
        fields.only("attn_logit_softcapping", None)
    elif attention is None or output is None:
        raise CheckpointError(
            f"config.json: attn_logit_softcapping is {attention} and final_logit_softcapping {output}, and a gemma2 as GGUF has"
            f" both caps: {_AS_IT_IS}"
        )
    else:
        writer.add_attn_logit_softcapping(attention)
    if output is not None:
        writer.add_final_logit_softcapping(output)
    period = {"gemma2": 2, "gemma3": 6}[form.arch]
    usual = [(i + 1) % period != 0 for i in range(layers)]
    types = fields.get("layer_types", None)
    period = fields.int("sliding_window_pattern", period)  # of files before layer_types
    slides = [kind == "sliding_attention" for kind in types] if types else [(i + 1) % period != 0 for i in range(layers)]
    if any(slides):
        writer.add_sliding_window(fields.int("sliding_window", 4096))
    elif form.arch == "gemma2":
        raise CheckpointError(f"config.json: layer_types has no sliding_attention, and a gemma2 as GGUF has: {_AS_IT_IS}")
    if any(slides) and slides != usual:  # an older llama.cpp knows the usual ones only
        writer.add_sliding_window_pattern(slides)


def _gemma3_rope(writer: gguf.GGUFWriter, values: Mapping[str, Any]) -> Fields:
    """Write the base of layers with a window; the fields as if the other layers' rotary settings were all there are."""
    new = values.get("rope_parameters") or {}
    local = Fields({"rope_theta": values.get("rope_local_base_freq"), **new.get("sliding_attention", {})}, "gemma3_text as GGUF")
    local.only("rope_type", "default")
    writer.add_rope_freq_base_swa(local.float("rope_theta", 10_000.0))
    own = {"rope_theta": values.get("rope_theta") or 1_000_000.0, "rope_parameters": new.get("full_attention")}
    return Fields({**values, **own}, "gemma3_text as GGUF")


def _rope(
    writer: gguf.GGUFWriter, fields: Fields, form: Form, head_dim: int, positions: int, notes: list[str], theta: float
) -> dict[str, list[float]]:
    """Keys of the rotary positions; the tensors that belong to them."""
    import gguf

    rope = fields.rope(theta)
    kind = {"su": "longrope"}.get(rope["rope_type"], rope["rope_type"])
    settings = Fields(rope, f"rope_type {kind!r}")
    turned = settings.float("partial_rotary_factor", fields.float("partial_rotary_factor", 1.0))
    if turned != 1.0 and form.arch != "phi3":
        raise CheckpointError(f"config.json: partial_rotary_factor is {turned}, and a {form.arch} as GGUF has 1: {_AS_IT_IS}")
    dims = int(head_dim * turned)
    writer.add_rope_dimension_count(dims)
    writer.add_rope_freq_base(rope["rope_theta"])
    within = settings.int("original_max_position_embeddings", 4096 if form.arch == "phi3" else positions)
    original = fields.int("original_max_position_embeddings", within)  # transformers goes by the outer field, too
    if kind == "default":
        return {}
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(settings.float("factor"))
        return {}
    if kind == "dynamic":
        notes.append(f"rope_type 'dynamic' is unscaled within {positions} tokens, and llama.cpp never scales it")
        return {}
    if kind == "yarn":
        _yarn(writer, settings, positions, original)
        return {}
    if kind == "llama3" and form.arch == "llama":
        frequencies = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight"
        return {frequencies: _llama3(settings, rope["rope_theta"], dims, original)}
    if kind == "longrope" and form.arch == "phi3":
        factor = settings.float("factor", positions / original)
        usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(settings.float("attention_factor", usual))
        notes.append(
            f"llama.cpp takes the long rotary factors when its context size is above {original}, the model when the text is"
        )
        names = {"long": gguf.MODEL_TENSOR.ROPE_FACTORS_LONG, "short": gguf.MODEL_TENSOR.ROPE_FACTORS_SHORT}
        return {gguf.TENSOR_NAMES[tensor] + ".weight": _factors(settings, name, dims) for name, tensor in names.items()}
    raise CheckpointError(f"config.json: rope_type is {kind!r}, which a {form.arch} as GGUF has not: {_AS_IT_IS}")


def _yarn(writer: gguf.GGUFWriter, settings: Fields, positions: int, original: int) -> None:
    import gguf

    settings.only("truncate", True)
    settings.only("mscale", None)
    settings.only("beta_fast", 32)  # llama.cpp reads neither of these from the file
    settings.only("beta_slow", 1)
    factor = settings.float("factor", positions / original)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(original)
    attention = settings.float("attention_factor", None)
    if attention is not None:  # the key multiplies what llama.cpp takes by itself
        writer.add_rope_scaling_attn_factors(attention / (1 + 0.1 * math.log(factor) if factor > 1 else 1.0))


def _llama3(settings: Fields, theta: float, dims: int, original: int) -> list[float]:
    """What each frequency is divided by: 1 where a turn is short against `original`, the factor where it is long."""
    factor, low, high = (settings.float(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    divisors = []
    for i in range(0, dims, 2):
        turns = original * theta ** (-i / dims) / (2 * math.pi)
        part = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - part) / factor + part))
    return divisors


def _factors(settings: Fields, name: str, dims: int) -> list[float]:
    factors = settings.get(f"{name}_factor")
    if not isinstance(factors, list) or len(factors) != dims // 2 or not all(isinstance(f, (int, float)) for f in factors):
        raise CheckpointError(f"config.json: {name}_factor must be {dims // 2} numbers and is {factors!r:.80}: copy it again")
    return [float(f) for f in factors]
