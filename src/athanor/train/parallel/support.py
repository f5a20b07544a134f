"""Which models train under which layouts, and why others do not."""

from __future__ import annotations

from athanor.models.base import LanguageModel
from athanor.models.decoder import Decoder
from athanor.nn.moe import MixtureOfExperts
from athanor.train.parallel import tensor
from athanor.train.parallel.layout import Layout


def reason(model: LanguageModel, layout: Layout) -> str:
    """Why a model cannot be trained under a layout, or ""."""
    mixture = any(isinstance(m, MixtureOfExperts) for m in model.modules())
    if mixture and (layout.tp > 1 or layout.pp > 1):
        return f"{model.model_type} is a mixture of experts, whose experts tp and pp do not split: use ddp, fsdp or ddp with ep"
    if layout.ep > 1 and not mixture:
        return f"ep deals out experts and {model.model_type} has none: leave ep out"
    return (tensor.reason(model, layout.tp) if layout.tp > 1 else "") or (_pipeline(model, layout) if layout.pp > 1 else "")


def _pipeline(model: LanguageModel, layout: Layout) -> str:
    if not isinstance(model, Decoder) or type(model).hidden is not Decoder.hidden:
        return f"a pipeline is cut between the blocks of a plain decoder, and {model.model_type} is none: use ddp, fsdp or tp"
    if len(model.blocks) < layout.stages:
        return f"pp has {layout.stages} stages and the model {len(model.blocks)} blocks: a stage needs one at least"
    return ""
