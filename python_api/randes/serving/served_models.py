"""Which models a ``SuperposedModel`` serves, and how that changes while it answers.

What tells models apart is data, in tables of a fixed size: a model has a number, its row of the tables by model, and
its group a row of every pool of superpositions. A change fills rows that nobody reads, and then gives the names their
new numbers, all at once. A call that began before goes on with the numbers that it has, whose rows stay as they are
until it has ended. So nobody waits for anybody, a call sees one version of everything, no buffer moves, and nothing is
compiled anew.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from randes.errors import CapacityError, CheckpointError
from randes.serving.base_layers import Layer, layers_of
from randes.serving.batch import Version
from randes.serving.containers import route_containers
from randes.serving.layers.delta_pool import DeltaPool, group_rows
from randes.serving.layers.linear import SuperposedLinear
from randes.serving.layers.other_layers import SuperposedEmbedding
from randes.serving.layers.per_model import PerModelTensor, Routed
from randes.serving.layers.superposed import Superposed
from randes.serving.routing import Router
from randes.serving.table_rows import Row, Rows
from randes.serving.takeover import (
    Room,
    check_calls,
    make_pools,
    make_tables,
    take_over,
)
from randes.serving.unload import Original
from randes.superposition.members import BASE_NAME, Member
from randes.superposition.superposition import Superposition

M = TypeVar("M", bound=nn.Module)


class ServedModels:
    """The models that a module serves, of those that a superposition has, and the rows of each.

    capacity: for how many models there is room; None for those that there are. Raises ``ValueError`` for too small a
    number, and where the superposition is packed.
    """

    def __init__(self, superposition: Superposition, router: Router, capacity: int | None = None) -> None:
        self.superposition, self.router, self.capacity = superposition, router, capacity
        self.room = _room(superposition, capacity)
        self._numbers = Rows(self.room.numbers)
        self._groups = Rows(len(group_rows(superposition)) if self.room.groups is None else self.room.groups)
        self._rows: dict[int, Row] = {}  # of the groups that are served
        self._made_of: dict[int, list[object]] = {}  # what was in them when their rows were filled
        self._averaged: list[object] = []  # the same of averages and sums, of all models
        self.originals: list[Original] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "ServedModels":
        copied = memo[id(self)] = object.__new__(ServedModels)
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
        superposition = self.superposition
        members = {name: superposition.members[name] for name in names}
        self._route(module, {tensor for name in members for tensor in self._kept(name)})
        groups = self._groups_with(members)
        _wait(module)  # for what is still under way in rows that are free
        for pool in _parts(module, DeltaPool):
            for group in () if pool.unshared else groups.fresh:
                pool.write(superposition, group, groups.rows[group].index)
        averaged: list[object] = [m.digests for m in superposition.members.values()] if superposition.averages else []
        stay, new = self._versions(module, members, groups, averages_stay=_same(self._averaged, averaged))
        _wait(module)  # again: a call may have ended meanwhile whose numbers were taken
        for pool in _parts(module, DeltaPool):
            if pool.unshared:
                pool.write_all(superposition, new)
        for matrix in _parts(module, Superposed):
            matrix.write(superposition, new)
        for embedding in _parts(module, SuperposedEmbedding):
            embedding.write(superposition, new)
        for table in _parts(module, PerModelTensor):
            table.write(new)
        _wait(module)  # until what was written is there, whatever stream a call runs on
        self.router.serve([*stay, *new])
        rows = groups.rows
        if self.capacity is not None:
            rows = {group: row for group, row in rows.items() if group in {m.group for m in members.values()}}
        self._rows, self._made_of, self._averaged = rows, groups.made_of, averaged

    def _groups_with(self, members: Mapping[str, Member]) -> "_Groups":
        """A row of the pools for each group of these models: its own, or a new one where it has changed."""
        groups = _Groups(dict(self._rows), dict(self._made_of))
        for group in sorted({member.group for member in members.values()}):
            everyone = self.superposition.members.values()
            now: list[object] = [member.gains for member in everyone if member.group == group]
            if group not in groups.rows or not _same(groups.made_of[group], now):
                if group in groups.rows:
                    self.check_room(group)
                groups.rows[group] = self._groups.take(f"superposition for group {group}")
                groups.made_of[group] = now
                groups.fresh.add(group)
        return groups

    def _versions(
        self, module: nn.Module, members: Mapping[str, Member], groups: "_Groups", *, averages_stay: bool
    ) -> tuple[list[Version], list[Version]]:
        """The versions of models that stay as they are, and new ones, with rows that nobody reads."""
        superposition, before = self.superposition, self.router.versions
        shared: set[str] = set()
        if averages_stay:
            shared = {tensor for tensor in superposition.averages if not superposition.has_own(tensor)}
        averages = {t: row for version in before.values() for t, row in version.kept.items() if t in shared}
        tables = _parts(module, PerModelTensor)
        stay, new = [], []
        for name, member in members.items():
            old = before.get(name)
            same = old is not None and old.member is member
            if old is not None and same and member.group not in groups.fresh and averages_stay:
                stay.append(old)
                continue
            kept: dict[str, Row] = {}
            for table in tables:
                row = old.kept.get(table.tensor) if old is not None and same else None
                changed = table.tensor in superposition.averages and table.tensor not in shared
                if row is None or changed or superposition.has_own(table.tensor):
                    row = table.hold(superposition, name, averages, partial(_wait, module))
                if row is not None:
                    kept[table.tensor] = row
            number, group = self._numbers.take(f"number for {name!r}"), groups.rows[member.group]
            new.append(Version(name, number.index, group.index, kept, member, (number, group)))
        return stay, new

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
        return averaged | superposition.layout.vectors | superposition.own_tensors(name)

    def _route(self, module: nn.Module, tensors: set[str]) -> None:
        """Have the layers that hold these kept tensors take each row's own, where they do not yet."""

        def missing() -> set[str]:
            parts = list(module.modules())
            tables = {part.tensor for part in parts if isinstance(part, PerModelTensor)}
            whole = self.superposition.layout.parts
            tables |= {whole.get(part.matrix, part.matrix) for part in parts if isinstance(part, Superposed)}
            linear = (part for part in parts if isinstance(part, SuperposedLinear))
            # Of a layer that is cut by columns the bias is in another process.
            return tensors - tables - {
                part.bias_tensor for part in linear if part.biases is not None or part.pool.shard is not None
            }  # fmt: skip

        if not (wanted := missing()):
            return
        if any(pool.shard is not None for pool in _parts(module, DeltaPool)):
            raise CheckpointError(
                f"{min(wanted)} cannot come to be kept per model in a model that is cut over devices: make it anew with"
                " a fine-tune that has its own"
            )
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


@dataclass
class _Groups:
    """Of each group its row of the pools, and what was in it when that was filled. fresh: those to be filled."""

    rows: dict[int, Row]
    made_of: dict[int, list[object]]
    fresh: set[int] = field(default_factory=set)


def _parts(module: nn.Module, kind: type[M]) -> list[M]:
    """The layers, pools or tables of a kind inside a module."""
    return [part for part in module.modules() if isinstance(part, kind)]


def _same(these: list[object], those: list[object]) -> bool:
    return len(these) == len(those) and all(a is b for a, b in zip(these, those, strict=True))


def _wait(module: nn.Module) -> None:
    """Until every GPU of a module has done what it was given, on any stream."""
    for device in {value.device for value in module.parameters() if value.is_cuda}:
        torch.cuda.synchronize(device)
