"""How the tensors of a module of ours lie in a Hugging Face file: the entries of an architecture's key map.

A plain string says: in the module of that name, under the same leaf names ("weight", "bias"). The classes here say the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


class Entry:
    """Where one module's tensors lie in a file. A part of ours is a view, so that a file may be read straight into it."""

    @property
    def names(self) -> tuple[str, ...]:
        """Their modules."""
        raise NotImplementedError  # every entry defines it

    def parts(self, leaf: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Their tensors' full names, each with the view of our `tensor` that holds it."""
        raise NotImplementedError  # every entry defines it

    def written(self, leaf: str, tensor: Tensor) -> Tensor:
        """Our tensor in the order of rows in which `parts` are to be taken for a file."""
        return tensor

    def settle(self, leaf: str, tensor: Tensor) -> None:
        """The inverse of `written`, in place, after all parts were read."""


@dataclass(frozen=True)
class Same(Entry):
    """One module, the same tensors."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def parts(self, leaf: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield f"{self.name}.{leaf}" if self.name else leaf, tensor


@dataclass(frozen=True)
class Fused(Entry):
    """One matrix of ours that is several in a file: their modules' names and rows, in the order of our rows."""

    modules: tuple[str, ...]
    rows: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return self.modules

    def parts(self, leaf: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        for name, part in zip(self.modules, tensor.split(self.rows), strict=True):
            yield f"{name}.{leaf}", part


@dataclass(frozen=True)
class Transposed(Entry):
    """One module whose matrix is (in, out) in the file (GPT-2's Conv1D)."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def parts(self, leaf: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield f"{self.name}.{leaf}", tensor.t() if tensor.ndim == 2 else tensor


@dataclass(frozen=True)
class Experts(Entry):
    """Matrices of E experts, one tensor (E, rows, columns) of ours, that are modules of their own in a file.

    modules  for each expert the names of its modules, in the order of our rows
    rows     rows of each
    """

    modules: tuple[tuple[str, ...], ...]
    rows: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for expert in self.modules for name in expert)

    def parts(self, leaf: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        for expert, matrix in zip(self.modules, tensor, strict=True):
            for name, part in zip(expert, matrix.split(self.rows), strict=True):
                yield f"{name}.{leaf}", part


@dataclass(frozen=True, eq=False)
class Rows(Entry):
    """One module whose rows stand in another order in the file: ours[i] = theirs[index[i]]."""

    name: str
    index: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def parts(self, leaf: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield f"{self.name}.{leaf}", tensor

    def written(self, leaf: str, tensor: Tensor) -> Tensor:
        return tensor[self.index.argsort().to(tensor.device)]

    def settle(self, leaf: str, tensor: Tensor) -> None:
        tensor.copy_(tensor[self.index])


def entry(value: str | Entry) -> Entry:
    """A string as the entry that it stands for."""
    return Same(value) if isinstance(value, str) else value
