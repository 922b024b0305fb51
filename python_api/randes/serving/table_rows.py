"""Rows of tables of a fixed size, each taken for as long as somebody refers to it."""

import gc
import time
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor

from randes.errors import CapacityError

BETWEEN_COLLECTIONS = 1.0
"""Seconds, at least, from one collection of garbage to the next."""


class Row:
    """One row. It is free for another when nobody refers to this any more."""

    __slots__ = ("__weakref__", "index")

    def __init__(self, index: int) -> None:
        self.index = index


class Rows:
    """Which of ``count`` rows are taken. One thread takes rows; they may come free in any."""

    def __init__(self, count: int) -> None:
        self.count, self._collected = count, float("-inf")
        self._taken: WeakValueDictionary[int, Row] = WeakValueDictionary()

    def take(self, what: str) -> Row:
        """The first free row. what: it is for, in the ``CapacityError`` that is raised where there is none."""
        index = self._free()
        # A compiler, or an error's traceback, may have left a batch in a cycle. Whoever tries again and again does not
        # collect each time: every thread waits for that, and those that hold rows would never end.
        if index is None and time.monotonic() - self._collected > BETWEEN_COLLECTIONS:
            gc.collect()
            self._collected = time.monotonic()
            index = self._free()
        if index is None:
            raise CapacityError(
                f"there is no free {what} among {self.count}: they are in use, some maybe by calls or batches that"
                " began before a change; try again when those have ended, or make the model with a larger capacity"
            )
        row = self._taken[index] = Row(index)
        return row

    def _free(self) -> int | None:
        return next((index for index in range(self.count) if index not in self._taken), None)

    @property
    def taken(self) -> list[int]:
        """The rows that somebody holds."""
        return sorted(self._taken.keys())

    def __getstate__(self) -> dict[str, Any]:  # a copy's rows are its own
        return {"count": self.count, "taken": dict(self._taken)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.count, self._collected = state["count"], float("-inf")
        self._taken = WeakValueDictionary(state["taken"])


def put(table: Tensor, rows: int | list[int], values: Tensor) -> None:
    """Write rows of a table that nobody reads. Past autograd's version counter, which is the whole table's: a backward
    pass that saved it needs other rows."""
    table.data[rows] = values.to(table.device, table.dtype)
