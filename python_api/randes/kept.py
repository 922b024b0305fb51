"""What models have of their own beside the superposed matrices, and how a layer reads it for a mixed batch."""

from typing import Any

import torch
from torch import Tensor, nn

from randes.routing import Router
from randes.superposition import Superposition


class KeptTable(nn.Module):
    """One tensor as each model has it: the rows of those that differ from the base, and who has which.

    Where models differ in its shape (heads of other numbers of classes), ``values`` is empty and each has its own.
    """

    values: Tensor
    rows: Tensor

    def __init__(self, superposition: Superposition, tensor: str, like: Tensor) -> None:
        super().__init__()
        values: list[Tensor] = []
        rows: list[int] = []
        summed: dict[float, int] = {}  # an average is one for all, a sum for all of one α
        for model in superposition.served:
            own = superposition.other(model, tensor)
            if own is superposition.base[tensor]:
                rows.append(-1)
                continue
            if tensor in superposition.averages:
                alpha = superposition.members[model].alpha if superposition.config.others == "sum" else 1.0
                rows.append(summed.setdefault(alpha, len(values)))
            else:
                rows.append(len(values))
            if rows[-1] == len(values):
                values.append(own.to(like.device, like.dtype))
        self.ragged = any(value.shape != like.shape for value in values)
        for number, value in enumerate(values if self.ragged else []):
            self.register_buffer(f"value_{number}", value, persistent=False)
        self.register_buffer("values", torch.empty(0) if self.ragged else torch.stack(values), persistent=False)
        self.register_buffer("rows", torch.tensor(rows, dtype=torch.int32, device=like.device), persistent=False)
        self.numbers = tuple(rows)

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


class Unreadable(Tensor):
    """A kept or superposed tensor where nobody routes it: its shape, dtype and device can be asked for.

    Anything else is refused with ``ValueError``: whose values to compute with is not known.
    """

    _error: ValueError

    _described: str

    @classmethod
    def like(cls, base: Tensor, refusal: str) -> "Unreadable":
        """In place of ``base``; ``refusal`` is what the error says."""
        error = ValueError(refusal)
        if torch.compiler.is_compiling():
            raise error
        found = base.detach().as_subclass(cls)
        found._error = error
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        leaves = [*args, *(kwargs or {}).values()]
        raise next(leaf for leaf in leaves if isinstance(leaf, cls))._error


_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta")),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, torch.is_floating_point, Tensor.__len__,
}  # fmt: skip


class Routed(nn.Module):
    """Mixed into a layer's class: what its tables hold counts instead of its own tensors.

    Read from outside, and by layers that are not routed row by row, a kept tensor is that of the batch's one model.
    """

    _router: Router
    _tables: nn.ModuleDict  # of KeptTable

    def _table(self, name: str) -> KeptTable | None:
        held: dict[str, nn.Module] = dict(self._tables.items())
        table = held.get(key_of(name))
        assert table is None or isinstance(table, KeptTable)
        return table

    def _own(self, name: str, ids: Tensor, *place: int) -> Tensor | None:
        """The parameter ``name`` for each id, or what is at ``place`` in it, (B, *shape); None where there is none."""
        base, table = self._parameters[name], self._table(name)
        if base is None:
            return None
        if table is None:
            return base[place].expand(len(ids), *base[place].shape)
        if not self._router.batch().mixed and not torch.compiler.is_compiling():
            return table.of(self._router.batch().number, base)[place][None]
        return table.select(ids, base, *place)

    def _spread(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input with a row for each row of the batch, and the batch's ids: None where it is the base's alone."""
        batch = self._router.batch()
        return batch.spread(input), None if batch.runs_base else batch.on(input.device)

    def _kept(self, name: str) -> Tensor:
        batch, table = self._router.batch(), self._table(name)
        base = self._parameters.get(name, self._buffers.get(name))
        assert base is not None
        assert table is not None
        if batch.by_row:
            return table.select(batch.on(base.device), base)[:, None]
        if batch.mixed:
            return Unreadable.like(
                base,
                f"{name} of a {type(self).__name__} is kept per model, and cannot be read for rows of several models at"
                ' once: run one model at a time, or superpose with others="base"',
            )
        if torch.compiler.is_compiling():
            return table.select(batch.on(base.device), base)[0]
        return table.of(batch.number, base)

    def _superposed(self, name: str) -> Tensor:
        base = self._parameters[name]
        assert base is not None
        batch = self._router.current()
        if batch is None or batch.runs_base:
            return base
        return Unreadable.like(base, f"{name} of a {type(self).__name__} is superposed: call the layer instead")

    def extra_repr(self) -> str:
        """The base's: a layer is printed where no model is chosen."""
        with self._router.during(self._router.of_base()):
            return super().extra_repr()


def key_of(name: str) -> str:
    """What a tensor's table is called in its layer: a tensor may have the name of a module's method."""
    return f"own_{name}"
