"""Which model answers which row of a batch, and how the layers of a model are told."""

import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from randes.errors import UnknownModelError
from randes.serving.batch import Batch, Named, Version
from randes.serving.scopes import Scope, Scoped, SuspendableScope, Using, inherits, innermost
from randes.superposition.members import BASE_NAME

INPUTS = (
    "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "pixel_values", "input_features",
    "input_values", "hidden_states",
)  # fmt: skip
"""What Transformers calls a model's first input, by which it is known whatever comes before it."""


OTHER_ROWS = (
    "Bros", "Deberta", "FSMT", "Funnel", "LED", "Lfm3VlVision", "Longformer", "MiniMaxM3VLVision", "PaddleOCRVision",
    "Pixtral", "RoFormer", "XLNet",
)  # fmt: skip
"""Transformers models that put positions before rows, run linear layers over relative positions, or lay the patches of
all images into one row. A batch as large as its rows are long would look right there, and one row would stand for all,
so mixed ones are refused whatever their size."""


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor whose first dimension is the batch: the first of a call's."""
    named = (kwargs.get(name) for name in INPUTS)
    found = (value for value in (*args, *named, *kwargs.values()) if isinstance(value, Tensor) and value.dim())
    return next(found, None)


def check_rows(batch: Batch, first: Tensor | None) -> Tensor:
    """A call's first input. Raises ``ValueError`` unless it has a row for each one that the batch names."""
    if first is None or batch.rows != first.shape[0]:
        rows = 0 if first is None else first.shape[0]
        raise ValueError(f"adapter_names must have one name a row of the batch, {rows}, got {batch.rows}")
    return first


def sequences_of(model: Any, kwargs: dict[str, Any]) -> int:
    """How many sequences ``generate`` makes of each row while it runs: beams, or those that it returns."""
    settings = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    asked = (kwargs.get(name, getattr(settings, name, None)) for name in ("num_beams", "num_return_sequences"))
    return max(number or 1 for number in asked)


