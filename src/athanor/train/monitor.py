"""What a record of training holds beside the loss: quality in other units, by part how large gradients and updates are, and cost.

| field                                 | what it is                                                                       |
| ------------------------------------- | -------------------------------------------------------------------------------- |
| perplexity                            | exp(loss)                                                                        |
| bits_per_byte                         | loss / ln 2 / bytes of text of a target                                          |
| step_seconds                          | from asking for the batches to the update's end                                  |
| data_share, communication_share       | of these seconds, what went into waiting for batches and into other processes    |
| mfu                                   | FLOPs of the model's matrix products / (seconds x measured peak of all devices) |
| peak_memory, peak_device_memory       | bytes so far: of this process, and of its CUDA device                            |
| grad_norm_by_part                     | before clipping: their squares sum to grad_norm's                                |
| update_ratio_by_part                  | |w' - w| / |w| of an update                                                      |

MFU is that of PaLM (Chowdhery et al. 2022, appendix B) over a peak that is measured, not read off a data sheet. The last two come
every so many steps: they cost a copy of the weights.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from athanor.core import dist
from athanor.core.device import TrainPrecision, autocast, peak_memory
from athanor.core.errors import ConfigError, NoTargetsError
from athanor.models._profile import profile
from athanor.models.base import LanguageModel
from athanor.train.parallel.base import ALONE, Alone, Objective
from athanor.types import Batch

TIMED = frozenset(
    {"step_seconds", "data_share", "communication_share", "mfu", "peak_memory", "peak_device_memory", "tokens_per_second"}
)  # what differs between two runs that are equal
_BLOCK = re.compile(r"(?:(\w+)\.)?(?:blocks|layers)\.(\d+)\.")
_EMBEDDINGS = ("embedding", "positions", "segments", "relative")


def part(name: str) -> str:
    """The part that a parameter belongs to: `embedding`, `block 3` (`encoder block 3`), `norms` outside blocks, `head`."""
    if found := _BLOCK.match(name):
        return f"{found[1]} block {found[2]}" if found[1] else f"block {found[2]}"
    first = name.removeprefix("encoder.").removeprefix("decoder.").split(".")[0]
    return "embedding" if first in _EMBEDDINGS else "norms" if "norm" in first else "head"


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, without its gradient."""
    inner: Any = tensor.detach()
    if hasattr(inner, "to_local"):  # a DTensor
        inner = inner.to_local()
    found: Tensor = inner
    return found


