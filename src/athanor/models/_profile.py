"""What a model costs, found by walking its modules: parameters, FLOPs of a token, memory. Nothing is run and nothing is read.

| counted                                   | FLOPs of one token, forward                                             |
| ----------------------------------------- | ----------------------------------------------------------------------- |
| matrices (nn.Linear, quantised, recurrent) | 2 for each weight                                                      |
| experts of a mixture                      | 2 for each weight of the k that it chooses                              |
| the output embedding, tied or not         | 2 for each weight                                                       |
| attention (modules that have `per_pair`)  | `per_pair` for each key that it sees, on average over the context       |
| what runs once for a sequence             | a share of 1 / context                                                  |

Going back costs twice as much: a gradient for what came in and one for the weights. Norms, activations and look-ups are left
out, as is usual (Kaplan et al. 2020, section 2.1; PaLM, Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from athanor.models.base import CausalLM, EncoderDecoder, LanguageModel, Quantised, sizes
from athanor.models.heads import Headed
from athanor.nn.cache import KV, State
from athanor.nn.moe import MixtureOfExperts
from athanor.nn.recurrent import Recurrent
from athanor.nn.routing import Router

ADAMW = 8  # bytes of float32 moments of a weight


@dataclass(frozen=True)
class Part:
    """One part of a model.

    name        of its module; layers that are equal are one part
    count       how many of these there are
    parameters  of all of them
    flops       of a token, forward, in all of them: of an answer's token in a decoder that reads a memory
    inside      (name, parameters of one) of what one of them is made of
    """

    name: str
    count: int
    parameters: int
    flops: float
    inside: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Profile:
    """What a model costs at a context of `context` tokens.

    parameters         tied ones counted once
    active             of these, what one token is computed with: of E experts k, and nothing of what is not run
    flops_forward      of one token; of an encoder-decoder one of the source and one of the answer together
    flops_backward     twice that
    weights_bytes      in the dtypes that they have
    cache_per_token    bytes that generation keeps of a token in float32, as an engine does by default; half of it in bfloat16
    cache_per_sequence bytes that it keeps of a sequence besides (recurrent states, in float32)
    inference_bytes    weights, and the cache of one whole context
    training_bytes     float32 weights, gradients and AdamW's moments; activations come on top, and grow with the batch
    """

    parts: tuple[Part, ...]
    context: int
    parameters: int
    active: int
    flops_forward: float
    flops_backward: float
    weights_bytes: int
    cache_per_token: int
    cache_per_sequence: int
    inference_bytes: int
    training_bytes: int


def profile(model: LanguageModel, context: int | None = None) -> Profile:
    """Walk a model, on any device or none.

    Args:
        model: of any family.
        context: tokens that a sequence has; by default the longest, 2048 at most.
    """
    context = context or min(model.config.max_positions, 2048)
    seen: set[int] = set()
    parts = list[Part]()
    tied = _output(model)
    for name, members in _groups(model):
        found = [_new(module, seen) for _, module in members]
        own = sum(size for new in found for size in new.values())
        inside = _inside(members[0][1], found[0].keys())
        flops = sum(_flops(model, module, path, context) for path, module in _walk(members))
        if own or flops:
            parts.append(Part(name, len(members), own, flops, inside))
    loose = [p for name, p in model.named_parameters(recurse=False) if id(p) not in seen]
    if loose:
        parts.append(Part("bias", 1, sum(p.numel() for p in loose), 0.0, ()))
    if tied is not None and not any(isinstance(m, nn.Linear) and m.weight is tied for m in model.modules()):
        parts.append(Part("output (tied)", 1, 0, 2.0 * tied.numel(), ()))
    forward = sum(part.flops for part in parts)
    bytes_ = sum(x.numel() * x.element_size() for x in {id(x): x for x in model.state_dict().values()}.values())
    layers = model.cache_layers() if isinstance(model, (CausalLM, EncoderDecoder)) else []
    kv = [x for x in layers if isinstance(x, KV)]
    if isinstance(model, EncoderDecoder):
        kv += model.cross_layers()
    per_token = sum(x.n_kv_heads * (x.key_dim + x.value_dim) for x in kv) * torch.float32.itemsize
    per_sequence = sum(4 * x.width for x in layers if isinstance(x, State))
    n = model.n_parameters()
    return Profile(
        tuple(parts), context, n, _active(model), forward, 2 * forward, bytes_, per_token, per_sequence,
        bytes_ + per_token * context + per_sequence, n * (4 + 4 + ADAMW),
    )  # fmt: skip


def _output(model: LanguageModel) -> Tensor | None:
    """The output embedding, where the model has one."""
    return model.output_weight if model.task == "lm" and model.kind != "tagger" else None


Members = list[tuple[str, nn.Module]]  # by their paths in the model


def _groups(model: LanguageModel) -> list[tuple[str, Members]]:
    """The model's parts in order; layers of one shape are one part."""
    found = list[tuple[str, Members]]()
    for name, child in model.named_children():
        inner = [(name, child)]
        if any(isinstance(m, nn.ModuleList) for m in child.children()):
            inner = [(f"{name}.{n}", m) for n, m in child.named_children()]
        for path, module in inner:
            found += _kinds(path, module) if isinstance(module, nn.ModuleList) else [(path, [(path, module)])]
    return found


