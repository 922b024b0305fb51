"""What models have of their own beside the superposed matrices, and how a layer reads it for a mixed batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from randes.checkpoints.lazy_tensors import headers
from randes.checkpoints.modules.parameters import base_of, has
from randes.config import LARGE_TABLE, is_embedding
from randes.errors import CheckpointError
from randes.serving.batch import Version
from randes.serving.layers.recomputed import recomputed_property
from randes.serving.layers.served_weights import ServedWeight
from randes.serving.layers.shards import Shard
from randes.serving.routing import Router
from randes.serving.table_rows import Row, Rows, put
from randes.superposition.members import BASE_NAME, Member
from randes.superposition.retrieve import unsuperposed
from randes.superposition.superposition import Superposition

RESERVED_ELEMENTS = 1 << 16
"""Of a tensor that models with room for others reserve rows of; a larger one's are made when somebody needs one."""


class PerModelTensor(nn.Module):
    """One tensor as each model has it: the rows of those that differ from the base, and who has which.

    Where models differ in its shape (heads of other numbers of classes), ``values`` is empty and each has its own.
    vocabulary: whether its rows are tokens.

    like: the base's, or what ``shard`` is of it. numbers: of models that there is room for; ``write`` says which those
    are. room: for how many tensors, by default for those that the models have. Raises ``ValueError`` for a shard where
    models differ in its shape.
    """

    values: Tensor
    rows: Tensor

    def __init__(
        self, superposition: Superposition, tensor: str, like: Tensor, numbers: int, room: int | None = None,
        shard: Shard | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        like, self.shard = like.detach(), shard
        whole = like if shard is None else torch.empty(shard.shape[: like.dim()], device="meta")
        members = superposition.members
        own = [name for name in members if tensor in superposition.own_tensors(name)]
        shapes = [_shape_of(members[name], tensor, whole) for name in own]
        count = len(own) + superposition.is_averaged(tensor)
        if superposition.has_own(tensor):
            count = len(members)
        self.tensor, self.shape = tensor, like.shape
        self.ragged = any(shape != whole.shape for shape in shapes)
        if self.ragged and shard is not None:
            raise ValueError(f"{tensor} is of another shape in some models, and cannot be cut into shards")
        self.vocabulary = is_embedding(tensor) or _is_head(tensor, headers(superposition.base))
        self.table_rows = Rows(max(count, room or 0))
        # Whether any model's tensor may be here: a layer that nobody changed costs nothing.
        self.used = count > 0 or (room is not None and like.numel() <= RESERVED_ELEMENTS)
        held = self.table_rows.count if self.used and not self.ragged else 0
        self.register_buffer("values", like.new_zeros(held, *like.shape), persistent=False)
        self.numbers = [-1] * numbers
        rows = torch.full((numbers,), -1, dtype=torch.int32, device=like.device)
        self.register_buffer("rows", rows, persistent=False)

    @torch.no_grad()
    def hold(
        self, superposition: Superposition, name: str, averages: dict[str, Row], wait: Callable[[], None]
    ) -> Row | None:
        """A row with a model's own tensor; None where it has the base's. averages: rows that all models share. wait:
        until a device has done what was given to it by whoever had the row before.

        Raises ``CapacityError`` where no row is free, and ``CheckpointError`` for another shape where all have one.
        """
        own = self.tensor in superposition.own_tensors(name) | superposition.layout.vectors
        if not own and (name == BASE_NAME or not superposition.is_averaged(self.tensor)):
            return None
        own = own or superposition.has_own(self.tensor)
        if not own and self.tensor in averages:
            return averages[self.tensor]
        row = self.table_rows.take(f"row for {self.tensor} of {name!r}")
        value = unsuperposed(superposition, name, self.tensor)
        if self.shard is not None and value.shape == self.shard.shape[: value.dim()]:
            value = self.shard.of_tensor(value)
        wait()
        if self.ragged:
            taken = self.table_rows.taken
            for key in [f"value_{index}" for index in range(self.table_rows.count) if index not in taken]:
                self._buffers.pop(key, None)
            place = self.rows.device, self.values.dtype
            self.register_buffer(f"value_{row.index}", value.to(*place, copy=True), persistent=False)
        elif value.shape != self.shape:
            raise CheckpointError(
                f"{self.tensor} of {name!r} must be {tuple(self.shape)}, got {tuple(value.shape)}: a model with a head"
                " of another shape can join only where one was served from the start"
            )
        else:
            if not self.used:
                self.values = self.values.new_zeros(self.table_rows.count, *self.shape)
            put(self.values, row.index, value)
        self.used = True
        if not own:
            averages[self.tensor] = row
        return row

    @torch.no_grad()
    def write(self, versions: Sequence[Version]) -> None:
        """Fill these models' rows, which nobody reads yet."""
        for version in versions:
            row = version.kept.get(self.tensor)
            self.numbers[version.number] = -1 if row is None else row.index
        numbers = [version.number for version in versions]
        rows = [self.numbers[number] for number in numbers]
        put(self.rows, numbers, torch.tensor(rows, dtype=torch.int32, device="cpu"))

    def row_of(self, ids: Tensor) -> Tensor:
        """For each id the row of ``values`` that is its own, −1 for the base's."""
        return torch.where(ids >= 0, self.rows[ids.clamp(min=0)], -1)

    def select(self, ids: Tensor, base: Tensor, *place: int) -> Tensor:
        """For each of B ids its model's tensor, or what is at ``place`` in it: (B, *shape)."""
        row = self.row_of(ids)
        where: tuple[Any, ...] = row.clamp(min=0), *place
        own, base = self.values[where], base[place]
        return torch.where((row >= 0).view(-1, *[1] * base.dim()), own, base)

    def of(self, model: int, base: Tensor) -> Tensor:
        """One model's tensor, not copied."""
        row = -1 if model < 0 else self.numbers[model]
        if row < 0:
            return base
        return getattr(self, f"value_{row}") if self.ragged else self.values[row]


def _is_head(tensor: str, base: Mapping[str, Tensor]) -> bool:
    """Whether a tensor has a row for each token: as many as a table of embeddings, and those many."""
    if tensor not in base or base[tensor].numel() < LARGE_TABLE:
        return False
    return any(is_embedding(name) and len(table) == len(base[tensor]) for name, table in base.items())


def _shape_of(member: Member, tensor: str, like: Tensor) -> tuple[int, ...]:
    """Of a model's own tensor, where the base's is ``like``."""
    added = headers(member.added)
    first = len(like) + len(added[tensor]) if tensor in added else 0
    return (first, *like.shape[1:]) if first else tuple(headers(member.kept).get(tensor, like).shape)


class Routed(nn.Module):
    """Mixed into a layer's class: what its tables hold counts instead of its own tensors.

    Read from outside, and by layers that are not routed row by row, a kept tensor is that of the batch's one model.
    """

    moved: ClassVar[frozenset[str]] = frozenset()  # parameters and buffers that are properties (served_weights.py)
    made_of: ClassVar[tuple[Any, ...]] = ()  # what ``routed_class`` made this class of

    _router: Router
    _tables: nn.ModuleDict  # of PerModelTensor

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes that are made for a kind of layer have no name to be found by: they are made again.
        plain: Any = super().__reduce_ex__(protocol)
        return (new_layer, self.made_of, *plain[2:])

    def _table(self, name: str) -> PerModelTensor | None:
        """None where all models have the base's."""
        held: dict[str, nn.Module] = dict(self._tables.items())
        table = held.get(key_of(name))
        assert table is None or isinstance(table, PerModelTensor)
        return table if table is not None and table.used else None

    def _own(self, name: str, ids: Tensor, *place: int) -> Tensor | None:
        """The parameter ``name`` for each id, or what is at ``place`` in it, (B, *shape); None where there is none."""
        if not has(self, name):
            return None
        base, table = base_of(self, name), self._table(name)
        if table is None:
            return base[place].expand(len(ids), *base[place].shape)
        if not self._router.batch().mixed and not torch.compiler.is_compiling():
            return table.of(self._router.batch().number, base)[place][None]
        return table.select(ids, base, *place)

    def _spread(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input with a row for each row of the batch, and the batch's ids: None where it is the base's alone."""
        batch = self._router.batch()
        return batch.spread(input), None if batch.runs_base else batch.on(input.device)

    def _kept(self, name: str) -> Tensor | ServedWeight | None:
        if not has(self, name):
            return None
        base, table = base_of(self, name), self._table(name)
        if table is None:
            return base
        batch = self._router.current()
        if batch is None or (batch.mixed and not batch.by_row):
            return ServedWeight(
                self, name, self._router,
                f"{name} of a {type(self).__name__} is kept per model, and cannot be read for rows of several models at"
                " once, or where no model is chosen: run one model at a time",
            )  # fmt: skip
        if batch.by_row:
            return table.select(batch.on(base.device), base)[:, None]
        if torch.compiler.is_compiling():
            return table.select(batch.on(base.device), base)[0]
        return table.of(batch.number, base)

    def _superposed(self, name: str) -> ServedWeight:
        return ServedWeight(
            self, name, self._router, f"{name} of a {type(self).__name__} is superposed: call the layer instead"
        )


def key_of(name: str) -> str:
    """What a tensor's table is called in its layer: a tensor may have the name of a module's method."""
    return f"own_{name}"


def _kept_property(name: str) -> property:
    return property(lambda self: self._kept(name))


def _superposed_property(name: str) -> property:
    return property(lambda self: self._superposed(name))


_CLASSES: dict[tuple[Any, ...], type[Routed]] = {}


def routed_class(
    kind: type[Routed], plain: type[nn.Module], kept: tuple[str, ...], superposed: tuple[str, ...],
    recomputed: tuple[str, ...] = (),
) -> type[Routed]:  # fmt: skip
    """The class of ``plain`` layers that take each row's own of these tensors as ``kind`` does: one for all of them.

    recomputed: the names of weights that are made of them before each call.
    """
    made_of = kind, plain, kept, superposed, recomputed
    if made_of in _CLASSES:
        return _CLASSES[made_of]
    bases: tuple[type, ...] = (kind, plain)
    if issubclass(kind, plain):
        bases = (kind,)
    elif issubclass(kind, nn.Embedding):
        bases = (plain, kind)  # its own forward, around the routed look-up
    way = "Superposed" if kind.__name__.startswith("Superposed") else "Routed"
    reads = {name: _kept_property(name) for name in kept} | {name: _superposed_property(name) for name in superposed}
    made = {name: recomputed_property(name) for name in recomputed}
    about: dict[str, Any] = {"moved": frozenset(reads), "made_of": made_of, "__module__": kind.__module__}
    return _CLASSES.setdefault(made_of, type(f"{way}{plain.__name__}", bases, reads | made | about))


def new_layer(
    kind: type[Routed], plain: type[nn.Module], kept: tuple[str, ...], superposed: tuple[str, ...],
    recomputed: tuple[str, ...] = (),
) -> nn.Module:  # fmt: skip
    """A layer of such a class, without its state: for copies and for pickle."""
    made = routed_class(kind, plain, kept, superposed, recomputed)
    return made.__new__(made)
