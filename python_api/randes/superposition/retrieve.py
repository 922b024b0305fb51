"""A model as it comes back out of a superposition, made a part of a tensor at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from randes.checkpoints.layout import ADDED
from randes.checkpoints.lazy_tensors import LazyTensors, Progress, chunk_bounds, chunks, headers, silent
from randes.superposition.basis import shared_basis
from randes.superposition.integers import STEP
from randes.superposition.members import Member
from randes.superposition.packed_tensors import coordinates_of, values_of
from randes.superposition.state import Group, State
from randes_kernels import retrieve, slices, unpack


class Retrieved(LazyTensors):
    """``W0 + α (D turned back)`` of what is superposed, and what a model has of everything else."""

    def __init__(self, superposition: State, name: str) -> None:
        # A kept tensor may have another shape than the base's.
        member = superposition.members[name]
        self._added = {f"{tensor}{ADDED}": rows for tensor, rows in headers(member.added).items()}
        super().__init__({**headers(superposition.base), **headers(member.kept), **self._added})
        self._superposition, self._name = superposition, name

    def chunks(self, name: str) -> Iterator[Tensor]:
        sup, member = self._superposition, self._superposition.member(self._name)
        if name in self._added:
            yield from chunks(member.added, name.removesuffix(ADDED))
        elif name not in member.gains:
            if name in member.kept:
                yield from chunks(member.kept, name)
            elif name in sup.averages:
                yield from chunks({name: sup.averaged(self._name, name)}, name)
            else:
                yield from chunks(sup.base, name)
        elif sup.device.type != "cpu":
            whole = self._whole(name)
            yield from (whole[start:end] for start, end in chunk_bounds(whole))
        else:
            shape = self.headers[name].shape
            turn = slices.turn(sup.key(self._name), sup.tensor_id(name), shape, sup.transform(name))
            (deltas, unit), basis = self._deltas(name), sup.basis(self._name, name)
            scale, first = member.gains[name] * unit, 0
            for base, delta in zip(chunks(sup.base, name), deltas, strict=True):
                if basis is not None:
                    nothing = torch.zeros_like(base, dtype=torch.float32)
                    turned_back = slices.retrieve_rows(nothing, delta, scale, turn, first=first)
                    yield self._with_basis(name, basis, base, turned_back, first)
                else:
                    yield slices.retrieve_rows(base, delta, member.alpha_of(name) * scale, turn, first=first)
                first += len(base)

    def _with_basis(self, name: str, basis: Tensor, base: Tensor, turned_back: Tensor, first: int) -> Tensor:
        member = self._superposition.members[self._name]
        held = coordinates_of(member.coordinates[name])[first : first + len(base)].to(base.device)
        own = with_coordinates(member, name, turned_back, basis.to(base.device), held)
        return (base.float() + member.alpha_of(name) * own).to(base.dtype)

    def _whole(self, name: str) -> Tensor:
        """On the superposition's device, all at once."""
        sup, member = self._superposition, self._superposition.members[self._name]
        base, basis = sup.base[name].to(sup.device), sup.basis(self._name, name)
        if basis is not None:
            return self._with_basis(name, basis, base, self._turned_back(name), 0).cpu()
        delta, unit = values_of(sup.held[sup.group_of(self._name, name)][sup.place(self._name, name)])
        turning = sup.key(self._name), sup.tensor_id(name), sup.transform(name)
        return retrieve(base, delta.to(sup.device), member.alpha_of(name) * member.gains[name] * unit, *turning).cpu()

    def _turned_back(self, name: str) -> Tensor:
        """The superposition as this model sees it, without what it keeps in the shared basis: (N, K) fp32."""
        sup, member = self._superposition, self._superposition.members[self._name]
        nothing = torch.zeros(self.headers[name].shape, device=sup.device)
        if sup.in_no_bits(name):
            return nothing
        delta, unit = values_of(sup.held[sup.group_of(self._name, name)][sup.place(self._name, name)])
        turning = sup.key(self._name), sup.tensor_id(name), sup.transform(name)
        return retrieve(nothing, delta.to(sup.device), member.gains[name] * unit, *turning)

    def delta(self, name: str) -> Tensor:
        """What comes back of this model's delta, at α = 1: (N, K) fp32, on the superposition's device."""
        sup, member, turned_back = self._superposition, self._superposition.members[self._name], self._turned_back(name)
        if (basis := sup.basis(self._name, name)) is None:
            return turned_back
        held = coordinates_of(member.coordinates[name]).to(sup.device)
        return with_coordinates(member, name, turned_back, basis.to(sup.device), held)

    def _deltas(self, name: str) -> tuple[Iterator[Tensor], float]:
        """The superposition's rows part by part, and what its numbers are worth in units of a gain."""
        sup, place = self._superposition, self._superposition.place(self._name, name)
        rows = rows_of_delta(sup, sup.group_of(self._name, name), place, self.headers[name])
        return rows, STEP if sup.packing is None else 1.0


def rows_of_delta(superposition: State, group: Group, place: str, header: Tensor) -> Iterator[Tensor]:
    """One superposition's rows part by part, in units of a step, or of a gain where they are packed."""
    if superposition.packing is None:
        yield from chunks(superposition.deltas[group], place)
        return
    runs = chunk_bounds(header)
    if superposition.in_no_bits(place):
        yield from (torch.zeros(end - start, header.shape[1]) for start, end in runs)
        return
    packed = superposition.few_bits[group][place]
    yield from (unpack(packed.rows(slice(*run))) for run in runs)


def with_coordinates(member: Member, tensor: str, turned_back: Tensor, basis: Tensor, held: Tensor) -> Tensor:
    """Rows of a delta, fp32, of what came back of its superposition and of its coordinates ``held`` in a basis.

    In a shared basis there is interference to be taken off; in a model's own there is none (packing.py).
    """
    if tensor in member.directions:
        return turned_back + (held.float() * member.units[tensor]) @ (basis.float() * shared_basis.UNIT).mT
    return shared_basis.retrieved(turned_back, basis, held, member.units[tensor])


def matrices(superposition: State, name: str, *, progress: Progress = silent) -> Retrieved:
    """A model's tensors by the superposition's own names: matrices for what is superposed as such (``Layout``).

    Raises ``UnknownModelError``, and where the base or the model's part of the superposition are not what they were.
    """
    superposition.check(superposition.member(name).group, name, progress=progress)
    return Retrieved(superposition, name)


def unsuperposed(superposition: State, name: str, tensor: str) -> Tensor:
    """What a model has of a tensor that no layer multiplies with: its own, the average or sum, or the base's; of a
    vector, and of an unshared matrix, what comes back of it."""
    if tensor in superposition.layout.vectors:
        return Retrieved(superposition, name)[tensor][0]
    if tensor not in superposition.members[name].kept and tensor in superposition.own_tensors(name):
        view, retrieved = superposition.layout_of(name).views.get(tensor), Retrieved(superposition, name)
        return retrieved[tensor] if view is None else view.tensor({part: retrieved[part] for part in view.parts})
    own = superposition.members[name].kept.get(tensor)
    return superposition.averaged(name, tensor) if own is None else own
