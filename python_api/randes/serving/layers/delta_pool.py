"""What models' deltas are superposed in, as it is served."""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, MutableMapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from randes.serving.batch import Version
from randes.serving.layers.shards import Shard, own_copy
from randes.serving.table_rows import put
from randes.superposition.packed_tensors import SuperposedDelta, values_of
from randes.superposition.state import Group
from randes.superposition.superposition import Superposition
from randes_kernels import Packed, unpack

PEAK_BITS = 3
"""The largest of what is near a normal distribution of size 1 lies about there: below 2³."""


class DeltaPool(nn.Module):
    """The superpositions that a layer reads, ``(S, N, K)``: one slot a group of models, in its dtype or in few bits.

    A module of its own because layers that are shuffled share one, and must go on sharing it when they move.

    weight: (N, K), for the shape, dtype and device. shard: where that is a part of the matrix, which; of everything
    that is written, this part is held.

    rows: how many superpositions of groups to have room for. By default there is room for those that are, where they
    have this tensor at all; ``slots`` tells of a group's row, and of the tensor's name, the slot. Deltas that each
    model has to itself stand under the models' names.

    units: what one number of a slot is worth, in units of a gain: 1, but where models share one gain, which says
    nothing of the deltas' size; a power of two then, which brings them near 1 as half precision needs them.
    """

    values: Tensor
    steps: Tensor | None

    def __init__(
        self, superposition: Superposition, tensor: str, weight: Tensor, rows: int | None = None,
        shard: Shard | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tensor, self.family, self.shard = tensor, superposition.family(tensor), shard
        self.unshared = tensor in superposition.unshared
        known: dict[Group, Group] = {name: name for name in superposition.served}
        if not self.unshared:
            known = dict(group_rows(superposition).items())
        held = {
            (row, place): superposition.held[group][place]
            for group, row in known.items()
            for place in self.family
            if place in superposition.held.get(group, {})
        }
        places: Iterable[tuple[Group, str]] = held if rows is None else itertools.product(range(rows), self.family)
        self.slots = {where: slot for slot, where in enumerate(places)}
        self.units = dict.fromkeys(self.slots.values(), 1.0)
        self.packing: tuple[float, int, int] | None = None
        values, steps = torch.zeros((len(self.slots), *weight.shape), dtype=weight.dtype, device=weight.device), None
        if held and superposition.packing is not None:
            first = self._part(next(iter(held.values())))
            assert isinstance(first, Packed)
            parts = first.words, first.steps
            values, steps = (part.new_zeros(len(held), *part.shape, device=weight.device) for part in parts)
            self.packing = first[2:]
        elif weight.stride(0) == 1 != weight.stride(1):  # in one order of memory, as the kernels like it
            values = values.mT.contiguous().mT
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("steps", steps, persistent=False)

    @torch.no_grad()
    def write(self, superposition: Superposition, group: Group, row: Group) -> None:
        """Fill a row with a group's superpositions as they are now: one tensor at a time, which nobody reads yet.

        Raises ``ValueError`` where they do not fit the dtype."""
        for place in self.family:
            held = superposition.held.get(group, {}).get(place)
            if isinstance(held, Packed):
                held = self._part(held)
                assert isinstance(held, Packed)
                assert self.steps is not None
                put(self.values, self.slots[row, place], held.words)
                put(self.steps, self.slots[row, place], held.steps)
            elif held is not None:
                (numbers, unit), slot = values_of(held), self.slots[row, place]
                if superposition.config.gains == "shared":
                    peak = max(abs(int(bound)) for bound in torch.aminmax(numbers))
                    self.units[slot] = 2.0 ** (math.frexp(peak * unit)[1] - PEAK_BITS)
                own = numbers if self.shard is None else self.shard.of_tensor(numbers)
                put(self.values, slot, own.to(self.values.device).float().mul_(unit / self.units[slot]))
                self._check_finite(slot)

    def row_of(self, version: Version) -> Group:
        """Where a model's delta is found."""
        return version.name if self.unshared else version.group

    def write_all(self, superposition: Superposition, versions: Iterable[Version]) -> None:
        """Fill the rows of these models."""
        for row, name in {self.row_of(version): version.name for version in versions}.items():
            self.write(superposition, superposition.group_of(name, self.tensor), row)

    @property
    def delta(self) -> SuperposedDelta:
        """As ``superposed_linear`` takes it."""
        if self.packing is None:
            return self.values
        assert self.steps is not None
        return Packed(self.values, self.steps, *self.packing)

    def rows(self, slots: Tensor, rows: Tensor) -> Tensor:
        """Rows of the superpositions, (..., K) for integers (...): what an embedding looks up."""
        if self.packing is None:
            return self.values[slots, rows]
        assert self.steps is not None
        return unpack(Packed(self.values[slots, rows], self.steps[slots, :, rows].mT, *self.packing))

    def cut(self, shard: Shard) -> "DeltaPool":
        """The part of it that one device holds, in memory of its own.

        Raises ``ValueError`` where it is packed and cannot be cut there.
        """
        own, made = shard.of_delta(self.delta), copy.copy(self)  # the names of its slots are the same
        vars(made)["_buffers"], made.shard = dict(self._buffers), shard
        values, steps = (own.words, own.steps) if isinstance(own, Packed) else (own, None)
        made.values, made.steps = own_copy(values), None if steps is None else own_copy(steps)
        if isinstance(own, Packed):
            made.packing = own[2:]
        return made

    def of_columns(self, values: Tensor) -> Tensor:
        """(..., K, r) as its shard has them."""
        return values if self.shard is None else self.shard.of_columns(values)

    def _part(self, delta: SuperposedDelta) -> SuperposedDelta:
        return delta if self.shard is None else self.shard.of_delta(delta)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DeltaPool":
        before, steps = self.values.dtype, self.steps
        super()._apply(fn, recurse)
        if steps is not None and self.steps is not None and self.steps.dtype != steps.dtype:
            self.steps = steps.to(self.steps.device)  # part of the packed form, whatever the layer becomes
        if self.values.dtype != before:
            self._check_finite()
        return self

    def _check_finite(self, slot: slice | int = slice(None)) -> None:
        # One infinity would reach the other rows of a matmul's tile as NaN.
        if not torch.isfinite(self.values[slot]).all():
            dtype = self.values.dtype
            raise ValueError(
                f"the superposition of {self.tensor} must fit {dtype}, got infinity; serve it in another dtype"
            )


Cuts: TypeAlias = MutableMapping[DeltaPool, dict[Shard, DeltaPool]]
"""Of pools that several layers share the parts that they have come to share."""


def group_rows(superposition: Superposition) -> dict[int, int]:
    """The groups that have models, and the row of each in the pools, before anything changes."""
    return {group: row for row, group in enumerate(sorted({m.group for m in superposition.members.values()}))}
