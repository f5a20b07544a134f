"""What a training step needs of memory, before it starts: the step is rehearsed on tensors without data (`budget_trace.py`).

| part        | what it is                                                                                  |
| ----------- | ------------------------------------------------------------------------------------------- |
| weights     | as they are stored; of QLoRA 4 bits (NF4) and scales for the matrices of layers             |
| gradients   | of what is trained                                                                          |
| optimizer   | moments, factors, float32 master copies of bfloat16 weights                                 |
| casts       | copies of weights in the dtype of the products, kept by autocast until the backward pass    |
| activations | what the forward pass keeps for the backward pass                                           |
| loss        | chunks of logits, and the gradients that are formed beside the loss                         |
| working     | what the backward pass or the optimiser holds for a moment                                  |

Parts are those of the moment of the peak: at the end of a forward pass, for one, there may be no gradients yet.
Several processes are arithmetic over that (`divided`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from athanor.core.device import Precision
from athanor.core.errors import ConfigError, nearest
from athanor.models.base import Encoder, EncoderDecoder, LanguageModel, sizes
from athanor.nn.context import Bidirectional, Causal, Memory, WithMemory
from athanor.nn.recurrent import Recurrent
from athanor.objectives import next_token
from athanor.optim.build import Name, OptimConfig, build
from athanor.train.budget_trace import PARTS, UNFORESEEN, Block, Composition, Live, compose, rehearsing, shadow
from athanor.train.checkpointing import checkpoint
from athanor.train.parallel.layout import Layout
from athanor.train.step import Objective, train_step
from athanor.types import Batch

Numbers = Literal["fp32", "bf16", "bf16-pure"]
Checkpointing = Literal["none", "selective", "full"]
Tuning = Literal["full", "lora", "qlora"]
# Of 4-bit NormalFloat in blocks of 64 with scales quantised once more (Dettmers et al. 2023, section 3): 4 + 0.127 bits a weight.
NF4 = 0.5 + 0.127 / 8
# Of a process on a CPU beside its tensors, measured (bench/memory.py): what kernels and the allocator keep however small a model
# is, and holes in glibc's heap as large as the short-lived tensors of a block: bytes for each of tokens x width.
SCRATCH, HOLES = 60_000_000, 155
# Under fsdp weights and gradients that stand outside of blocks are fetched, copied and given back whole; measured too.
FETCHED = 3


def resident(tensors: int, tokens: int, width: int, held: int = 0) -> int:
    """Bytes by which a process on a CPU grows.

    Args:
        tensors: bytes of these at the peak.
        tokens, width: of a micro-batch, and of the model.
        held: gradients that stay between micro-batches; new ones are formed beside them, which leaves holes of that size. And
            what fsdp fetches and gives back.
    """
    return tensors + SCRATCH + HOLES * tokens * width + held


@dataclass(frozen=True)
class Setup:
    """How a model is to be trained.

    batch_tokens   tokens of one update, on all processes together
    accumulate     micro-batches that an update is split into
    context        tokens of a row
    precision      fp32; bf16 products over fp32 weights (autocast); bf16-pure: weights too, with fp32 masters in the optimiser
    checkpointing  what of a block is computed again in the backward pass: none, full (all), selective (all but products)
    optimizer      adamw, muon, sgd or adafactor
    tune           full; lora and qlora train two small matrices beside each target
    rank           of these
    targets        patterns of names of the linear layers that have them
    layout         of processes
    fused          whether attention runs in fused kernels at every length, as on GPUs; CPUs keep the scores of short rows
    """

    batch_tokens: int = 8192
    accumulate: int = 1
    context: int = 256
    precision: Numbers = "bf16"
    checkpointing: Checkpointing = "none"
    optimizer: Name = "muon"
    tune: Tuning = "full"
    rank: int = 16
    targets: tuple[str, ...] = ("*",)
    layout: Layout = Layout()
    fused: bool = False

    def __post_init__(self) -> None:
        choices = {"precision": Numbers, "checkpointing": Checkpointing, "optimizer": Name, "tune": Tuning}
        for name, known in choices.items():
            value, allowed = getattr(self, name), get_args(known)
            if value not in allowed:
                raise ConfigError(f"{name} ({value!r}) must be one of {', '.join(allowed)}{nearest(value, allowed)}")
        for name in ("batch_tokens", "accumulate", "context", "rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.tune == "full" and (self.rank, self.targets) != (16, ("*",)):
            raise ConfigError(f"rank ({self.rank}) and targets ({', '.join(self.targets)}) are of lora and qlora: give tune too")
        if self.rows < 1:
            raise ConfigError(
                f"batch_tokens ({self.batch_tokens}) over {self.layout.data} processes and {self.micro} micro-batches is"
                f" {self.batch_tokens // (self.layout.data * self.micro)} tokens, less than a row of context"
                f" ({self.context}): raise batch_tokens, or lower accumulate or context"
            )

    @property
    def micro(self) -> int:
        """Micro-batches of an update on one process: a pipeline has as many in flight at least."""
        return max(self.accumulate, self.layout.in_flight if self.layout.pp > 1 else 1)

    @property
    def rows(self) -> int:
        """Rows of a micro-batch on one process."""
        return self.batch_tokens // (self.layout.data * self.micro * self.context)


@dataclass(frozen=True)
class Need:
    """What one process needs, bytes.

    parts        {part: bytes} at the peak
    peak         their sum: bytes of tensors
    resident     what the process grows by, holes of the allocator included
    trainable    parameters that are trained
    peer_logits  what a loss over all logits at once would hold besides: logits and their gradient in float32
    """

    parts: dict[str, int]
    peak: int
    resident: int
    trainable: int
    peer_logits: int


def predict(model: LanguageModel, setup: Setup, objective: Objective | None = None) -> Need:
    """The memory of one process at the peak of an update.

    Args:
        model: on any device or none; unchanged.
        setup: how it is trained.
        objective: what it is trained for; predicting every token of every row by default.

    Raises:
        ConfigError: a context that the model does not take, a model that is not of language, targets that name no layer.
    """
    if setup.context > model.config.max_positions:
        raise ConfigError(f"context ({setup.context}) must be at most {model.config.max_positions}, the longest this model takes")
    objective = objective or objective_of(model)
    if any(isinstance(m, Recurrent) for m in model.modules()):
        raise ConfigError(f"a {model.model_type} is recurrent, and what its kernels keep is not known without running them")
    try:
        found, trained = rehearse(model, setup, objective)
    except UNFORESEEN as error:
        raise ConfigError(f"what a {model.model_type} keeps depends on its data ({error}), so it cannot be planned") from error
    parts = divided(found.blocks, model, setup)
    if setup.tune == "qlora":
        parts["weights"] -= _nf4(model, setup)
    peak = sum(parts.values())
    tokens = setup.rows * setup.context
    held = parts["gradients"] if setup.micro > 1 else 0
    if setup.layout.fsdp > 1:
        held += FETCHED * 4 * _outside(model)
    return Need(parts, peak, resident(peak, tokens, model.config.d_model, held), trained, 8 * tokens * model.config.vocab_size)


def objective_of(model: LanguageModel) -> Objective:
    """An objective for the kind of model, over every token of rows of one length."""
    if model.kind == "decoder":
        return next_token.loss
    if isinstance(model, (Encoder, EncoderDecoder)):
        return _every_token
    raise ConfigError(f"a {model.model_type} is a {model.kind}, and memory is planned for language models: give one of these")


def _every_token(model: Any, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
    rows = batch.ids.view(len(batch.lengths), -1)
    if isinstance(model, EncoderDecoder):
        memory = Memory(model.encode(rows, Bidirectional(*rows.shape)))
        hidden = model.hidden(rows, WithMemory(Causal(*rows.shape), memory))
    else:
        hidden = model.hidden(rows, Bidirectional(*rows.shape))
    loss, correct = model.cross_entropy(hidden.flatten(0, 1), batch.labels)
    return loss, batch.labels.numel(), {"correct": correct}


def rehearse(model: LanguageModel, setup: Setup, objective: Objective) -> tuple[Composition, int]:
    """The peak of an update that is not the first, of one process, and how many parameters are trained."""
    ids = torch.zeros(setup.rows * setup.context, dtype=torch.int64)
    batch = Batch(ids, ids, torch.full((setup.rows,), setup.context), origin="rehearsal")
    store = torch.bfloat16 if setup.precision == "bf16-pure" or setup.tune == "qlora" else torch.float32
    with rehearsing(setup.fused) as live:
        twin = shadow(model, live, lambda p: store if p.is_floating_point() else p.dtype)
        if setup.tune != "full":
            attach(twin, setup.rank, setup.targets)
        if setup.checkpointing != "none":
            checkpoint(twin, setup.checkpointing)
        twin.train()
        optimizers = build(twin, OptimConfig(name=setup.optimizer), bf16=setup.precision != "fp32")
        # Weights in bfloat16 multiply in bfloat16 without autocast.
        precision: Precision = "bf16" if setup.precision == "bf16" else "fp32"
        watched = _watched(live, twin, objective)
        trained = [p for p in twin.parameters() if p.requires_grad]
        live.part = "optimizer"
        for p in trained:
            p.grad = torch.empty_like(p)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state = {n for n, block in live.blocks.items() if block.part in ("optimizer", "casts")}
        live.part = "working"
        live.restart()
        # The second micro-batch finds the gradients of the first; later ones find nothing new.
        train_step(twin, watched, [batch] * min(setup.micro, 2), optimizers, lr_factor=1.0, clip=1.0, precision=precision)
        return compose(live, trained, state), sum(p.numel() for p in trained)


def _watched(live: Live, model: Any, objective: Objective) -> Objective:
    """The objective, which says what it is doing when it makes a tensor."""
    plain = model.cross_entropy

    def cross_entropy(*args: Any) -> Any:
        live.part = "loss"
        try:
            return plain(*args)
        finally:
            live.part = "activations"

    def watched(model: Any, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        live.part = "activations"
        try:
            return objective(model, batch)
        finally:
            live.part = "working"

    model.cross_entropy = cross_entropy
    return watched


class _Adapter(nn.Module):
    """y = W x + B A x beside a frozen layer (LoRA, Hu et al. 2021): only for the bytes and FLOPs that it costs."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.weight, self.bias = layer.weight, layer.bias
        self.down = nn.Parameter(torch.zeros(rank, layer.in_features, device=layer.weight.device))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        kind = x.dtype
        beside: Tensor = (x @ self.down.t().to(kind)) @ self.up.t().to(kind)
        y: Tensor = self.layer(x)
        return y + beside.to(y.dtype)


