"""Which model answers which row of a batch, and how the layers of a model are told."""

import contextlib
import copy
import inspect
import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from randes.errors import UnknownModelError
from randes.leases import Lease
from randes.members import BASE_NAME, Member


@dataclass(frozen=True, eq=False)
class Version:
    """A model as it is served from one change of what it is made of to the next.

    number: its row of the tables by model, −1 for the base. group: the row of its superposition in every ``DeltaPool``.
    kept: of each table of tensors that it has its own of, the row. member: what the superposition recorded of it.
    leases: keep these rows its own for as long as a call or a batch has this version.
    """

    name: str
    number: int
    group: int = -1
    kept: Mapping[str, Lease] = field(default_factory=dict)
    member: Member | None = None
    leases: tuple[Lease, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Version":
        own = copy.deepcopy((self.kept, self.leases), memo)
        return replace(self, kept=own[0], leases=own[1])


class Named:
    """The versions that a batch names, and whose they are: an object that ``torch.compile`` does not look into, so that
    one program serves any.

    numbers: the models' numbers as the host knows them, one a row that was named.
    """

    def __init__(self, router: "Router", versions: tuple[Version, ...], numbers: tuple[int, ...]) -> None:
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
    by_row: a layer under way reads its kept tensors with a row for each row of the batch (``kept.py``).
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
        """The same batch for a model whose first input is ``first``, (B, length, ...): on its device.

        A program that is being compiled gets a number for every row, whatever the batch: then it serves them all.
        """
        length = first.shape[1] if first.dim() > 1 else 1
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


INPUTS = (
    "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "pixel_values", "input_features",
    "input_values", "hidden_states",
)  # fmt: skip
"""What Transformers calls a model's first input, by which it is known whatever comes before it."""


OTHER_ROWS = (
    "Bros", "Deberta", "FSMT", "Funnel", "LED", "Lfm3VlVision", "Longformer", "MiniMaxM3VLVision", "PaddleOCRVision",
    "Pixtral", "XLNet",
)  # fmt: skip
"""Transformers models that put positions before rows, run linear layers over relative positions, or lay the patches of
all images into one row. A batch as large as its rows are long would look right there, and one row would stand for all,
so mixed ones are refused whatever their size."""


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor whose first dimension is the batch: the first of a call's."""
    named = (kwargs.get(name) for name in INPUTS)
    found = (value for value in (*args, *named, *kwargs.values()) if isinstance(value, Tensor) and value.dim())
    return next(found, None)


class _Scope:
    """A batch that was chosen for a while."""

    def __init__(self, batch: Batch | None) -> None:
        self.batch = batch


_OUTSIDE = _Scope(None)


class _Scoped(threading.local):
    """What a call of this thread has chosen; threads that use different models at once do not meet."""

    def __init__(self) -> None:
        self.scope = _OUTSIDE
        self.before: list[_Scope] = []  # of the calls of whole models under way, innermost last


class _SuspendableScope(_Scope):
    """A scope that was opened inside a coroutine or a generator: it counts while that is running, in any thread.

    Python tells nobody that one is suspended, but its frame is not on a thread's stack then. What a coroutine starts
    elsewhere (a task, a function in a thread) runs without its frame, and finds the scope in its context.
    """

    def __init__(self, batch: Batch, owner: FrameType, outer: _Scope, opened: "list[_SuspendableScope]") -> None:
        super().__init__(batch)
        self._owner, self._outer, self._opened = owner, outer, opened

    def __enter__(self) -> None:
        self._opened.append(self)
        if self._owner.f_code.co_flags & inspect.CO_COROUTINE:  # a generator's context is that of whoever runs it
            _TASK.set((*_TASK.get(), self))

    def __exit__(self, *_: object) -> None:
        self._opened.remove(self)
        _TASK.set(tuple(scope for scope in _TASK.get() if scope is not self))

    def counts(self, running: Collection[FrameType], scope: _Scope) -> bool:
        """Whether this is chosen, with these frames on the stack and ``scope`` the thread's innermost other one: that
        may be of a call that was made since."""
        return scope in (self._outer, _OUTSIDE) and (self._owner in running or self in _TASK.get())


_TASK: ContextVar[tuple[_SuspendableScope, ...]] = ContextVar("randes_scopes", default=())


def _innermost(scope: _Scope, opened: Sequence[_SuspendableScope]) -> _Scope:
    """The scope that counts now: ``scope``, or one of those that were opened in coroutines and generators."""
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "using(...) and disable_adapter() inside a coroutine or a generator cannot be seen by a compiled model:"
            " pass adapter_names=[...] to its calls"
        )
    running = set()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        running.add(frame)
        frame = frame.f_back
    return next((own for own in reversed(tuple(opened)) if own.counts(running, scope)), scope)


