"""A model as it comes back out of a superposition, made a part of a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from randes import basis
from randes.integers import STEP
from randes.streams import LazyTensors, headers, parts, runs
from randes_kernels import retrieve, slices, tensor_id

if TYPE_CHECKING:
    from randes.superposition import Superposition


class Retrieved(LazyTensors):
    """``W0 + α (D turned back)`` of what is superposed, and what a model has of everything else."""

    def __init__(self, superposition: Superposition, name: str) -> None:
        super().__init__(headers(superposition.base))
        self._superposition, self._name = superposition, name

    def parts(self, name: str) -> Iterator[Tensor]:
        sup, member = self._superposition, self._superposition.member(self._name)
        if name not in member.gains:
            if name in member.kept:
                yield from parts(member.kept, name)
            elif name in sup.averages:
                yield from parts({name: sup.other(self._name, name)}, name)
            else:
                yield from parts(sup.base, name)
        elif sup.device.type != "cpu":
            whole = self._whole(name)
            yield from (whole[start:end] for start, end in runs(whole))
        else:
            shape = self.headers[name].shape
            turn = slices.turn(sup.key(self._name), tensor_id(name), shape, sup.config.transform)
            deltas = parts(sup.deltas[member.group], sup.place(self._name, name))
            scale, first = member.gains[name] * STEP, 0
            for base, delta in zip(parts(sup.base, name), deltas, strict=True):
                if name in sup.bases:
                    nothing = torch.zeros_like(base, dtype=torch.float32)
                    turned_back = slices.retrieve_rows(nothing, delta, scale, turn, first=first)
                    yield self._with_basis(name, base, turned_back, first)
                else:
                    yield slices.retrieve_rows(base, delta, member.alpha * scale, turn, first=first)
                first += len(base)

    def _with_basis(self, name: str, base: Tensor, turned_back: Tensor, first: int) -> Tensor:
        sup, member = self._superposition, self._superposition.members[self._name]
        held = member.coordinates[name][first : first + len(base)].to(base.device)
        own = basis.retrieved(turned_back, sup.bases[name].to(base.device), held, member.units[name])
        return (base.float() + member.alpha * own).to(base.dtype)

    def _whole(self, name: str) -> Tensor:
        """On the superposition's device, all at once."""
        sup, member = self._superposition, self._superposition.members[self._name]
        base = sup.base[name].to(sup.device)
        delta = sup.deltas[member.group][sup.place(self._name, name)].to(sup.device)
        turning = sup.key(self._name), tensor_id(name), sup.config.transform
        scale = member.gains[name] * STEP
        if name not in sup.bases:
            return retrieve(base, delta, member.alpha * scale, *turning).cpu()
        turned_back = retrieve(torch.zeros_like(base, dtype=torch.float32), delta, scale, *turning)
        return self._with_basis(name, base, turned_back, 0).cpu()