class Router:
    """Tells layers the batch's models: those of the call under way in this thread, else those chosen for all calls.

    Which models there are is replaced as a whole, so that no call waits: one that began goes on with what it found.
    """

    def __init__(self, names: Sequence[str], has_base: bool = True) -> None:
        """has_base: whether the base can be asked for beside ``names``."""
        self.has_base = has_base
        self.chosen: Batch | None = None
        self.changing = threading.RLock()  # held by who adds and deletes models
        self._lock = threading.RLock()
        self._scoped = Scoped()
        self._suspendable: list[SuspendableScope] = []
        self._under_way: set[Scope] = set()  # of all threads
        self.versions: Mapping[str, Version] = self._with_base(
            Version(name, number) for number, name in enumerate(names)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy has calls of its own.
        return Router, ((), self.has_base), {"chosen": self.chosen, "versions": self.versions}

    @property
    def names(self) -> tuple[str, ...]:
        """All that can be asked for, but for a base that is not superposed."""
        return tuple(sorted(name for name, version in self.versions.items() if version.number >= 0))

    def serve(self, versions: Sequence[Version]) -> None:
        """Calls that begin from now on find these models."""
        with self._lock:
            self.versions = self._with_base(versions)
            if self.chosen is not None:
                name = self.chosen.named.versions[0].name
                self.chosen = self.of([name]) if name in self.versions else None

    def choose(self, name: str) -> None:
        """Have all calls that name no model answer as this one. Raises ``UnknownModelError``."""
        with self._lock:
            self.chosen = self.of([name])

    def _scope(self) -> Scope:
        scope = self._scoped.scope
        if scope.closed:
            scope = self._scoped.open()
        # A call that is under way has looked at its context already.
        if self._suspendable or (scope.owner is None and not torch.compiler.is_compiling() and inherits()):
            return innermost(scope, self._suspendable)
        return scope

    def current(self) -> Batch | None:
        """The batch under way, if there is one."""
        batch = self._scope().batch
        return self.chosen if batch is None else batch

    def batch(self) -> Batch:
        """The batch under way. Raises ``RuntimeError`` where no model was chosen: the base is never a default; and in a
        thread that chose none while others answer as other models, since it may be one that a call of theirs started.
        """
        batch = self._scope().batch
        if batch is not None:
            return batch
        batch = self.chosen
        if batch is None:
            raise RuntimeError(
                "no model is chosen: call set_adapter(name), pass adapter_names=[...],"
                " or use disable_adapter() for the base"
            )
        if not torch.compiler.is_compiling() and self._under_way:
            versions = batch.named.versions
            others = (scope.batch.named.versions for scope in tuple(self._under_way) if scope.batch is not None)
            if any(other != versions for other in others):
                raise RuntimeError(
                    "a layer was called in a thread that chose no model while another thread answers as others than"
                    f" {versions[0].name!r}, which set_adapter chose: whether it is part of that call cannot be known;"
                    " call the whole model, or hold using(names) in this thread"
                )
        return batch

    def of(self, names: "Sequence[str] | Batch") -> Batch:
        """The batch of these names. Raises ``UnknownModelError``, or ``ValueError`` for none or for a bare string."""
        if isinstance(names, Batch):
            if names.named.router is not self:
                others = names.named.router.names
                raise ValueError(f"adapter_names must be a batch of this model, of {self.names}, got one of {others}")
            return names
        if isinstance(names, str | bytes) or not isinstance(names, Sequence) or not names:
            raise ValueError(f"adapter_names must be a list with one name a row, got {names!r}")
        versions = self.versions  # may be replaced meanwhile
        if unknown := [name for name in names if not isinstance(name, str) or name not in versions]:
            known = ", ".join(self.names) or "no models"
            del versions  # an error may be kept long, with this frame, and they would be
            raise UnknownModelError(
                f"no model is called {', '.join(sorted({*map(repr, unknown)}))}; there are: {known}"
            )
        ids = [versions[name].number for name in names]
        of_rows = torch.tensor(ids, dtype=torch.int32, device="cpu")
        alike = len(set(ids)) == 1
        named = Named(self, tuple(versions[name] for name in dict.fromkeys(names)), tuple(ids))
        return Batch(of_rows[:1] if alike else of_rows, alike and ids[0] == -1, named, of_rows)

    def of_base(self) -> Batch:
        """The batch that runs every layer as the base's own: to look at layers with."""
        base = torch.tensor([-1], dtype=torch.int32, device="cpu")
        return Batch(base, True, Named(self, (Version(BASE_NAME, -1),), (-1,)), base)

    def of_part(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch | None:
        """The batch for a call of a whole model inside: its rows are the batch's, or ``ValueError`` is raised. None
        where it goes on with what there is."""
        if kwargs.get("adapter_names") is not None:
            return None  # the call will choose, and come again
        batch = self.batch()
        first = first_input(args, kwargs)
        if first is None:
            return None
        over = batch.over(first)
        if over.mixed and type(module).__name__.startswith(OTHER_ROWS):
            raise ValueError(
                f"adapter_names must be one model's for a {type(module).__name__}: inside, it has other rows than its"
                " batch, so that whose they are cannot be told"
            )
        if over.mixed and over.rows != first.shape[0]:
            raise ValueError(
                f"adapter_names must have one name a row of the batch of a {type(module).__name__}, {first.shape[0]},"
                f" got {batch.rows}; parts with other numbers of rows are called one by one, each within using(names)"
            )
        return over

    @contextmanager
    def during(self, batch: Batch | None, *, whole: bool = False) -> Iterator[None]:
        """Choose a batch for the calls that this thread makes inside, which waits for nobody there. Entered by a
        ``with`` alone: the frame that has it says which other scopes are inside this one.

        whole: it is for a call of the whole model, of which other threads may run parts.
        """
        before, compiling = self._scoped.scope, torch.compiler.is_compiling()
        scope = Scope(batch, before, None if compiling else sys._getframe(2))
        self._scoped.scope = scope
        if whole and not compiling:
            self._under_way.add(scope)
        try:
            yield
        finally:
            scope.owner = None
            self._scoped.scope = before
            if whole and not compiling:
                self._under_way.discard(scope)

    def holds(self) -> bool:
        """Whether this thread has a choice of its own, which no other changes."""
        return self._scoped.scope.batch is not None and not self._scoped.scope.closed and not self._suspendable

    def using(self, batch: Batch) -> Using:
        """The same, also inside what may be suspended meanwhile: a task that awaits, a generator that yields. The batch
        is for the calls of that task or generator, and for nobody else's that run while it waits."""
        return Using(batch, self._scoped, self._suspendable, self._under_way)

    def _with_base(self, versions: Iterable[Version]) -> dict[str, Version]:
        # Where deltas are centred the base is superposed too, and has a number of its own.
        base = {BASE_NAME: Version(BASE_NAME, -1)} if self.has_base else {}
        return base | {version.name: version for version in versions}