def attach(model: nn.Module, rank: int, targets: Sequence[str]) -> None:
    """Freeze the model and put two matrices beside each linear layer within its lists of layers that a pattern names.

    Raises ConfigError where no pattern names one.
    """
    model.requires_grad_(False)
    layers = linears(model)
    chosen = [n for n in layers if any(fnmatchcase(n, t) or fnmatchcase(n.rpartition(".")[2], t) for t in targets)]
    if not chosen:
        leaves = sorted({n.rpartition(".")[2] for n in layers})
        raise ConfigError(f"targets ({', '.join(targets)}) name no linear layer: use some of {', '.join(leaves)}, or '*'")
    for name in chosen:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _Adapter(layers[name], rank))


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers within lists of layers, by name."""
    return {
        f"{at}.{name}": m
        for at, layers in model.named_modules()
        if isinstance(layers, nn.ModuleList)
        for name, m in layers.named_modules()
        if isinstance(m, nn.Linear)
    }


def _outside(model: LanguageModel) -> int:
    """Parameters outside of lists of layers."""
    inside = {x: n for layers in model.modules() if isinstance(layers, nn.ModuleList) for x, n in sizes(layers).items()}
    return model.n_parameters() - sum(inside.values())


def divided(blocks: Sequence[Block], model: LanguageModel, setup: Setup) -> dict[str, int]:
    """Bytes of the parts on the fullest process of a layout.

    | direction | what is divided                                                                                       |
    | --------- | ----------------------------------------------------------------------------------------------------- |
    | fsdp      | weights, gradients, optimiser state                                                                   |
    | tp        | these, outside of embeddings; activations, but what blocks read is gathered                           |
    | pp        | these by whole layers; activations likewise, for each micro-batch that is under way                   |

    fsdp holds besides what stands outside of blocks whole, and with zero 3 two blocks (the next one is fetched meanwhile),
    with zero 2 all. Copies (ddp) sum gradients in buckets of 32 MiB.
    """
    layout = setup.layout
    outside, total = _outside(model), model.n_parameters()
    within = total - outside
    ends = 2 if getattr(model, "head", None) is not None else 1
    held = within / layout.tp / layout.pp + outside / (ends if layout.pp > 1 else 1)  # first and last stage hold an end each
    shared = held / total / layout.fsdp
    flight = 1.0
    if layout.pp > 1:
        flight = (setup.micro if layout.schedule == "gpipe" else min(setup.micro, layout.pp)) / layout.pp

    def size(b: Block) -> float:
        if b.part in ("weights", "gradients", "optimizer"):
            return b.size * shared
        if b.part == "casts":
            return b.size * held / total
        if b.part == "activations":
            gathered = (1 + 1 / layout.tp) / 2 if b.width == model.config.d_model else 1 / layout.tp
            return b.size * gathered * flight
        return b.size

    parts = {part: round(sum(size(b) for b in blocks if b.part == part)) for part in PARTS}
    width = 2 if setup.precision == "bf16-pure" else 4
    layers = max(1, model.config.n_layers)
    if layout.fsdp > 1:
        gathered = within / layout.tp / layout.pp if layout.zero == 2 else 2 * within / layers / layout.tp
        parts["working"] += round(width * (gathered + held - within / layout.tp / layout.pp))
    elif layout.ddp > 1:
        parts["working"] += min(4 << 23, parts["gradients"])
    return parts


def _nf4(model: LanguageModel, setup: Setup) -> int:
    """Bytes by which matrices of layers shrink from bfloat16, less the one that is made whole for its product."""
    sizes = [m.weight.numel() for m in linears(model).values()]
    layout = setup.layout
    return round(sum(sizes) * (2 - NF4) / (layout.fsdp * layout.tp * layout.pp)) - 2 * max(sizes, default=0)
