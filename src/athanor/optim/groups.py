"""What kind each parameter is of and how deep it lies: what weight decay, Muon and layer-wise rates go by."""

from __future__ import annotations

import re
from typing import Literal

from torch import Tensor, nn

from athanor.core.errors import ConfigError

Kind = Literal["matrix", "table", "vector"]
# By the names that modules have in `models/`. Rows of a table are looked up, so they are vectors that happen to lie together.
_TABLES = {"embedding", "positions", "segments", "relative", "crf"}
_OUTPUTS = {"head", "output", "emission", "following"}  # logits come out of them
_BLOCK = re.compile(r"(?:(?P<stack>.+?)\.)??(?:blocks|layers)\.(?P<index>\d+)\.")


def kind(name: str, parameter: Tensor, owner: nn.Module) -> Kind:
    """What a parameter is by its name in the model, its shape and the module that it belongs to.

    | kind   | which                                                                         | decay | Muon |
    | ------ | ----------------------------------------------------------------------------- | ----- | ---- |
    | matrix | two dimensions or more, not of the next row: hidden layers, experts, routers  | yes   | yes  |
    | table  | embeddings, positions, scores of tags, and matrices whose outputs are logits  | no    | no   |
    | vector | norms and biases                                                              | no    | no   |
    """
    if parameter.ndim < 2:
        return "vector"
    path = name.split(".")[:-1]
    if isinstance(owner, nn.Embedding) or not _TABLES.isdisjoint(path):
        return "table"
    outermost = path[1:2] if path[:1] == ["trunk"] else path[:1]
    return "matrix" if _OUTPUTS.isdisjoint(outermost) else "table"


def kinds(model: nn.Module) -> dict[str, Kind]:
    """The kind of each trainable parameter, by its name; tied ones stand once."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            found[name] = kind(name, p, model.get_submodule(name.rpartition(".")[0]))
    return found


def heights(model: nn.Module) -> dict[str, int]:
    """How many steps of depth each trainable parameter lies below the output.

    Block l = 0 .. L-1 of a stack of L lies L - l below; what a stack (or the model) has before its blocks L + 1, what comes after
    them 0. The stacks of an encoder-decoder are counted each by itself, and their common embedding lies below the deeper one.

    Raises:
        ConfigError: a model without blocks.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    at = {name: match for name, _ in model.named_parameters() if (match := _BLOCK.match(name))}
    if not at:
        raise ConfigError(f"{type(model).__module__} has no blocks, so optim.layer_decay has nothing to go by: leave it at 1")
    sizes: dict[str, int] = {}
    for match in at.values():
        stack = match["stack"] or ""
        sizes[stack] = max(sizes.get(stack, 0), int(match["index"]) + 1)
    begun: set[str] = set()
    order = {}
    for name, _ in model.named_parameters():
        if name in at:
            stack = at[name]["stack"] or ""
            begun.add(stack)
            order[name] = sizes[stack] - int(at[name]["index"])
            continue
        inside = [stack for stack in sizes if stack and name.startswith(stack + ".")]
        around = inside or list(sizes)
        # A parameter of the model itself, such as a bias of its logits, is registered first though it is used last.
        before = "." in name and not begun.intersection(around)
        order[name] = max(sizes[stack] for stack in around) + 1 if before else 0
    return {name: order[name] for name in names}
