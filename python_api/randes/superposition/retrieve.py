"""A model as it comes back out of a superposition, made a part of a tensor at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from randes.checkpoints.lazy_tensors import LazyTensors, Progress, chunk_bounds, chunks, headers, silent
from randes.superposition.basis import shared_basis
from randes.superposition.integers import STEP
from randes.superposition.packed_tensors import coordinates_of, values_of
from randes.superposition.state import State
from randes_kernels import retrieve, slices, unpack


class Retrieved(LazyTensors):
    """``W0 + α (D turned back)`` of what is superposed, and what a model has of everything else."""

    def __init__(self, superposition: State, name: str) -> None:
        # A kept tensor may have another shape than the base's.
        super().__init__({**headers(superposition.base), **headers(superposition.members[name].kept)})
        self._superposition, self._name = superposition, name

    def chunks(self, name: str) -> Iterator[Tensor]:
        sup, member = self._superposition, self._superposition.member(self._name)
        if name not in member.gains:
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
            turn = slices.turn(sup.key(self._name), sup.tensor_id(name), shape, sup.config.transform)
            deltas, unit = self._deltas(name)
            scale, first = member.gains[name] * unit, 0
            for base, delta in zip(chunks(sup.base, name), deltas, strict=True):
                if name in sup.bases:
                    nothing = torch.zeros_like(base, dtype=torch.float32)
                    turned_back = slices.retrieve_rows(nothing, delta, scale, turn, first=first)
                    yield self._with_basis(name, base, turned_back, first)
                else:
                    yield slices.retrieve_rows(base, delta, member.alpha_of(name) * scale, turn, first=first)
                first += len(base)

    def _with_basis(self, name: str, base: Tensor, turned_back: Tensor, first: int) -> Tensor:
        sup, member = self._superposition, self._superposition.members[self._name]
        held = coordinates_of(member.coordinates[name])[first : first + len(base)].to(base.device)
        own = shared_basis.retrieved(turned_back, sup.bases[name].to(base.device), held, member.units[name])
        return (base.float() + member.alpha_of(name) * own).to(base.dtype)

    def _whole(self, name: str) -> Tensor:
        """On the superposition's device, all at once."""
        sup, member = self._superposition, self._superposition.members[self._name]
        base = sup.base[name].to(sup.device)
        delta, unit = values_of(sup.held[member.group][sup.place(self._name, name)])
        scale = member.gains[name] * unit
        if name not in sup.bases:
            turning = sup.key(self._name), sup.tensor_id(name), sup.config.transform
            return retrieve(base, delta.to(sup.device), member.alpha_of(name) * scale, *turning).cpu()
        return self._with_basis(name, base, self._turned_back(name), 0).cpu()

    def _turned_back(self, name: str) -> Tensor:
        """The superposition as this model sees it, without what it keeps in the shared basis: (N, K) fp32."""
        sup, member = self._superposition, self._superposition.members[self._name]
        delta, unit = values_of(sup.held[member.group][sup.place(self._name, name)])
        nothing = torch.zeros(self.headers[name].shape, device=sup.device)
        turning = sup.key(self._name), sup.tensor_id(name), sup.config.transform
        return retrieve(nothing, delta.to(sup.device), member.gains[name] * unit, *turning)

    def delta(self, name: str) -> Tensor:
        """What comes back of this model's delta, at α = 1: (N, K) fp32, on the superposition's device."""
        sup, member, turned_back = self._superposition, self._superposition.members[self._name], self._turned_back(name)
        if name not in sup.bases:
            return turned_back
        held = coordinates_of(member.coordinates[name]).to(sup.device)
        return shared_basis.retrieved(turned_back, sup.bases[name].to(sup.device), held, member.units[name])

    def _deltas(self, name: str) -> tuple[Iterator[Tensor], float]:
        """The superposition's rows part by part, and what its numbers are worth in units of a gain."""
        sup, place = self._superposition, self._superposition.place(self._name, name)
        group = sup.members[self._name].group
        if sup.packing is None:
            return chunks(sup.deltas[group], place), STEP
        packed = sup.few_bits[group][place]
        return (unpack(packed.rows(slice(*run))) for run in chunk_bounds(self.headers[name])), 1.0


def matrices(superposition: State, name: str, *, progress: Progress = silent) -> Retrieved:
    """A model's tensors by the superposition's own names: matrices for what is superposed as such (``Layout``).

    Raises ``UnknownModelError``, and where the base or the model's part of the superposition are not what they were.
    """
    superposition.check(superposition.member(name).group, name, progress=progress)
    return Retrieved(superposition, name)


def unsuperposed(superposition: State, name: str, tensor: str) -> Tensor:
    """What a model has of a tensor that no layer multiplies with: its own, the average or sum, or the base's; of a
    superposed vector what comes back of it."""
    if tensor in superposition.layout.vectors:
        return Retrieved(superposition, name)[tensor][0]
    own = superposition.members[name].kept.get(tensor)
    return superposition.averaged(name, tensor) if own is None else own
