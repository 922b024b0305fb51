"""The models of a batch, row by row, and the versions of them that a call holds on to."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from randes.serving.table_rows import Row
from randes.superposition.members import Member


class Resolver(Protocol):
    """Whoever knows the models by their names (``routing.Router``)."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def of(self, names: "Sequence[str] | Batch") -> "Batch": ...


@dataclass(frozen=True, eq=False)
class Version:
    """A model as it is served from one change of what it is made of to the next.

    number: its row of the tables by model, −1 for the base. group: the row of its superposition in every ``DeltaPool``.
    kept: of each table of tensors that it has its own of, the row. member: what the superposition recorded of it.
    rows: of tables, which stay its own for as long as a call or a batch has this version.
    """

    name: str
    number: int
    group: int = -1
    kept: Mapping[str, Row] = field(default_factory=dict)
    member: Member | None = None
    rows: tuple[Row, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Version":
        own = copy.deepcopy((self.kept, self.rows), memo)
        return replace(self, kept=own[0], rows=own[1])


class Named:
    """The versions that a batch names, and whose they are: an object that ``torch.compile`` does not look into, so that
    one program serves any.

    numbers: the models' numbers as the host knows them, one a row that was named.
    """

    def __init__(self, router: "Resolver", versions: tuple[Version, ...], numbers: tuple[int, ...]) -> None:
        self.router, self.versions, self.numbers = router, versions, numbers


@dataclass(frozen=True)
class Batch:
    """The models of a batch: of all its rows, or of each of B rows.

    It means the same models, as they were when it was made, for as long as it lives; what they need is kept until then.

    ids: (B,) int32, the models' numbers, −1 for the base; B = 1 stands for every row.
    base_only: no row belongs to a model, so that a layer is the base's own.
    named: the versions that these numbers stand for.
    of_rows: (rows,) int32, the same with a number for every row that was named.
    length: how many positions a row has, which a layer's input may have flattened into its first dimension.
    by_row: a layer under way reads its kept tensors with a row for each row of the batch (``layers/per_model.py``).
    spreads: how many rows a call may have for each one named, one after the other, as the beams of a search are.
    refillable: other models may take these rows (``fill``), so that nothing may depend on which they are now.
    """

    ids: Tensor
    base_only: bool
    named: Named
    of_rows: Tensor
    length: int = 1
    by_row: bool = False
    spreads: int = 1
    refillable: bool = False

    def fill(self, names: Sequence[str]) -> None:
        """Give the rows to other models, in place: for a CUDA graph that was captured with this batch, before the next
        replay. The batch keeps what its models need, so it is kept for as long as the graph.

        Raises ``ValueError`` for another number of names and for a batch that was not made for it
        (``SuperposedModel.batch(names, refillable=True)``), and ``UnknownModelError``. Nothing is changed then.
        """
        if not self.refillable:
            raise ValueError("the batch must be made with refillable=True to be filled with other names")
        other = self.named.router.of(names)
        if other.rows != self.rows:
            raise ValueError(f"names must be one a row of the batch, {self.rows}, got {other.rows}")
        before = self.named.versions  # its rows are free for others only when the new numbers are on their way
        self.named.versions, self.named.numbers = other.named.versions, other.named.numbers
        self.ids.copy_(other.of_rows, non_blocking=True)
        del before

    @property
    def models(self) -> list[str]:
        """The names that were given, each once."""
        return [version.name for version in self.named.versions]

    @property
    def rows(self) -> int:
        """How many rows were named."""
        return self.of_rows.shape[0]

    @property
    def runs_base(self) -> bool:
        """Whether a layer may run as the base's own; not where it is compiled into a program that serves all."""
        return not torch.compiler.is_compiling() and self.base_only

    @property
    def number(self) -> int:
        """The one model of a batch that is not mixed."""
        return self.named.numbers[0]

    @property
    def numbers(self) -> list[int]:
        """The model of each id, without waiting for a device. Raises ``ValueError`` where that may change."""
        if self.refillable:
            raise ValueError(
                "a refillable batch cannot pass a layer that runs once for each model (docs/serving.md): the host"
                " would have to know which models its rows are"
            )
        numbers, count = self.named.numbers, self.ids.shape[0]
        return [numbers[0]] if count == 1 else [n for n in numbers for _ in range(count // len(numbers))]

    @property
    def mixed(self) -> bool:
        """Whether rows may belong to different models."""
        return self.ids.shape[0] > 1 or self.refillable

    def on(self, device: torch.device) -> Tensor:
        """The ids on a layer's device."""
        return self.ids if self.ids.device == device else self.ids.to(device, non_blocking=True)

    def of_one(self, number: int) -> "Batch":
        """The batch of the rows of one model of it."""
        one = torch.tensor([number], dtype=torch.int32, device="cpu")
        named = Named(self.named.router, self.named.versions, (number,))
        return Batch(one.to(self.ids.device), number == -1, named, one, self.length)

    def over(self, first: Tensor) -> "Batch":
        """The same batch for a model whose first input is ``first``, (B, length) integers or (B, length, width) floats
        where it has positions: on its device.

        A program that is being compiled gets a number for every row, whatever the batch: then it serves them all.
        """
        # Tokens, or what is embedded of them. The channels of images are no positions, nor are features.
        embedded = first.is_floating_point() or first.is_complex()
        length = first.shape[1] if first.dim() == (3 if embedded else 2) else 1
        of_rows, ids = self.of_rows, self.ids
        # No other number: images' patches, in one row after the other, are no multiple of anything.
        if self.spreads > 1 and self.mixed and first.shape[0] == self.rows * self.spreads:
            of_rows, ids = (value.repeat_interleave(self.spreads) for value in (of_rows, ids))
        if torch.compiler.is_compiling():
            of_rows = of_rows.to(first.device, non_blocking=True)
            return Batch(of_rows, self.base_only, self.named, of_rows, length, refillable=self.refillable)
        ids = ids.to(first.device, non_blocking=True)
        return Batch(ids, self.base_only, self.named, of_rows, length, refillable=self.refillable)

    def to(self, device: torch.device, refillable: bool = False) -> "Batch":
        """The same batch with its ids on a device, so that no call has to copy them there. refillable: with a number
        for every row, and never run as the base's own."""
        of_rows = self.of_rows.to(device, copy=True)
        ids = of_rows if refillable or self.mixed else of_rows[:1]
        return replace(
            self, ids=ids, of_rows=of_rows, base_only=self.base_only and not refillable, refillable=refillable
        )

    def spread(self, x: Tensor) -> Tensor:
        """A layer's input with a row for each row of the batch: itself, or the one row that it has for all of them.

        The first dimension must be the batch's, 1, or the batch's times the positions of a row, flattened. Raises
        ``ValueError`` for any other: whose rows those are cannot be known.
        """
        count = self.ids.shape[0]
        if not self.mixed:
            return x
        if x.dim() < 2 or x.shape[0] not in (1, count, count * self.length):
            raise ValueError(
                f"adapter_names names {count} rows, but a layer's input is {tuple(x.shape)}:"
                " its first dimension must be the batch"
            )
        return x.expand(count, *x.shape[1:]) if x.shape[0] == 1 else x