def _file(frame: FrameType | None) -> str | None:
    return None if frame is None else frame.f_code.co_filename


_SUSPENDABLE = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE


def _suspendable_frame(frame: FrameType | None) -> FrameType | None:
    """The nearest caller that can be suspended; None where there is none. Generators that are context managers, as
    ``contextlib`` runs them, are left out: what counts is who entered them."""
    while frame is not None:
        entered_by = frame.f_back
        if frame.f_code.co_flags & _SUSPENDABLE and not {_file(frame), _file(entered_by)} & {contextlib.__file__}:
            return frame
        frame = entered_by
    return None


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
        self._scoped = _Scoped()
        self._suspendable: list[_SuspendableScope] = []
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

    def current(self) -> Batch | None:
        """The batch under way, if there is one."""
        scope = self._scoped.scope
        if self._suspendable:
            scope = _innermost(scope, self._suspendable)
        return self.chosen if scope.batch is None else scope.batch

    def batch(self) -> Batch:
        """The batch under way. Raises ``RuntimeError`` where no model was chosen: the base is never a default."""
        batch = self.current()
        if batch is None:
            raise RuntimeError(
                "no model is chosen: call set_adapter(name), pass adapter_names=[...],"
                " or use disable_adapter() for the base"
            )
        return batch

    def of(self, names: "Sequence[str] | Batch") -> Batch:
        """The batch of these names. Raises ``UnknownModelError``, or ``ValueError`` for none or for a bare string."""
        if isinstance(names, Batch):
            if names.named.router is not self:
                others = names.named.router.names
                raise ValueError(f"adapter_names must be a batch of this model, of {self.names}, got one of {others}")
            return names
        if isinstance(names, str) or not names:
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

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a call of a whole model inside: its rows are the batch's, or ``ValueError`` is raised."""
        scoped = self._scoped
        scoped.before.append(scoped.scope)
        if kwargs.get("adapter_names") is not None:
            return  # the call will choose, and come again
        batch = self.batch()
        first = first_input(args, kwargs)
        if first is None:
            return
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
        scoped.scope = _Scope(over)

    def leave(self, *_: Any) -> None:
        """After a call that was entered, whether it failed or not."""
        self._scoped.scope = self._scoped.before.pop()

    @contextmanager
    def during(self, batch: Batch | None) -> Iterator[None]:
        """Choose a batch for the calls that this thread makes inside, which waits for nobody there."""
        before = self._scoped.scope
        self._scoped.scope = _Scope(batch)
        try:
            yield
        finally:
            self._scoped.scope = before

    def using(self, batch: Batch) -> AbstractContextManager[None]:
        """The same, also inside what may be suspended meanwhile: a task that awaits, a generator that yields. The batch
        is for the calls of that task or generator, and for nobody else's that run while it waits."""
        owner = _suspendable_frame(sys._getframe(1))
        if owner is None:
            return self.during(batch)
        return _SuspendableScope(batch, owner, self._scoped.scope, self._suspendable)

    def _with_base(self, versions: Iterable[Version]) -> dict[str, Version]:
        # Where deltas are centred the base is superposed too, and has a number of its own.
        base = {BASE_NAME: Version(BASE_NAME, -1)} if self.has_base else {}
        return base | {version.name: version for version in versions}
