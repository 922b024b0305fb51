"""Which models a ``SuperposedModel`` serves, and how that changes while it answers.

What tells models apart is data, in tables of a fixed size: a model has a number, its row of the tables by model, and
its group a row of every pool of superpositions. A change fills rows that nobody reads, and then gives the names their
new numbers, all at once. A call that began before goes on with the numbers that it has, whose rows stay as they are
until it has ended. So nobody waits for anybody, a call sees one version of everything, no buffer moves, and nothing is
compiled anew.
"""

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from randes.errors import CapacityError, CheckpointError
from randes.serving.batch import Version
from randes.serving.layers.delta_pool import DeltaPool, group_rows
from randes.serving.layers.linear import SuperposedLinear
from randes.serving.layers.other_layers import SuperposedEmbedding
from randes.serving.layers.per_model import KeptTable, Routed
from randes.serving.layers.superposed import Superposed
from randes.serving.routing import Router
from randes.serving.slots import Lease, Rows
from randes.serving.takeover import (
    Layer,
    Room,
    check_calls,
    layers_of,
    make_pools,
    make_tables,
    route_containers,
    take_over,
)
from randes.serving.unload import Original
from randes.superposition.members import BASE_NAME
from randes.superposition.superposition import Superposition


class Roster:
    """The models that a module serves, of those that a superposition has, and the rows of each.

    capacity: for how many models there is room; None for those that there are. Raises ``ValueError`` for too small a
    number, and where the superposition is packed.
    """

    def __init__(self, superposition: Superposition, router: Router, capacity: int | None = None) -> None:
        self.superposition, self.router, self.capacity = superposition, router, capacity
        self.room = _room(superposition, capacity)
        self._numbers = Rows(self.room.numbers)
        self._groups = Rows(len(group_rows(superposition)) if self.room.groups is None else self.room.groups)
        self._rows: dict[int, Lease] = {}  # of the groups that are served
        self._made_of: dict[int, list[object]] = {}  # what was in them when their rows were filled
        self._averaged: list[object] = []  # the same of averages and sums, of all models
        self.originals: list[Original] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Roster":
        copied = memo[id(self)] = object.__new__(Roster)
        # Copies of a model serve one superposition, whose parts are known by their identity.
        shared = {name: vars(self)[name] for name in ("superposition", "_made_of", "_averaged")}
        vars(copied).update(shared | {n: copy.deepcopy(v, memo) for n, v in vars(self).items() if n not in shared})
        return copied

    @property
    def names(self) -> list[str]:
        """The fine-tunes that are served."""
        return [name for name in self.router.names if name != BASE_NAME]

    def layers(self, module: nn.Module, wanted: Iterable[str] = ()) -> list[Layer]:
        """The layers that serve something, or may come to. wanted: tensors that are kept now."""
        reserves = self.capacity is not None and self.superposition.config.others != "base"
        return layers_of(module, self.superposition, {*wanted} if reserves else None)

    def take_over(self, module: nn.Module, layers: list[Layer]) -> None:
        """Turn layers into what serves the models that there is room for. Raises before any of them is changed."""
        pools = make_pools(layers, self.superposition, self.room)
        tables = make_tables(layers, self.superposition, self.room)
        originals = [Original(layer) for layer in module.modules()]
        for layer in layers:
            take_over(layer, self.superposition, self.router, pools, tables, self.room)
        route_containers(module, self.router)
        self.originals += [original for original in originals if original.is_changed()]

    @torch.no_grad()
    def serve(self, module: nn.Module, names: Iterable[str]) -> None:
        """Have calls that begin from now on find these models, as the superposition has them now; others do not change.

        Raises ``CapacityError`` where there are no free rows, ``ValueError`` for a superposition that does not fit the
        module's dtype, and ``CheckpointError`` for a kept tensor that cannot be served. Nothing is changed then.
        """
        superposition, before = self.superposition, self.router.versions
        members = {name: superposition.members[name] for name in names}
        self._route(module, {tensor for name in members for tensor in self._kept(name)})
        rows, made_of, fresh = dict(self._rows), dict(self._made_of), set()
        for group in sorted({member.group for member in members.values()}):
            now: list[object] = [member.gains for member in superposition.members.values() if member.group == group]
            if group not in rows or not _same(made_of[group], now):
                if group in rows:
                    self.check_room(group)
                rows[group] = self._groups.take(f"superposition for group {group}")
                made_of[group] = now
                fresh.add(group)
        _wait(module)  # for what is still under way in rows that are free
        parts = list(module.modules())
        for pool in [part for part in parts if isinstance(part, DeltaPool)]:
            for group in fresh:
                pool.write(superposition, group, rows[group].row)
        tables = [part for part in parts if isinstance(part, KeptTable)]
        averaged: list[object] = [m.digests for m in superposition.members.values()] if superposition.averages else []
        stays = _same(self._averaged, averaged)
        shared = {tensor for tensor in superposition.averages if not superposition.has_own(tensor)} if stays else set()
        averages = {t: lease for version in before.values() for t, lease in version.kept.items() if t in shared}
        versions, new = [], []
        for name, member in members.items():
            old = before.get(name)
            if old and old.member is member and member.group not in fresh and stays:
                versions.append(old)
                continue
            kept: dict[str, Lease] = {}
            for table in tables:
                held = old.kept.get(table.tensor) if old and old.member is member else None
                changed = table.tensor in superposition.averages and table.tensor not in shared
                if held is None or changed or superposition.has_own(table.tensor):
                    held = table.hold(superposition, name, averages, partial(_wait, module))
                if held is not None:
                    kept[table.tensor] = held
            number = self._numbers.take(f"number for {name!r}")
            leases = number, rows[member.group]
            new.append(Version(name, number.row, rows[member.group].row, kept, member, leases))
        _wait(module)  # again: a call may have ended meanwhile whose numbers were taken
        for part in parts:
            if isinstance(part, Superposed | SuperposedEmbedding):
                part.write(superposition, new)
        for table in tables:
            table.write(new)
        _wait(module)  # until what was written is there, whatever stream a call runs on
        self.router.serve([*versions, *new])
        if self.capacity is not None:
            rows = {group: row for group, row in rows.items() if group in {m.group for m in members.values()}}
        self._rows, self._made_of, self._averaged = rows, made_of, averaged

    def check_room(self, group: int, models: int = 0) -> None:
        """Raise ``ValueError`` unless there is room for changes at all, and ``CapacityError`` unless there is some for
        a group's next superposition and for so many more models."""
        if self.capacity is None:
            raise ValueError(
                "the model must be made with room to change what it serves,"
                " SuperposedModel(base, superposition, capacity=16) for 16 models, got capacity = None"
            )
        self._groups.take(f"superposition for group {group}")
        self.check_capacity(models)

    def check_capacity(self, models: int) -> None:
        """Raise ``CapacityError`` unless so many more models can be served."""
        if self.capacity is not None and len(self.names) + models > self.capacity:
            raise CapacityError(f"capacity is {self.capacity} models, and so many are served; delete one first")

    def _kept(self, name: str) -> set[str]:
        """The tensors that a model has its own of, or the average."""
        superposition = self.superposition
        averaged = {t for t in superposition.averages if name != BASE_NAME and superposition.is_averaged(t)}
        return averaged | superposition.layout.vectors | superposition.members[name].kept.keys()

    def _route(self, module: nn.Module, tensors: set[str]) -> None:
        """Have the layers that hold these kept tensors take each row's own, where they do not yet."""

        def missing() -> set[str]:
            parts = list(module.modules())
            tables = {part.tensor for part in parts if isinstance(part, KeptTable)}
            return tensors - tables - {
                part.bias_tensor for part in parts if isinstance(part, SuperposedLinear) and part.biases is not None
            }  # fmt: skip

        if not (wanted := missing()):
            return
        layers = [
            layer
            for layer in self.layers(module, wanted)
            if wanted & {*layer.kept.values()} and not isinstance(layer.module, Superposed | Routed)
        ]
        check_calls(module, layers)
        if left := wanted - {tensor for layer in layers for tensor in layer.kept.values()}:
            raise CheckpointError(f"{min(left)} cannot come to be kept per model here: make a new model")
        self.take_over(module, layers)


def _room(superposition: Superposition, capacity: int | None) -> Room:
    served, models = len(superposition.served), len(superposition.names)
    if capacity is None:
        return Room(served)
    if not isinstance(capacity, int) or capacity < max(1, models):
        raise ValueError(f"capacity must be an integer of at least the {max(1, models)} models, got {capacity!r}")
    superposition.check_master()
    size = superposition.config.group_size
    groups = max(len(group_rows(superposition)), -(-capacity // size))
    # Beside what is served, what the next change makes: one group, or all models where they share an average.
    again = capacity if superposition.config.others in ("average", "sum") else min(capacity, size)
    numbers = capacity + again + 2 * (served - models)
    # What a group's change alters of all its models' own needs as many rows again.
    changes = superposition.config.others == "sum" or superposition.layout.vectors
    return Room(numbers, groups + 1, numbers if changes else capacity + 1)


def _same(these: list[object], those: list[object]) -> bool:
    return len(these) == len(those) and all(a is b for a, b in zip(these, those, strict=True))


def _wait(module: nn.Module) -> None:
    """Until every GPU of a module has done what it was given, on any stream."""
    for device in {value.device for value in module.parameters() if value.is_cuda}:
        torch.cuda.synchronize(device)
