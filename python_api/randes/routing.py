"""Which model answers which row of a batch, and how the layers of a model are told."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from randes.errors import UnknownModelError
from randes.superposition import BASE_NAME


@dataclass(frozen=True)
class Batch:
    """The models of a batch: of all its rows, or of each of B rows.

    ids: (B,) int32, numbers of models, −1 for the base; B = 1 stands for every row.
    rows: how many rows were named.
    base_only: no row belongs to a model, so that a layer is the base's own.
    """

    ids: Tensor
    rows: int
    base_only: bool

    @property
    def mixed(self) -> bool:
        """Whether rows may belong to different models."""
        return self.ids.shape[0] > 1

    def on(self, device: torch.device) -> Tensor:
        """The ids on a layer's device."""
        return self.ids.to(device, non_blocking=True)

    def spread(self, x: Tensor) -> Tensor:
        """A layer's input with a row for each row of the batch: itself, or the one row that it has for all of them.

        The first dimension must be the batch, or runs of equal length of its rows, flattened: (B·T, K). Raises
        ``ValueError`` for any other. A layer whose first dimension is not the batch (sequence first) but happens to
        be a multiple of it cannot be told apart: such models cannot serve mixed batches.
        """
        if not self.mixed:
            return x
        if x.dim() < 2 or (x.shape[0] != 1 and x.shape[0] % self.ids.shape[0]):
            raise ValueError(
                f"adapter_names names {self.ids.shape[0]} rows, but a layer's input is {tuple(x.shape)}:"
                " its first dimension must be the batch"
            )
        return x.expand(self.ids.shape[0], *x.shape[1:]) if x.shape[0] == 1 else x


class _Scoped(threading.local):
    """What a call of this thread has chosen; threads that use different models at once do not meet."""

    def __init__(self) -> None:
        self.batch: Batch | None = None


class Router:
    """Tells layers the batch's models: those of the call under way, else those chosen for all calls."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.chosen: Batch | None = None
        self._scoped = _Scoped()
        self._numbers = {name: number for number, name in enumerate(self.names)} | {BASE_NAME: -1}

    def __reduce__(self) -> tuple[Any, ...]:
        return Router, (self.names,), {"chosen": self.chosen}  # a copy has calls of its own

    def batch(self) -> Batch:
        """The batch under way. Raises ``RuntimeError`` where no model was chosen: the base is never a default."""
        batch = self._scoped.batch or self.chosen
        if batch is None:
            raise RuntimeError(
                "no model is chosen: call set_adapter(name), pass adapter_names=[...],"
                " or use disable_adapter() for the base"
            )
        return batch

    def of(self, names: "Sequence[str] | Batch") -> Batch:
        """The batch of these names. Raises ``UnknownModelError``, or ``ValueError`` for none or for a bare string."""
        if isinstance(names, Batch):
            return names
        if isinstance(names, str) or not names:
            raise ValueError(f"adapter_names must be a list with one name a row, got {names!r}")
        if unknown := [name for name in names if not isinstance(name, str) or name not in self._numbers]:
            known = ", ".join(self.names) or "no models"
            raise UnknownModelError(f"no model is called {', '.join(sorted(map(repr, unknown)))}; there are: {known}")
        ids = [self._numbers[name] for name in names]
        if len(set(ids)) == 1:
            ids = ids[:1]  # all rows alike are one run
        return Batch(torch.tensor(ids, dtype=torch.int32), len(names), base_only=ids == [-1])

    @contextmanager
    def during(self, batch: Batch) -> Iterator[None]:
        """Choose a batch for the calls that this thread makes inside."""
        before = self._scoped.batch
        self._scoped.batch = batch
        try:
            yield
        finally:
            self._scoped.batch = before