@cache
def measured_peak(device: torch.device, precision: TrainPrecision, threads: int) -> float:
    """FLOP/s of the best of a few products of square matrices in `precision` on `device`, measured once in a process."""
    sizes, tries = ((4096, 8192), 10) if device.type == "cuda" else ((1024, 2048), 4)
    best = 0.0
    with torch.no_grad():
        probe = torch.ones(8, 8, device=device)
        with autocast(device, precision):
            dtype = (probe @ probe).dtype
        for size in sizes:
            a = torch.full((size, size), 0.5, device=device, dtype=dtype)
            for _ in range(tries):
                _wait(device)
                start = time.perf_counter()
                a @ a
                _wait(device)
                best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Monitor:
    """Makes the fields of the module's table. Built from the whole model, before it is spread over processes.

    In a loop: `begin` once, then in each step `before_update` when the gradients are there, `after_update`, `record`.

    Args:
        model: of any family, on its device.
        context: tokens of a sequence, for the FLOPs of attention.
        precision: of the matrix products, in which the peak is measured.
        every: steps between two of what comes by part; the first step has it.
        bytes_per_token: of the training text, for bits_per_byte.
        likelihood: whether the loss is in nats of a token; else perplexity and bits_per_byte are left out.
        peak: FLOP/s of one device, instead of measuring.

    Raises:
        ConfigError: every below 1, bytes_per_token not above 0.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        context: int,
        precision: TrainPrecision = "fp32",
        every: int = 10,
        bytes_per_token: float | None = None,
        likelihood: bool = True,
        peak: float | None = None,
    ) -> None:
        if every < 1:
            raise ConfigError(f"every ({every}) must be at least 1 step: 1 shows gradients and updates by part at each step")
        if bytes_per_token is not None and not bytes_per_token > 0:
            raise ConfigError(f"bytes_per_token ({bytes_per_token}) must be above 0: bytes of the text / its tokens")
        self._every, self._bytes, self._likelihood = every, bytes_per_token, likelihood
        parts = profile(model, context).parts
        self._source_flops = 3 * sum(p.flops for p in parts if p.name.startswith("encoder"))  # backward is twice forward
        self._flops = 3 * sum(p.flops for p in parts) - self._source_flops
        self._peak = peak or measured_peak(model.device, precision, torch.get_num_threads())
        self._device = model.device
        self.begin(model)

    def begin(self, model: nn.Module, strategy: Alone = ALONE) -> None:
        """Watch `model` as `strategy` has placed it from here on. Every process calls it, here and below."""
        self._strategy, self._communicated = strategy, strategy.seconds
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        # Of what several processes hold, one counts; of what none but it holds, every process.
        own = [(part(name), p) for name, p in named if strategy.held(name, p).writes]
        self._parts = _everywhere(list(dict.fromkeys(part(name) for name, _ in named)))
        self._params = [p for _, p in own]
        self._place = [self._parts.index(name) for name, _ in own]
        self._before: list[Tensor] | None = None  # weights of a step that is shown by part, until its update
        self._by_part: dict[str, dict[str, float]] = {}

    def _due(self, step: int) -> bool:
        return (step - 1) % self._every == 0

    def before_update(self, step: int) -> None:
        """Gradients of `step` (counted from 1) are in the parameters, and neither clipped nor used yet."""
        self._by_part, self._before = {}, None
        if self._due(step):
            norms = self._norms([p.grad for p in self._params])
            self._by_part["grad_norm_by_part"] = dict(zip(self._parts, norms, strict=True))
            self._before = [_local(p).clone() for p in self._params]

    def after_update(self, step: int) -> None:
        """The weights are those after `step`."""
        if self._before is None:  # an empty list is a process that counts none: it takes part all the same
            return
        changes = [_local(p) - old for p, old in zip(self._params, self._before, strict=True)]
        ratios = zip(self._parts, self._norms(changes), self._norms(self._before), strict=True)
        self._by_part["update_ratio_by_part"] = {name: change / size if size else 0.0 for name, change, size in ratios}
        self._before = None

    @torch.no_grad()
    def _norms(self, tensors: Sequence[Tensor | None]) -> list[float]:
        """Of each part, over all processes."""
        there = [(i, _local(x)) for i, x in zip(self._place, tensors, strict=True) if x is not None]
        there = [(i, x) for i, x in there if x.numel()]
        squares = torch.zeros(len(self._parts), dtype=torch.float64, device=self._device)
        if there:
            norms = torch.stack(list(torch._foreach_norm([x for _, x in there], 2, dtype=torch.float32))).double()
            squares.index_add_(0, torch.tensor([i for i, _ in there], device=self._device), norms * norms)
        roots: list[float] = dist.all_reduce_sum(squares).sqrt().tolist()
        return roots

    def record(self, loss: float, micro: Iterable[Batch], *, seconds: float, waited: float) -> dict[str, Any]:
        """What joins a step's record.

        Args:
            loss: mean over its targets, nats.
            micro: its batches, those of all processes.
            seconds: that it took, and `waited` of them for batches.
        """
        fields: dict[str, Any] = {}
        if self._likelihood:
            fields |= quality(loss, self._bytes)
        spoken, self._communicated = self._strategy.seconds - self._communicated, self._strategy.seconds
        flops = sum(
            self._flops * b.ids.numel() + self._source_flops * (b.ids if b.source is None else b.source.ids).numel()
            for b in micro
        )
        fields |= {
            "step_seconds": seconds,
            "data_share": waited / seconds,
            "communication_share": spoken / seconds,
            "mfu": flops / (seconds * self._peak * dist.world_size()),
            "peak_memory": peak_memory(),
        }
        if self._device.type == "cuda":
            fields["peak_device_memory"] = torch.cuda.max_memory_allocated(self._device)
        fields |= self._by_part
        self._by_part, self._before = {}, None
        return fields


def quality(loss: float, bytes_per_token: float | None = None) -> dict[str, float]:
    """perplexity = exp(loss), and bits_per_byte = loss / ln 2 / bytes_per_token where that is known; loss in nats of a token."""
    fields = {"perplexity": math.exp(loss) if loss < 700 else math.inf}
    if bytes_per_token is not None:
        fields["bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return fields


def _everywhere(names: list[str]) -> list[str]:
    """The names that any process has, in the same order on all of them."""
    if dist.world_size() == 1:
        return names
    found: list[list[str]] = [[]] * dist.world_size()
    torch.distributed.all_gather_object(found, names)
    return list(dict.fromkeys(name for theirs in found for name in theirs))


def heldout(
    model: LanguageModel,
    objective: Objective,
    batches: Sequence[Batch],
    *,
    precision: TrainPrecision = "fp32",
    strategy: Alone = ALONE,
    bytes_per_token: float | None = None,
) -> Callable[[int], dict[str, Any]]:
    """A hook's function: the mean loss over `batches` that are never trained on, as heldout_loss, heldout_perplexity and, where
    bytes_per_token is given, heldout_bits_per_byte. Without dropout, gradients or another effect on the training.

    It raises NoTargetsError when nothing in the batches is supervised.
    """

    @torch.no_grad()
    def measure(step: int) -> dict[str, Any]:
        was = model.training
        model.eval()
        sums = strategy.evaluate(model, objective, batches, precision)
        model.train(was)
        total, count = float(sums.loss), sums.count
        if not count:
            raise NoTargetsError("no supervised target in the held-out batches: nothing can be measured on them")
        loss = total / count
        return {f"heldout_{name}": value for name, value in {"loss": loss, **quality(loss, bytes_per_token)}.items()}

    return measure
