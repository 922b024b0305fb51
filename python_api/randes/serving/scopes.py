"""For which calls a batch was chosen: those of one thread, and inside a coroutine or a generator of that one alone."""

import asyncio
import contextlib
import inspect
import itertools
import sys
import threading
import weakref
from collections.abc import Sequence
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch

from randes.serving.batch import Batch


class Scope:
    """A batch that was chosen for a while.

    before: the thread's scope around this one. owner: of a call under way, the frame that chose, which is on the
    thread's stack for as long as this counts. closed: it counts no more, but its thread has not looked since.
    """

    def __init__(self, batch: Batch | None, before: "Scope | None" = None, owner: FrameType | None = None) -> None:
        self.batch, self.before, self.owner, self.closed = batch, before, owner, False


OUTSIDE = Scope(None)


class Scoped(threading.local):
    """What a call of this thread has chosen; threads that use different models at once do not meet."""

    def __init__(self) -> None:
        self.scope = OUTSIDE

    def open(self) -> Scope:
        """The innermost scope that was not closed, which may have happened in any order and in any thread."""
        scope = self.scope
        while scope.closed:
            scope = scope.before or OUTSIDE
        self.scope = scope
        return scope


_SERIAL = itertools.count()
_COROUTINE = inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE
_SUSPENDABLE = _COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class SuspendableScope(Scope):
    """A scope that was opened inside a coroutine or a generator: it counts while that is running, in any thread.

    Python tells nobody that one is suspended, but its frame is not on a thread's stack then. What a coroutine starts
    elsewhere (a task, a function in a thread) runs without its frame, and finds the scope in its context. So does what
    an async generator starts, but its context is its consumer's: who of the two started it cannot be told.
    """

    def __init__(self, batch: Batch, owner: FrameType, outer: Scope, opened: "list[SuspendableScope]") -> None:
        super().__init__(batch, owner=owner)
        self.outer, self.serial = outer, next(_SERIAL)
        running = _frames(owner)
        self.outside = frozenset(_inherited()).union(other for other in opened if other.owner in running)
        self.consumer: weakref.ref[asyncio.Task[Any]] | None = None  # of an async generator: the task that runs it
        self._opened = opened
        opened.append(self)
        task = _current_task()
        if owner.f_code.co_flags & inspect.CO_ASYNC_GENERATOR and task is not None:
            self.consumer = weakref.ref(task)
        if owner.f_code.co_flags & _COROUTINE or self.consumer is not None:
            _TASK.set((*_TASK.get(), self))

    def close(self) -> None:
        self.closed, self.owner = True, None
        self._opened.remove(self)
        _TASK.set(tuple(scope for scope in _TASK.get() if scope is not self))


_TASK: ContextVar[tuple[SuspendableScope, ...]] = ContextVar("randes_scopes", default=())


class Using(contextlib.ContextDecorator):
    """``with`` it, a batch is chosen: for the thread that enters it, or for the coroutine or generator that does."""

    def __init__(
        self, batch: Batch, scoped: Scoped, opened: list[SuspendableScope], under_way: set[Scope]
    ) -> None:  # fmt: skip
        self._batch, self._scoped, self._opened, self._under_way = batch, scoped, opened, under_way
        self._scope: Scope | None = None
        self._thread = 0

    def _recreate_cm(self) -> "Using":  # as a decorator: one for each call
        return Using(self._batch, self._scoped, self._opened, self._under_way)

    def __enter__(self) -> None:
        if self._scope is not None:
            raise RuntimeError("this using(...) is entered already: make another one for a second `with`")
        owner, outer = suspendable_frame(sys._getframe(1)), self._scoped.open()
        if owner is not None:
            self._scope = SuspendableScope(self._batch, owner, outer, self._opened)
            return
        self._scope = self._scoped.scope = Scope(self._batch, outer)
        self._under_way.add(self._scope)
        self._thread = threading.get_ident()

    def __exit__(self, error: Any = None, *_: object) -> None:
        scope, self._scope = self._scope, None
        if scope is None:
            raise RuntimeError("this using(...) was not entered")
        if isinstance(scope, SuspendableScope):
            scope.close()
            return
        scope.closed = True
        self._under_way.discard(scope)
        self._scoped.open()
        if error is None and self._thread != threading.get_ident():
            raise RuntimeError(
                "using(...) was entered in one thread and left in another, whose calls it was not for:"
                " enter and leave it where the model is called, or pass adapter_names=[...]"
            )