def _kinds(path: str, layers: nn.ModuleList) -> list[tuple[str, Members]]:
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i, layer in enumerate(layers):
        shape = [(name, tuple(p.shape)) for name, p in layer.named_parameters()]
        shape += [(name, (m.out_features, m.in_features)) for name, m in layer.named_modules() if isinstance(m, Quantised)]
        windows = [(name, m.scoring.window) for name, m in layer.named_modules() if hasattr(m, "scoring")]
        kinds.setdefault((*shape, *windows), []).append(i)
    found = []
    for kind, at in kinds.items():
        seen = sorted({window for _, window in kind if isinstance(window, int)})
        name = f"{path} {_numbers(at)}" + (f" (window {', '.join(map(str, seen))})" if seen else "")
        found.append((name, [(f"{path}.{i}", layers[i]) for i in at]))
    return found


def _numbers(at: list[int]) -> str:
    """Numbers in order as a reader writes them: "0-4, 6-10" or "1, 3, 5 ... 23"."""
    runs = list[list[int]]()
    for i in at:
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(words) if len(words) <= 4 else f"{', '.join(words[:3])} ... {words[-1]}"


def _new(module: nn.Module, seen: set[int]) -> dict[int, int]:
    found = {x: size for x, size in sizes(module).items() if x not in seen}
    seen |= found.keys()
    return found


def _inside(module: nn.Module, own: Collection[int]) -> tuple[tuple[str, int], ...]:
    found = ((name, sum(size for x, size in sizes(child).items() if x in own)) for name, child in module.named_children())
    return tuple((name, size) for name, size in found if size)


def _walk(members: Members) -> Members:
    """All modules within, members included."""
    return [(f"{start}.{path}" if path else start, inner) for start, m in members for path, inner in m.named_modules()]


def _flops(model: LanguageModel, module: nn.Module, path: str, context: int) -> float:
    weight: Any = getattr(module, "weight", None)
    rate = _rate(model, path, context)
    if not rate:
        return 0.0
    if isinstance(module, (nn.Linear, Quantised)):
        return 2.0 * module.in_features * module.out_features * rate
    if isinstance(module, Recurrent):
        return 2.0 * sum(p.numel() for p in module.parameters() if p.ndim == 2)
    if isinstance(module, MixtureOfExperts):
        experts = sum(p.numel() for p in module.experts.parameters())
        return 2.0 * experts * module.router.k / module.router.n_experts
    if isinstance(module, Router):
        return 2.0 * weight.numel()
    if hasattr(module, "per_pair"):
        per_pair: Any = module.per_pair
        return float(per_pair) * _visible(model, module, path, context)
    return 0.0


def _rate(model: LanguageModel, path: str, context: int) -> float:
    """How often the module there runs for each token of a sequence: 0 for never, 1 / context for once."""
    if any(fnmatchcase(path, pattern) for pattern in model.idle):
        return 0.0
    if isinstance(model, Headed):
        part, _, within = path.partition(".")
        if part == "trunk":
            return _rate(model.trunk, within, context)
        return 1 / context if model.head.pools else 1.0
    if path.partition(".")[0] in ("pooler", "following"):  # BERT's, of a sequence's first token
        return 1 / context if model.task == "following" else 0.0
    if "_global" in path:  # Longformer's, of tokens that see everything
        return 0.0 if not _landmarks(model) else 1 / context if "query_global" in path else 1.0
    return 1.0


def _landmarks(model: LanguageModel) -> bool:
    """Whether a token of each sequence sees everything and is seen by all. How long questions are nobody knows: one counts."""
    return getattr(model.trunk if isinstance(model, Headed) else model, "global_tokens", "none") != "none"


def _visible(model: LanguageModel, module: Any, path: str, context: int) -> float:
    """Keys that a query sees, on average over the positions of a context."""
    window, place = module.scoring.window, path.removeprefix("trunk.")
    causal = model.kind == "decoder" or (
        model.kind == "encoder_decoder" and place.startswith("decoder") and ".attention" in place
    )
    if causal:
        w = context if window is None else min(window, context)
        return (w * (w + 1) / 2 + (context - w) * w) / context
    if window is None:
        return float(context)
    w = min(window, context - 1)
    # The first token where it sees everything: its own row, and itself in the rows of tokens to which it is far away.
    far = 1 + (context - 1 - w) / context if _landmarks(model) else 0.0
    return (2 * w + 1) - w * (w + 1) / context + far


def _active(model: LanguageModel) -> int:
    """Parameters that a token is computed with: not those of experts that it does not choose, nor of modules that are not run."""
    shares = {
        f"{path}.experts.": m.router.k / m.router.n_experts
        for path, m in model.named_modules()
        if isinstance(m, MixtureOfExperts)
    }
    named = [(name, p.numel()) for name, p in model.named_parameters()]
    named += [(path, m.in_features * m.out_features) for path, m in model.named_modules() if isinstance(m, Quantised)]
    total = 0.0
    for name, size in named:
        if _rate(model, name, 1):
            total += size * next((share for start, share in shares.items() if name.startswith(start)), 1.0)
    return round(total)
