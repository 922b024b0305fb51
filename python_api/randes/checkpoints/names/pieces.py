"""Tensors that are other tensors' elements in another order: renamed, stacked, cut, transposed.

What Transformers changes between a file and a module are such, whatever it is called there; so is the way back.
A ``Piece`` says it of a block of elements, with the same sizes and other strides on both sides:

    target.as_strided(shape, to_stride, to_offset) = source.as_strided(shape, from_stride, from_offset)

both contiguous. Read from right to left it is the way back.
"""

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from randes.checkpoints.lazy_tensors import LazyTensors, chunk_bounds, digests, headers, rows
from randes.checkpoints.on_disk import StoredTensors
from randes.checkpoints.remote.locations import Location


class Piece(NamedTuple):
    """A block of elements of a target, and where they are in ``source``: sizes, strides and offsets in elements."""

    source: str
    shape: tuple[int, ...]
    to_stride: tuple[int, ...]
    to_offset: int
    from_stride: tuple[int, ...]
    from_offset: int

    def back(self, target: str) -> "Piece":
        """The same elements of ``source``, found in the target of that name."""
        return Piece(target, self.shape, self.from_stride, self.from_offset, self.to_stride, self.to_offset)

    def fits(self, target: int, source: int) -> bool:
        """Whether its elements are among so many of either."""
        sides = (self.to_stride, self.to_offset, target), (self.from_stride, self.from_offset, source)
        return all(
            len(strides) == len(self.shape)
            and offset + sum((size - 1) * stride for size, stride in zip(self.shape, strides, strict=True)) < count
            for strides, offset, count in sides
        )

    def within(self, start: int, end: int, row: int) -> "Piece | None":
        """The part of it in the target's rows ``start`` to ``end``, of ``row`` elements each, with its offset counted
        from ``start``; None where there is none of it.

        Raises ``ValueError`` where its elements cannot be told apart by rows.
        """
        first = self.to_offset // row
        extents = [(size - 1) * stride for size, stride in zip(self.shape, self.to_stride, strict=True)]
        down = next((dim for dim, stride in enumerate(self.to_stride) if stride == row and self.shape[dim] > 1), None)
        rest = sum(extents) - (extents[down] if down is not None else 0)
        if self.to_offset % row + rest >= row:
            raise ValueError("its rows are not the target's")
        low, high = max(start - first, 0), min(end - first, self.shape[down] if down is not None else 1)
        if low >= high:
            return None
        offset = self.to_offset + low * row - start * row
        if down is None:
            return self._replace(to_offset=offset)
        shape = (*self.shape[:down], high - low, *self.shape[down + 1 :])
        return self._replace(
            shape=shape, to_offset=offset, from_offset=self.from_offset + low * self.from_stride[down]
        )  # fmt: skip

    def rows_read(self, row: int) -> tuple[int, int]:
        """The run of the source's rows, of ``row`` elements each, that its elements are in."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.from_stride, strict=True))
        return self.from_offset // row, (self.from_offset + last) // row + 1


class Rearranged(LazyTensors):
    """Tensors by name of which each is made of pieces of ``source``'s when it is asked for, a run of rows at a time
    where its pieces are in runs of rows too.

    shapes: of each. A name that ``pieces`` has not is the source's own of the name in ``own_names``.
    """

    def __init__(
        self, source: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]],
        pieces: Mapping[str, tuple[Piece, ...]], own_names: Mapping[str, str],
    ) -> None:  # fmt: skip
        held = headers(source)
        found = {name: held[own] for name, own in own_names.items()}
        for name, some in pieces.items():
            found[name] = torch.empty(shapes[name], dtype=held[some[0].source].dtype, device="meta")
        super().__init__(found)
        self.source, self.pieces, self.own_names = source, dict(pieces), dict(own_names)
        self._shapes = dict(shapes)
        self.below = [source] if isinstance(source, LazyTensors) else []

    def chunks(self, name: str) -> Iterator[Tensor]:
        bounds = chunk_bounds(self.headers[name])
        if len(bounds) == 1 or not self._near(name, *bounds[0]):
            whole = self._whole(name)
            yield from ((whole[start:end] if whole.dim() else whole) for start, end in bounds)
            return
        for start, end in bounds:
            yield self.rows(name, start, end)

    def rows(self, name: str, start: int, end: int) -> Tensor:
        if name in self.own_names:
            return rows(self.source, self.own_names[name], start, end)
        header = self.headers[name]
        row = header.numel() // len(header)
        try:
            found = [piece.within(start, end, row) for piece in self.pieces[name]] if row else []
        except ValueError:
            return self._whole(name)[start:end]
        made = torch.zeros((end - start, *header.shape[1:]), dtype=header.dtype, device="cpu")
        for piece in found:
            if piece is not None:
                self._copy(piece, made)
        return made

    def renamed(self, names: Mapping[str, str]) -> "Rearranged":
        """Some of the tensors under other names: of each new name the one here."""
        pieces = {new: self.pieces[old] for new, old in names.items() if old in self.pieces}
        own = {new: self.own_names[old] for new, old in names.items() if old in self.own_names}
        return Rearranged(self.source, {new: self._shapes[names[new]] for new in pieces}, pieces, own)

    def expect(self, known: Mapping[str, str], altered: Callable[[Location, str], Exception]) -> None:
        """Hold the files that the source lies in to these digests, of the tensors here, which were just found."""
        if isinstance(self.source, StoredTensors):
            own = {before: known[name] for name, before in self.own_names.items()}
            self.source.expect(own | digests(self.source, [n for n in self.source if n not in own]), altered)

    def _whole(self, name: str) -> Tensor:
        if name in self.own_names:
            return self.source[self.own_names[name]]
        if (held := self._held.get(name)) is not None:
            return held
        header = self.headers[name]
        made = torch.zeros(header.shape, dtype=header.dtype, device="cpu")
        for piece in self.pieces[name]:
            self._copy(piece, made)
        return made

    def _copy(self, piece: Piece, into: Tensor) -> None:
        if 0 in piece.shape:
            return
        header = headers(self.source)[piece.source]
        if header.dim() == 0:
            part, first, row = self.source[piece.source].reshape(1), 0, 1
        else:
            row = header.numel() // len(header)
            first, last = piece.rows_read(row)
            part = rows(self.source, piece.source, first, last)
        found = _strided(part.contiguous(), piece.shape, piece.from_stride, piece.from_offset - first * row)
        _strided(into, piece.shape, piece.to_stride, piece.to_offset).copy_(found)

    def _near(self, name: str, start: int, end: int) -> bool:
        """Whether a run of its rows is made of about as much of the source."""
        header = self.headers[name]
        if name in self.own_names:
            return True
        row, read = header.numel() // len(header), 0
        try:
            found = [piece.within(start, end, row) for piece in self.pieces[name]]
        except ValueError:
            return False
        for piece in found:
            if piece is not None:
                own = headers(self.source)[piece.source]
                width = own.numel() // len(own) if own.dim() else 1
                first, last = piece.rows_read(width)
                read += (last - first) * width
        return read <= 2 * (end - start) * row


def _strided(value: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Tensor:
    """Elements of a contiguous tensor, which may be a part of another's memory; ``as_strided`` counts from that's."""
    return value.as_strided(shape, stride, int(value.storage_offset()) + offset)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
