"""Cosines between the models' deltas: as they were, as they lie in D, and as they come back out of it.

    before      δ_i and δ_j                         of checkpoints
    after       T_i(δ_i) and T_j(δ_j), T(δ) = r ⊙ δ ⊙ c · P, each where it lies in D; without its part in a shared basis
    retrieved   what comes back of both, with all that shares their D

Each over all superposed tensors as one vector, in fp64. Tensors pass a part at a time; of large ones some parts do.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from randes.checkpoints.lazy_tensors import chunk_bounds, chunks, headers
from randes.checkpoints.sources import Tensors
from randes.superposition.basis import shared_basis
from randes.superposition.integers import STEP
from randes.superposition.packed_tensors import coordinates_of
from randes.superposition.retrieve import rows_of_delta, with_coordinates
from randes.superposition.state import Group
from randes.superposition.superposition import Superposition
from randes_kernels import slices

SAMPLE = 1 << 22
"""Elements of a tensor that are compared at most: equally spaced runs of its rows, and their sums count for all."""
AT_A_TIME = 1 << 22
"""Elements, of all models together, that one product is made of: 32 MiB in fp64."""

K = TypeVar("K")


@dataclass(frozen=True)
class Cosines:
    """Of each pair of ``names``, (J, J) fp64; NaN with a model that changed nothing.

    sampled: how many of the ``tensors`` were so large that some rows stood for all.
    """

    names: tuple[str, ...]
    values: Tensor
    sampled: int
    tensors: int


def chosen(header: Tensor) -> list[int]:
    """The numbers of the runs of a tensor that are compared."""
    count = len(chunk_bounds(header))
    kept = min(count, max(1, math.ceil(count * SAMPLE / max(1, header.numel()))))
    return [(2 * place + 1) * count // (2 * kept) for place in range(kept)]


class _Sums:
    """Inner products of every two models, over all that was added."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names, self.products = names, torch.zeros(len(names), len(names), dtype=torch.float64)

    def add(self, deltas: Mapping[str, Tensor], weight: float) -> None:
        if not deltas:
            return
        at = torch.tensor([self.names.index(name) for name in deltas])
        flat = [delta.flatten() for delta in deltas.values()]
        for some in zip(*(torch.split(delta, max(1, AT_A_TIME // len(flat))) for delta in flat), strict=True):
            exact = torch.stack(some).double()
            self.products[at[:, None], at] += weight * (exact @ exact.mT)

    def cosines(self, sampled: int, tensors: int) -> Cosines:
        sizes = self.products.diagonal().sqrt()
        values = (self.products / (sizes[:, None] * sizes)).clamp(-1, 1)
        return Cosines(self.names, values, sampled, tensors)


def of_originals(
    superposition: Superposition, models: Mapping[str, Tensors], *, turned: bool, step: Callable[[int], None]
) -> Cosines:
    """Of the deltas of ``models``, tensors by name; ``turned`` as they lie in D. step: called with bytes."""
    sup, sums = superposition, _Sums(tuple(models))
    for place in sup.superposed:
        lying = {name: _lying_at(sup, name, place) if turned else place for name in models}
        lying = {name: tensor for name, tensor in lying.items() if tensor in sup.members[name].gains}
        header = headers(sup.base)[place]
        turns = {name: _turn(sup, name, tensor) for name, tensor in lying.items()} if turned else {}
        sources: dict[tuple[str, str], Iterator[Tensor]] = {}
        for name, tensor in lying.items():
            sources.setdefault(("", tensor), chunks(sup.base, tensor))
            sources[name, tensor] = chunks(models[name], tensor)
        for first, found, weight in _sampled(header, sources, step):
            deltas = {name: found[name, tensor].double() - found["", tensor] for name, tensor in lying.items()}
            if turned:
                deltas = {
                    name: _turned(turns[name], _remainder(sup, name, lying[name], delta, first), first)
                    for name, delta in deltas.items()
                }
            sums.add(deltas, weight)
    return sums.cosines(*_coverage(sup))


def of_retrieved(superposition: Superposition, names: tuple[str, ...], *, step: Callable[[int], None]) -> Cosines:
    """Of what comes back of each model's deltas, at α = 1 (``Retrieved.delta``)."""
    sup, sums = superposition, _Sums(names)
    for tensor in sup.superposed:
        header, held = headers(sup.base)[tensor], {}
        sources: dict[tuple[Group, str], Iterator[Tensor]] = {}
        for name in (name for name in names if tensor in sup.members[name].gains):
            held[name] = sup.group_of(name, tensor), sup.place(name, tensor)
            sources.setdefault(held[name], rows_of_delta(sup, *held[name], header))
        turns = {name: _turn(sup, name, tensor) for name in held}
        unit = STEP if sup.packing is None else 1.0
        for first, found, weight in _sampled(header, sources, step):
            deltas = {}
            for name, where in held.items():
                member = sup.members[name]
                nothing = torch.zeros(found[where].shape)
                scale = member.gains[tensor] * unit
                deltas[name] = slices.retrieve_rows(nothing, found[where], scale, turns[name], first=first)
                if (basis := sup.basis(name, tensor)) is not None:
                    own = coordinates_of(member.coordinates[tensor])[first : first + len(nothing)]
                    deltas[name] = with_coordinates(member, tensor, deltas[name], basis, own)
            sums.add(deltas, weight)
    return sums.cosines(*_coverage(sup))


def _sampled(
    header: Tensor, sources: Mapping[K, Iterator[Tensor]], step: Callable[[int], None]
) -> Iterator[tuple[int, dict[K, Tensor], float]]:
    """Of the runs that are compared: the first row, each source's rows, and what their sums count for."""
    numbers, ends = set(chosen(header)), chunk_bounds(header)
    rows = sum(end - start for number, (start, end) in enumerate(ends) if number in numbers)
    for number, found in enumerate(zip(*sources.values(), strict=True)):
        if number in numbers:
            yield ends[number][0], dict(zip(sources, found, strict=True)), len(header) / rows
    step(header.nbytes)


def _lying_at(superposition: Superposition, name: str, place: str) -> str:
    """The tensor whose delta a model has at ``place``."""
    return next(tensor for tensor in superposition.family(place) if superposition.place(name, tensor) == place)


def _turn(superposition: Superposition, name: str, tensor: str) -> slices.Turn:
    shape = headers(superposition.base)[tensor].shape
    return slices.turn(superposition.key(name), superposition.tensor_id(tensor), shape, superposition.transform(tensor))


def _turned(turn: slices.Turn, delta: Tensor, first: int) -> Tensor:
    if turn.mixer is not None:
        delta = turn.mixer.turn(delta.double()).to(delta.dtype)
    if turn.columns is not None:
        delta = delta * turn.columns
    if turn.rows is not None:
        delta = delta * turn.rows[first : first + len(delta)]
    return delta if turn.source is None else delta[:, turn.source]


def _remainder(superposition: Superposition, name: str, tensor: str, delta: Tensor, first: int) -> Tensor:
    """A delta without what its model keeps of it in the shared basis."""
    if tensor not in superposition.bases:
        return delta
    member = superposition.members[name]
    own = coordinates_of(member.coordinates[tensor])[first : first + len(delta)]
    return shared_basis.remainder(delta, superposition.bases[tensor], own, member.units[tensor])


def _coverage(superposition: Superposition) -> tuple[int, int]:
    described = [headers(superposition.base)[name] for name in superposition.superposed]
    return sum(len(chosen(header)) < len(chunk_bounds(header)) for header in described), len(described)
