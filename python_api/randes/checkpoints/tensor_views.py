"""A checkpoint that is too large for memory as its layout's matrices, and back: each made when it is asked for."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from randes.checkpoints.lazy_tensors import LazyTensors, chunk_bounds, chunks, digests, headers, rows
from randes.checkpoints.names.pieces import Rearranged
from randes.checkpoints.on_disk import Overlay, StoredTensors, in_files
from randes.checkpoints.remote.locations import Location


@dataclass(frozen=True)
class View:
    """One tensor as matrices of its own columns, one below the other.

    shape: of the tensor. transposed: its last two dimensions change places first.
    parts: rows of each matrix by its name, in order. stacked: the first of three dimensions counts matrices.
    """

    shape: tuple[int, ...]
    parts: Mapping[str, int]
    transposed: bool = False
    stacked: bool = False

    def first_row(self, part: str) -> int:
        """Where a part that is not stacked begins."""
        names = list(self.parts)
        return sum(self.parts[name] for name in names[: names.index(part)])

    @property
    def vector(self) -> bool:
        """Whether the tensor is a single row, which layers do not multiply with."""
        return len(self.shape) == 1

    def matrices(self, value: Tensor) -> dict[str, Tensor]:
        """(N, K) of each part: views of ``value``."""
        if self.vector:
            return dict.fromkeys(self.parts, value[None])
        value = value.mT if self.transposed else value
        if self.stacked:
            return dict(zip(self.parts, value.unbind(0), strict=True))
        return dict(zip(self.parts, torch.split(value.flatten(1), list(self.parts.values())), strict=True))

    def tensor(self, matrices: Mapping[str, Tensor]) -> Tensor:
        """The tensor of these matrices."""
        held = [matrices[name] for name in self.parts]
        value = torch.stack(held) if self.stacked else torch.cat(held) if len(held) > 1 else held[0]
        return (value.mT if self.transposed else value).reshape(self.shape)


class SplitTensors(LazyTensors):
    """Lazy tensors as the matrices of ``views``, with no more than one matrix in memory, or one transposed weight.

    names: of each tensor that is to be here, before it is split, its name in ``source``.
    """

    def __init__(self, source: LazyTensors, views: Mapping[str, View], names: Mapping[str, str]) -> None:
        held = source.headers
        found: dict[str, Tensor] = {}
        self.where: dict[str, tuple[str, View | None]] = {}
        for name, own in names.items():
            view = views.get(name)
            matrices = {name: held[own]} if view is None else view.matrices(_like(held[own], held[own].shape))
            found |= matrices
            self.where |= dict.fromkeys(matrices, (own, view))
        super().__init__(found)
        self.source = source
        self.below = [source]

    def chunks(self, name: str) -> Iterator[Tensor]:
        own, view = self.where[name]
        if view is None:
            yield from chunks(self.source, own)
            return
        if view.vector:
            yield self.source[own][None]
            return
        first = 0 if view.stacked else view.first_row(name)
        if not view.stacked and not view.transposed:
            for start, end in chunk_bounds(self.headers[name]):
                yield rows(self.source, own, first + start, first + end).flatten(1)
            return
        if view.stacked:
            number = list(view.parts).index(name)
            whole = rows(self.source, own, number, number + 1)[0]
        else:
            whole = self.source[own]
        whole = whole.mT if view.transposed else whole
        for start, end in chunk_bounds(self.headers[name]):
            yield whole[first + start : first + end].contiguous()

    def renamed(self, names: Mapping[str, str]) -> LazyTensors:
        """Some that are the source's own tensors, of files, under other names: of each new name the one here."""
        assert isinstance(self.source, StoredTensors | Rearranged)
        assert all(self.where[old][1] is None for old in names.values())
        return self.source.renamed({new: self.where[old][0] for new, old in names.items()})

    def expect(self, known: Mapping[str, str], altered: Callable[[Location, str], Exception]) -> None:
        """Hold files to these digests, of the matrices here, which were just found."""
        if isinstance(self.source, StoredTensors | Rearranged):
            plain = {own: known[name] for name, (own, view) in self.where.items() if view is None}
            split = digests(self.source, [name for name in self.source if name not in plain])
            self.source.expect(plain | split, altered)


class JoinedTensors(LazyTensors):
    """Matrices, lazy ones or not, as the tensors that ``views`` were made of.

    ties: for another name of a tensor the one that is here.
    """

    def __init__(self, matrices: Mapping[str, Tensor], views: Mapping[str, View], ties: Mapping[str, str]) -> None:
        held = headers(matrices)
        split = {part for view in views.values() for part in view.parts}
        found = {name: value for name, value in held.items() if name not in split}
        found |= {name: _like(held[next(iter(view.parts))], view.shape) for name, view in views.items()}
        super().__init__(found | {alias: found[name] for alias, name in ties.items()})
        self._matrices, self._views, self._ties = matrices, views, ties

    def chunks(self, name: str) -> Iterator[Tensor]:
        name = self._ties.get(name, name)
        view, header = self._views.get(name), self.headers[name]
        if view is None:
            yield from chunks(self._matrices, name)
        elif view.stacked:
            names = list(view.parts)
            for start, end in chunk_bounds(header):
                some = torch.stack([self._matrices[part] for part in names[start:end]])
                yield some.mT if view.transposed else some
        elif view.transposed or view.vector:
            whole = view.tensor(self._matrices)
            yield from (whole[start:end] for start, end in chunk_bounds(header))
        else:
            yield from _in_runs((value for part in view.parts for value in chunks(self._matrices, part)), header)

    def rows(self, name: str, start: int, end: int) -> Tensor:
        name = self._ties.get(name, name)
        view = self._views.get(name)
        if view is None:
            return rows(self._matrices, name, start, end)
        if view.stacked:
            stack = torch.stack([self._matrices[part] for part in list(view.parts)[start:end]])
            return stack.mT if view.transposed else stack
        if view.transposed or view.vector:
            return super().rows(name, start, end)
        some, first = [], 0
        for part, count in view.parts.items():
            if start < first + count and first < end:
                some.append(rows(self._matrices, part, max(start - first, 0), min(end - first, count)))
            first += count
        return torch.cat(some).reshape(end - start, *view.shape[1:])


def replaced(base: Mapping[str, Tensor], held: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """A base's tensors with some others in their place, which are held in memory."""
    if in_files(base):
        assert isinstance(base, StoredTensors | Rearranged | SplitTensors)
        return Overlay(held, base.renamed({name: name for name in base if name not in held}))
    return {**base, **held}


def source_of(tensors: Mapping[str, Tensor], name: str) -> tuple[Mapping[str, Tensor], str]:
    """What a tensor is read from, and its name there."""
    return (tensors.source, tensors.where[name][0]) if isinstance(tensors, SplitTensors) else (tensors, name)


def _like(header: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=header.dtype, device="meta")


def _in_runs(values: Iterator[Tensor], header: Tensor) -> Iterator[Tensor]:
    """Rows that come in runs of other lengths, in those of a tensor."""
    held: list[Tensor] = []
    for start, end in chunk_bounds(header):
        while sum(map(len, held)) < end - start:
            held.append(next(values))
        some = held[0] if len(held) == 1 else torch.cat(held)
        yield some[: end - start].reshape(end - start, *header.shape[1:])
        held = [some[end - start :]]