def inherits() -> bool:
    """Whether this task, or what it was started by, was started inside a scope."""
    return bool(_TASK.get())


def innermost(scope: Scope, opened: Sequence[SuspendableScope]) -> Scope:
    """The scope that counts now: that of the innermost frame on the stack which has one, be it ``scope``, the thread's
    own, or one of those that were opened in coroutines and generators; else one from the context.

    Raises ``RuntimeError`` where that cannot be known.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "using(...) and disable_adapter() inside a coroutine or a generator cannot be seen by a compiled model:"
            " pass adapter_names=[...] to its calls"
        )
    opened = tuple(opened)  # other threads open some meanwhile
    latest = {own.owner: own for own in opened}
    found: Scope | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame is scope.owner:
            return _inside(scope, frame, opened)
        if frame in latest:
            found = latest[frame]
            break
        frame = frame.f_back
    inherited = _inherited()
    if not inherited or inherited[-1] is found:
        return found or scope
    own = inherited[-1]
    if found is not None:
        return _known(own, inherited) if found in own.outside else found
    # A thread's own scope was opened around the loop that runs a task, and in another thread by what was started there.
    started = scope.batch is None or own.outer is scope or _current_task() is not None
    return _known(own, inherited) if started else scope


def _inside(call: Scope, owner: FrameType, opened: Sequence[SuspendableScope]) -> Scope:
    """The scope that counts inside a call: its own, or the last one that was opened in the course of it."""
    inherited = _inherited()
    since = [own for own in {*opened, *inherited} if own.outer is call]
    if not since:
        return call
    running = _frames(owner)
    counts = [own for own in since if own.owner in running or own in inherited]
    own = max(counts, key=lambda own: own.serial, default=None)
    if own is None:
        return call
    return own if own.owner in running else _known(own, inherited)


def _inherited() -> Sequence[SuspendableScope]:
    """The scopes in the context, innermost last, but for those that async generators left in that of their consumer."""
    scopes = _TASK.get()
    if not any(own.consumer for own in scopes):
        return scopes
    task = _current_task()
    return [own for own in scopes if own.consumer is None or task is None or own.consumer() is not task]


def _known(scope: Scope, inherited: Sequence[SuspendableScope]) -> Scope:
    """``scope``, which an async generator's may be inside of as well as outside: it runs where its consumer is."""
    if isinstance(scope, SuspendableScope) and any(own.consumer and own not in scope.outside for own in inherited):
        raise RuntimeError(
            "this task or thread was started while using(...) or disable_adapter() was open in an async generator:"
            " whether by that or by who iterates over it cannot be known; pass adapter_names=[...]"
        )
    return scope


def _current_task() -> "asyncio.Task[Any] | None":
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None


def _frames(frame: FrameType | None) -> set[FrameType]:
    frames = set()
    while frame is not None:
        frames.add(frame)
        frame = frame.f_back
    return frames


def _file(frame: FrameType | None) -> str | None:
    return None if frame is None else frame.f_code.co_filename


def suspendable_frame(frame: FrameType | None) -> FrameType | None:
    """The nearest caller that can be suspended; None where there is none. Generators that are context managers, as
    ``contextlib`` runs them, are left out: what counts is who entered them."""
    while frame is not None:
        entered_by = frame.f_back
        if frame.f_code.co_flags & _SUSPENDABLE and not {_file(frame), _file(entered_by)} & {contextlib.__file__}:
            return frame
        frame = entered_by
    return None
