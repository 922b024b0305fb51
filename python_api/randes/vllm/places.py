"""Where vLLM lays a store's tensors: fused, cut over devices, renamed or padded, as its own loaders do it.

Nothing of that is worked out here. Each tensor is loaded by the model itself with numbers in the place of its values,
once that of the row and once that of the column, and what the parameters hold then says which part of which tensor
went where.
"""

from collections.abc import Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from randes.checkpoints.lazy_tensors import LazyTensors, chunk_bounds, headers
from randes.errors import CheckpointError
from randes.superposition.superposition import Superposition


@dataclass(frozen=True)
class Place:
    """A rectangle of a tensor of a superposition, and the rows of a parameter that hold it.

    rows: of the parameter. first_row, first_column: of the tensor. columns: how many; 1 of a vector.
    """

    tensor: str
    rows: range
    first_row: int
    first_column: int
    columns: int


class Numbers(LazyTensors):
    """Tensors of a superposition's names and shapes that hold, in int32, their elements' row or column plus one; rows
    are counted on from one tensor to the next. vectors: those that stand as one row each."""

    def __init__(self, like: Mapping[str, Tensor], vectors: Collection[str], *, rows: bool) -> None:
        super().__init__({name: torch.empty(one.shape, dtype=torch.int32, device="meta") for name, one in like.items()})
        self._rows, self._vectors, self.first, total = rows, vectors, {}, 0
        for name, one in like.items():
            self.first[name] = total
            total += one.shape[name in vectors] if one.dim() else 1

    def chunks(self, name: str) -> Iterator[Tensor]:
        whole = self.read(name)
        yield from (whole[start:end] for start, end in chunk_bounds(whole))

    def read(self, name: str) -> Tensor:
        """Without memory of its own."""
        shape = self.headers[name].shape
        if len(shape) == 0:
            return torch.tensor(1 + self.first[name] * self._rows, dtype=torch.int32)
        if not self._rows and (len(shape) != 2 or name in self._vectors):
            return torch.ones((), dtype=torch.int32).expand(shape)
        if name in self._vectors:
            return torch.arange(1, 1 + shape[1], dtype=torch.int32)[None] + self.first[name]
        length = shape[0] if self._rows else shape[1]
        numbers = torch.arange(1, 1 + length, dtype=torch.int32) + self.first[name] * self._rows
        return numbers.view(-1, *[1] * (len(shape) - 1)).expand(shape) if self._rows else numbers.expand(shape)


def places_in(model: nn.Module, superposition: Superposition, wanted: AbstractSet[str]) -> dict[str, list[Place]]:
    """Of each parameter of a vLLM model the places of the ``wanted`` tensors in it, by their rows.

    The parameters are what they were afterwards. Raises ``CheckpointError`` for a wanted tensor that is nowhere, or not
    in one piece.
    """
    held = headers(superposition.base)
    by_row, by_column = (Numbers(held, superposition.layout.vectors, rows=rows) for rows in (True, False))
    row_files, column_files = (
        superposition.to_files.apply(superposition.layout.joined(n)) for n in (by_row, by_column)
    )
    parameters: dict[str, Any] = dict(model.named_parameters())
    values = {name: parameter.requires_grad_(False).data for name, parameter in parameters.items()}
    found: dict[str, list[Place]] = {}
    names = sorted(by_row.first, key=lambda name: by_row.first[name])
    starts = torch.tensor([by_row.first[name] for name in names])
    try:
        for name, parameter in parameters.items():
            parameter.data = _nothing(values[name])
        tied: dict[int, list[str]] = {}  # names of one tensor, which a model may want together
        for file, header in headers(row_files).items():
            if header.numel():
                tied.setdefault(int(row_files[file][(0,) * header.dim()]), []).append(file)
        for files in tied.values():
            rows = _loaded(model, parameters, {file: row_files[file] for file in files})
            columns = _loaded(model, parameters, {file: column_files[file] for file in files})
            for parameter, numbers in rows.items():
                for place in _rectangles(files[0], parameter, numbers, columns[parameter], names, starts):
                    if place.tensor in wanted:
                        found.setdefault(parameter, []).append(place)
    finally:
        for name, parameter in parameters.items():
            parameter.data = values[name]
    if nowhere := sorted(wanted - {place.tensor for places in found.values() for place in places}):
        raise CheckpointError(
            f"{len(nowhere)} tensors that models differ in are in no layer of vLLM's {type(model).__name__},"
            f" {nowhere[0]} the first: it would answer as the base there"
        )
    return {parameter: sorted(places, key=lambda place: place.rows.start) for parameter, places in found.items()}


def _loaded(model: Any, parameters: Mapping[str, Any], files: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is in the parameters that tensors went to, which are empty again afterwards."""
    names = model.load_weights(files.items())
    if names is None:
        raise CheckpointError(f"{type(model).__name__}.load_weights must say which parameters it loaded, got None")
    filled = {name: parameters[name].data for name in names if name in parameters}
    for name, value in filled.items():
        parameters[name].data = _nothing(value)
    return filled


def _nothing(like: Tensor) -> Tensor:
    """Zeros, which take no memory until they are written to."""
    return torch.from_numpy(np.zeros(like.shape, dtype=np.int32))


def _rectangles(
    file: str, parameter: str, rows: Tensor, columns: Tensor, names: list[str], starts: Tensor
) -> Iterator[Place]:  # fmt: skip
    rows, columns = (value if value.dim() == 2 else value.reshape(len(value), -1) for value in (rows, columns))
    width = rows.shape[1]
    filled = (rows[:, 0] > 0).nonzero().flatten()
    number = rows[filled, 0].long() - 1
    owner = torch.searchsorted(starts, number, right=True) - 1
    for index in sorted({*owner.tolist()}):
        where, first = filled[owner == index], number[owner == index] - starts[index]
        start, end = int(where[0]), int(where[-1]) + 1
        own, own_columns = rows[start:end], columns[start:end]
        if (
            len(where) != end - start
            or not torch.equal(first, torch.arange(int(first[0]), int(first[0]) + len(first)))
            or not (own == own[:, :1]).all()
            or not torch.equal(own_columns[0], torch.arange(width, dtype=torch.int32) + own_columns[0, 0])
            or not (own_columns == own_columns[:1]).all()
        ):
            raise CheckpointError(
                f"{file} must lie in one piece in vLLM's {parameter}, with its rows as rows, to be served superposed"
            )
        yield Place(names[index], range(start, end), int(first[0]), int(own_columns[0, 0]) - 1, width)
