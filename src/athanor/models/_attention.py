"""What a model looks at. Legend: L layers, H heads, T tokens, S tokens of a source, A tokens of an answer."""

from __future__ import annotations

import torch
from torch import Tensor

from athanor.core.errors import ConfigError
from athanor.models.base import EncoderDecoder, LanguageModel
from athanor.models.heads import Headed
from athanor.nn.context import Bidirectional, Causal, Memory, WithMemory
from athanor.nn.watch import Watched


@torch.inference_mode()
def attention_maps(model: LanguageModel, ids: Tensor, answer: Tensor | None = None) -> dict[str, Tensor]:
    """The probabilities with which every head of every layer looks at tokens, float32 on the CPU.

    Args:
        model: with attention.
        ids: (T,) of a text; of an encoder-decoder the source (S,).
        answer: (A,) that an encoder-decoder reads.

    Returns:
        "attention" (L, H, T, T); of an encoder-decoder "encoder" (L, H, S, S), "decoder" (L, H, A, A) and "cross" (L, H, A, S).
        A row sums to 1: who looks, then at whom. Longformer's global tokens are shown as they look through the window.

    Raises:
        ConfigError: a model without attention; no answer for an encoder-decoder, or one for another family.
    """
    trunk = model.trunk if isinstance(model, Headed) else model
    if isinstance(trunk, EncoderDecoder) != (answer is not None):
        what = "reads a source and an answer: give both" if answer is None else "reads one text: leave the answer out"
        raise ConfigError(f"a {trunk.model_type} {what}")
    rows = ids.unsqueeze(0)
    if isinstance(trunk, EncoderDecoder) and answer is not None:
        reading = Watched(Bidirectional(1, len(ids), ids.device))
        memory = Memory(trunk.encode(rows, reading))
        writing = Watched(WithMemory(Causal(1, len(answer), ids.device), memory))
        trunk.hidden(answer.unsqueeze(0), writing)
        found = {"encoder": reading.maps, "decoder": writing.maps, "cross": writing.cross_maps}
    else:
        plain = (Causal if trunk.kind == "decoder" else Bidirectional)(1, len(ids), ids.device)
        watched = Watched(plain)
        trunk.hidden(rows, watched)
        found = {"attention": watched.maps}
    if not all(found.values()):
        raise ConfigError(f"a {trunk.model_type} has no attention, so there is nothing to see: take a Transformer")
    return {name: torch.cat([maps[i] for i in sorted(maps)]).float().cpu() for name, maps in found.items()}
