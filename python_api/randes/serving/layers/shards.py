"""A rectangle of a matrix that one of several devices holds: its part of everything that is about the matrix."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from randes.superposition.packed_tensors import SuperposedDelta
from randes_kernels import Packed, Transform
from randes_kernels.format import shard_of
from randes_kernels.packing import cut

L = TypeVar("L", bound=nn.Module)


@dataclass(frozen=True)
class Shard:
    """Some rows and columns of a matrix (N, K), or some rows of a vector (N,), whose only column is column 0.

    shape: (N, K) of the whole. rows, columns: ranges in steps of 1, of any length, from any origin.
    Raises ``ValueError`` for ranges that lie outside.
    """

    shape: tuple[int, int]
    rows: range
    columns: range

    def __post_init__(self) -> None:
        shard_of(Transform(), self.shape, self.rows, self.columns)

    @classmethod
    def of(cls, shape: tuple[int, int], dim: int, rank: int, world: int) -> "Shard":
        """Part ``rank`` of ``world`` parts of the rows (dim 0, a column-parallel layer) or the columns (dim 1, a
        row-parallel one), as ``torch.chunk`` makes them: the last may be smaller.

        Raises ``ValueError`` for other numbers, and where there are not enough rows or columns for a part each.
        """
        if dim not in (0, 1) or not 0 <= rank < world:
            raise ValueError(f"dim must be 0 or 1 and rank one of {world}, got dim = {dim} and rank = {rank}")
        size = -(-shape[dim] // world)
        if (world - 1) * size >= shape[dim]:
            raise ValueError(f"world must leave each of its parts some of {shape[dim]}, got {world}")
        part = range(rank * size, min((rank + 1) * size, shape[dim]))
        whole = range(shape[0]), range(shape[1])
        return cls(shape, part, whole[1]) if dim == 0 else cls(shape, whole[0], part)

    @property
    def cuts_columns(self) -> bool:
        """Whether a product with it is a part of a sum."""
        return len(self.columns) < self.shape[1]

    def transform(self, whole: Transform) -> Transform:
        """The whole matrix's transform as this part has it. Raises ``ValueError`` where that cannot be cut."""
        return shard_of(whole, self.shape, self.rows, self.columns)

    def of_rows(self, values: Tensor) -> Tensor:
        """(..., N) → (..., n)"""
        return values[..., self.rows.start : self.rows.stop]

    def of_columns(self, values: Tensor) -> Tensor:
        """(..., K, r) → (..., k, r)"""
        return values[..., self.columns.start : self.columns.stop, :]

    def of_tensor(self, values: Tensor) -> Tensor:
        """(..., N, K) → (..., n, k), or (N,) → (n,)"""
        if values.dim() == 1:
            return self.of_rows(values)
        return values[..., self.rows.start : self.rows.stop, self.columns.start : self.columns.stop]

    def of_delta(self, delta: SuperposedDelta) -> SuperposedDelta:
        """(..., N, K) → (..., n, k), packed or not. Raises ``ValueError`` where what is packed cannot be cut there."""
        if isinstance(delta, Packed):
            return cut(delta, slice(self.rows.start, self.rows.stop), self.columns)
        return self.of_tensor(delta)


def own_copy(values: Tensor) -> Tensor:
    """A part of a tensor in memory of its own, in the same order of its last two dimensions."""
    if values.dim() >= 2 and values.stride(-2) == 1 != values.stride(-1):
        return values.mT.clone(memory_format=torch.contiguous_format).mT
    return values.clone(memory_format=torch.contiguous_format)


def shallow_copy(layer: L) -> L:
    """Another layer with the same tensors, of which one can be changed without the other."""
    made = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict | set):
            vars(made)[name] = copy.copy(value)
    return made


def cut_buffers(layer: Any, parts: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
    """Put parts in the place of a layer's buffers, where it has them."""
    for name, part in parts.items():
        if (held := layer._buffers.get(name)) is not None:
            layer._buffers[name] = own_copy(part(held))
